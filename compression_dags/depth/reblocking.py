"""Tensors outside the layers that hold a block for each layer, such as Gemma 4's embeddings by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compression_dags.architectures.tracing import auto_class
from compression_dags.checkpoints.conversion import Conversion
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.stated_config import plain_floats
from compression_dags.checkpoints.writer import PlannedTensor


def reblocked(source: Checkpoint, config: dict[str, Any], kept: Sequence[int]) -> dict[str, PlannedTensor]:
    """Name → the tensor with the blocks of the kept layers alone, for tensors that a model of `config` has smaller."""
    stated = CONFIG_MAPPING[config["model_type"]].from_dict(plain_floats(config))
    with init_empty_weights():
        model: Any = auto_class(stated).from_config(stated)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, PlannedTensor] = {}
    for name, memory in Conversion(model).in_memory(source.outside_layers()).items():
        info, wanted = source.tensors[name], shapes[memory]
        axis = _axis(info.shape, wanted, source.num_layers, len(kept))
        if axis is not None:
            found[name] = PlannedTensor(info.dtype, wanted, _blocks(source, name, axis, kept))
    return found


def _axis(stored: tuple[int, ...], wanted: tuple[int, ...], layers: int, kept: int) -> int | None:
    """The one axis on which a tensor has a block for each layer; None where it has none."""
    if len(stored) != len(wanted) or stored == wanted:
        return None
    odd = [axis for axis, (a, b) in enumerate(zip(stored, wanted, strict=True)) if a != b]
    alone = len(odd) == 1 and stored[odd[0]] % layers == 0
    return odd[0] if alone and stored[odd[0]] // layers * kept == wanted[odd[0]] else None


def _blocks(source: Checkpoint, name: str, axis: int, kept: Sequence[int]) -> Any:
    def load() -> Tensor:
        blocks = source.tensor(name).chunk(source.num_layers, dim=axis)
        return torch.cat([blocks[index] for index in kept], dim=axis)

    return load
