"""Writing a stock checkpoint, a shard at a time, linking files that did not change."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags.architectures.described import to_json
from compression_dags.checkpoints.reader import INDEX, SINGLE, Checkpoint, description_file
from compression_dags.checkpoints.stated_config import written_floats
from compression_dags.provenance.contents import without_machine_facts

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 2 * 1024**3
_ITEM = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the checkpoint to be written: its size now, its values when asked for.

    `origin` names the file of the source checkpoint that holds it unchanged under the same name, if one does.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    origin: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM[self.dtype]


def unchanged(source: Checkpoint, name: str, new_name: str | None = None) -> PlannedTensor:
    """The source's tensor as it is, perhaps under another name."""
    info = source.tensors[name]
    same = new_name is None or new_name == name
    return PlannedTensor(info.dtype, info.shape, lambda: source.tensor(name), info.file if same else None)


def write_checkpoint(
    directory: Path,
    source: Checkpoint,
    config: dict[str, Any],
    tensors: dict[str, PlannedTensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    kept: Sequence[int] | None = None,
) -> Checkpoint:
    """The checkpoint that is written: config and companions (tokenizer, generation config) of `source`, other weights.

    A source file whose tensors are all kept unchanged is hard-linked where the file system allows it.

    Args:
        kept: source layers that the new layers take the places of; None for all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if source.architecture.kinds:
        described = source.architecture if kept is None else source.architecture.shortened(kept)
        description_file(directory).write_text(to_json(described), encoding="utf-8")
    stock = written_floats(without_machine_facts(config))
    (directory / "config.json").write_text(json.dumps(stock, indent=2, sort_keys=True) + "\n")
    for companion in source.companions():
        shutil.copyfile(companion, directory / companion.name)
    linked = _linkable(source, tensors)
    shards = _split({n: t for n, t in tensors.items() if n not in linked}, max_shard_bytes)
    names = _shard_names(len(shards), taken=set(linked.values()))
    weight_map = dict(linked)
    for file in sorted(set(linked.values())):
        _link(source.path / file, directory / file)
    for file, shard in zip(names, shards, strict=True):
        _save(directory / file, {name: tensors[name].load() for name in shard})
        weight_map.update(dict.fromkeys(shard, file))
    if set(weight_map.values()) != {SINGLE}:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return Checkpoint(directory)


def _linkable(source: Checkpoint, tensors: dict[str, PlannedTensor]) -> dict[str, str]:
    """Tensor → file, for source files that can be taken whole."""
    linked: dict[str, str] = {}
    for file in source.files:
        members = [n for n, info in source.tensors.items() if info.file == file]
        if members and all(n in tensors and tensors[n].origin == file for n in members):
            linked.update(dict.fromkeys(members, file))
    return linked


def _split(tensors: dict[str, PlannedTensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = []
    used = 0
    for name, tensor in tensors.items():
        if not shards or used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def _shard_names(count: int, taken: set[str]) -> list[str]:
    if count == 1 and not taken:
        return [SINGLE]
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    # A linked source shard may carry the same name: then the new files say so.
    return [n if not taken else f"changed-{n}" for n in names]


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # the code location loads this module, and no torch
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
