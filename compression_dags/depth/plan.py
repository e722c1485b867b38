"""A depth plan as a frozen value: which original layers each new layer is made of.

Applying a stored plan reproduces the bytes: `apply.py` reads only weights and a plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision

if TYPE_CHECKING:
    from torch import Tensor


#: Code version of what `apply.py` makes of a plan.
VERSION = "1"
PLAN, PLAN_TENSORS = "plan.json", "plan.safetensors"


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the new model: the original layers it holds, the share of each, and how they become one.

    Attributes:
        sources: original layers, ascending. A kept layer has one.
        shares: of each source; they sum to 1 (LaCo's differences make some negative).
        form: a key of `apply.FORMS`. `sum`: Σ share · W over every tensor (one source: the layer as it is).
            `projections`: the same over linear projections, the rest from the first source. `concat` and
            `concat-released`: channels and heads chosen from each source. `solved`: tensors that the plan holds, the
            rest from `slot`.
    """

    sources: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)
    form: str = "sum"

    @property
    def kept(self) -> bool:
        """Whether the layer's bytes stay as they are."""
        return len(self.sources) == 1 and self.form == "sum"

    @property
    def slot(self) -> int:
        """The original layer whose place (attention type, per-layer config) it takes."""
        return self.sources[0]


@dataclass(frozen=True)
class MergePlan:
    """New layers in order. Original layers named by none of them are dropped.

    `tensors` holds what numbers in JSON cannot: kept channel indices, solved weights. Keys are
    `<position of the new layer>.<name>`.
    """

    method: str
    base_layers: int
    layers: tuple[PlannedLayer, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = [s for layer in self.layers for s in layer.sources]
        if not self.layers or sorted(set(named)) != named or named[-1] >= self.base_layers:
            raise InputError(f"not a depth plan over {self.base_layers} layers: {named}")
        if any(not math.isclose(sum(layer.shares), 1.0, abs_tol=1e-9) for layer in self.layers):
            raise InputError("shares of a planned layer must sum to 1")

    @property
    def slots(self) -> list[int]:
        return [layer.slot for layer in self.layers]

    @property
    def dropped(self) -> list[int]:
        named = {s for layer in self.layers for s in layer.sources}
        return [i for i in range(self.base_layers) if i not in named]

    def covered(self, position: int) -> range:
        """Original layers that new layer `position` stands for: its own, and the dropped ones after it."""
        starts = [0, *self.slots[1:], self.base_layers]
        return range(starts[position], starts[position + 1])

    def gaps(self) -> list[int]:
        """Positions of new layers that stand for more than one original layer."""
        return [p for p in range(len(self.layers)) if len(self.covered(p)) > 1]

    def of_layer(self, position: int) -> dict[str, Tensor]:
        """The tensors that the plan holds for new layer `position`, by their name within the layer."""
        prefix = f"{position}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def to_json(self) -> str:
        """The plan as it is stored: without the method's name, so that equal plans of two methods are equal bytes."""
        layers = [
            {"sources": x.sources, "shares": x.shares, **({"form": x.form} if x.form != "sum" else {})}
            for x in self.layers
        ]
        return json.dumps({"base_layers": self.base_layers, "layers": layers}, indent=1)

    def save(self, directory: Path) -> None:
        """Write `plan.json`, and `plan.safetensors` where the plan holds tensors."""
        (directory / PLAN).write_text(self.to_json())
        if self.tensors:
            # only a plan that holds tensors needs torch
            from safetensors.torch import save_file  # noqa: PLC0415

            save_file({k: t.cpu().contiguous() for k, t in self.tensors.items()}, directory / PLAN_TENSORS)

    @classmethod
    def outline(cls, directory: Path) -> MergePlan:
        """A stored plan without the tensors that it may hold; torch is not needed to read it."""
        raw = json.loads((directory / PLAN).read_text())
        layers = tuple(
            PlannedLayer(tuple(x["sources"]), tuple(x["shares"]), x.get("form", "sum")) for x in raw["layers"]
        )
        return cls("stored", raw["base_layers"], layers)

    @classmethod
    def load(cls, directory: Path) -> MergePlan:
        found = cls.outline(directory)
        tensors: Mapping[str, Tensor] = {}
        if (directory / PLAN_TENSORS).is_file():
            # only a plan that holds tensors needs torch
            from safetensors.torch import load_file  # noqa: PLC0415

            tensors = load_file(directory / PLAN_TENSORS)
        return replace(found, tensors=tensors)


def keep_only(method: str, base_layers: int, kept: list[int]) -> MergePlan:
    return MergePlan(method, base_layers, tuple(PlannedLayer((i,)) for i in kept))


def depth_decisions(
    plan: MergePlan,
    scores: np.ndarray | Sequence[float | None],
    unit: str,
    evidence: dict[str, Any],
    reasons: Sequence[str],
) -> list[Decision]:
    """One row for every original layer: kept, dropped or merged, with its score, its rank among all and the reason."""
    values = [None if s is None else float(s) for s in scores]
    order = {
        i: r for r, i in enumerate(sorted(range(len(values)), key=lambda i: (values[i] is None, values[i] or 0.0)))
    }
    home = {s: layer for layer in plan.layers for s in layer.sources}
    rows = []
    for index in range(plan.base_layers):
        layer = home.get(index)
        action = "drop" if layer is None else "keep" if len(layer.sources) == 1 else "merge"
        note: dict[str, Any] = {"rank": order[index], **evidence}
        if layer is not None and action == "merge":
            note |= {"share": layer.shares[layer.sources.index(index)], "into": layer.slot}
        sources = list(layer.sources) if layer else []
        target, value = f"layer {index}", values[index]
        rows.append(Decision("merge", plan.method, index, target, action, sources, value, unit, reasons[index], note))
    return rows
