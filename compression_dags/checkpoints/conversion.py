"""How names and tensors on disk relate to the parameters of a model in memory, as transformers itself says.

Files of a mixture of experts hold one matrix an expert, and the model holds fused parameters. Many families have other
names on disk than in the module tree. transformers has a conversion mapping for each; it is asked here, never copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

# Private, and the same in transformers 5.17 and 5.23 as far as it is used here. What differs: 5.23 ends a pattern at
# the end of a word and tries the longest pattern first, and 5.17 searches in the order given. 5.23 also has more
# operations (`Split`) and families.
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from compression_dags.checkpoints.parameter_parts import Made, Shape, numbered, parts_in, renamed, shrinking, spans


@dataclass(frozen=True)
class _Goal:
    """Where a disk tensor goes.

    Attributes:
        target: the (first) parameter in memory.
        pattern: the pattern of the converter that takes it; None where it is only renamed.
        order: sorts names as the stock loader does.
    """

    target: str
    pattern: str | None
    order: list[Any]


class Conversion:
    """Names and tensors on disk against those of one model.

    A name is looked up once. transformers decides some names of vision towers by the names before them, so ask for all
    tensors outside the layers together.

    Args:
        model: a stock model, perhaps on the meta device. Only names and shapes of its parameters are read.
    """

    def __init__(self, model: nn.Module):
        self._model: Any = model
        mapping = get_model_conversion_mapping(self._model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._shapes: dict[str, Shape] = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self._goals: dict[str, _Goal | None] = {}

    def in_memory(self, disk_names: Iterable[str]) -> dict[str, str]:
        """Disk name → the (first) parameter in memory that it goes into; names that go nowhere are left out."""
        names = list(disk_names)
        self._look_up(names)
        return {name: goal.target for name in names if (goal := self._goals[name])}

    def converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters in memory that these disk tensors make, in the dtype of the tensors.

        A parameter that is one disk tensor shares its memory.

        Raises:
            ValueError: tensors that make a part of a parameter only.
        """
        found: dict[str, Tensor] = {}
        for target, names in self._grouped(tensors).items():
            if self._is_rename(names):
                found[target] = tensors[names[0]]
            else:
                found.update(self._whole(target, {name: tensors[name] for name in names}))
        return found

    def on_disk(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Made]:
        """Parameter in memory → how it is made of the disk tensors with these names and shapes.

        Raises:
            ValueError: tensors that make a part of a parameter only.
        """
        found: dict[str, Made] = {}
        for target, names in self._grouped(shapes).items():
            if self._is_rename(names):
                found[target] = renamed(names[0])
            else:
                found.update(self._probed(target, {name: tuple(shapes[name]) for name in names}))
        return found

    # -- names ------------------------------------------------------------------------------------------------------

    def _look_up(self, names: Iterable[str]) -> None:
        new = {name: dot_natural_key(name) for name in names if name not in self._goals}
        for name in sorted(new, key=new.__getitem__):
            self._goals[name] = self._goal(name, new[name])

    def _goal(self, name: str, order: list[Any]) -> _Goal | None:
        """Where the stock loader would put a disk tensor; None if nowhere."""
        base: tuple[str, Any] = self._model.base_model_prefix, self._shapes
        target, pattern = rename_source_key(name, self._renamings, self._converters, *base)
        if target not in self._shapes and name in self._shapes:  # as the stock loader: it has its final name
            target, pattern = rename_source_key(name, [], [], *base)
        return _Goal(target, pattern, order) if target in self._shapes else None

    def _grouped(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Parameter → the disk names that go into it, in the stock loader's order."""
        names = list(names)
        self._look_up(names)
        groups: dict[str, list[str]] = {}
        for name in names:
            if goal := self._goals[name]:
                groups.setdefault(goal.target, []).append(name)
        for group in groups.values():
            if len(group) > 1:
                group.sort(key=lambda name: self._known(name).order)
        return groups

    def _known(self, name: str) -> _Goal:
        goal = self._goals[name]
        assert goal is not None
        return goal

    def _is_rename(self, names: list[str]) -> bool:
        """Whether the first name decides for a rename: so it does in the stock loader."""
        return self._known(names[0]).pattern is None

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _whole(self, target: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a converter makes of all its tensors, with the shapes that the model has.

        Raises:
            ValueError: they are not all.
        """
        try:
            found = self._run(target, tensors, self._model)
        except (RuntimeError, ValueError, LookupError) as error:
            raise ValueError(f"{target}: {len(tensors)} tensors on disk do not make it whole ({error})") from error
        for name, tensor in found.items():
            if tuple(tensor.shape) != self._shapes[name]:
                made, whole = tuple(tensor.shape), self._shapes[name]
                raise ValueError(f"{name}: {len(tensors)} tensors on disk make {made} of {whole}, not the whole")
        return found

    def _run(self, target: str, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """What transformers' converter makes of disk tensors."""
        converter = self._converter(next(iter(tensors)))
        for name, tensor in tensors.items():
            converter.add_tensor(target, name, self._known(name).pattern or name, tensor)  # pyright: ignore[reportArgumentType]
        made: dict[str, Any] = converter.convert(target, model=model, config=getattr(model, "config", None))
        found = {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
        return {name: tensor for name, tensor in found.items() if name in self._shapes}

    def _converter(self, name: str) -> WeightConverter:
        """A fresh converter for the parameter of a disk tensor: it collects what it is given."""
        return deepcopy(self._by_pattern[self._known(name).pattern or ""])

    # -- probing ----------------------------------------------------------------------------------------------------

    def _probed(self, target: str, shapes: dict[str, Shape]) -> dict[str, Made]:
        """How the parameters of one converter are made, from index tensors: small ones first, whole ones if need be."""
        factor = shrinking(list(shapes.values()))
        found = self._shrunk(target, shapes, factor) if factor > 1 else None
        if found is not None:
            return found
        numbers = numbered(shapes)
        outputs = self._whole(target, {name: torch.from_numpy(own) for name, own in numbers.items()})
        return {name: self._stated(list(shapes), parts_in(output.numpy(), numbers)) for name, output in outputs.items()}

    def _shrunk(self, target: str, shapes: dict[str, Shape], factor: int) -> dict[str, Made] | None:
        """The same from tensors with shorter axes: whole index tensors of large experts would not fit in memory.

        None where an operation asks for the model or its config, or the result does not fit the model's shapes.
        """
        numbers = numbered({name: tuple(size // factor for size in shape) for name, shape in shapes.items()})
        try:
            outputs = self._run(target, {name: torch.from_numpy(own) for name, own in numbers.items()}, None)
        except Exception:  # whatever an operation raises that finds no model
            return None
        found: dict[str, Made] = {}
        for name, output in outputs.items():
            small, shape = parts_in(output.numpy(), numbers), self._shapes[name]
            parts = None if small is None else tuple(part.scaled(factor) for part in small)
            fits = tuple(size * factor for size in output.shape) == shape if parts is None else spans(parts, shape)
            if not fits:
                return None
            found[name] = self._stated(list(shapes), parts)
        return found

    def _stated(self, names: list[str], parts: Any) -> Made:
        operations = tuple(map(repr, self._converter(names[0]).operations))
        disk = tuple(dict.fromkeys(part.disk for part in parts)) if parts is not None else tuple(names)
        return Made(disk, parts, operations)
