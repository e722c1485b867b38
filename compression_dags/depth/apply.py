"""Apply a depth plan: write the stock checkpoint, and compute what its logits must be.

Bytes come from the source's tensors alone. The reference logits run the source's own layers in the plan's order, with
the arguments that the source model gave them. So renumbering, config and files are all under test in the reload gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import PROBE_TOKENS, probe_ids
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.writer import PlannedTensor, unchanged, write_checkpoint
from compression_dags.depth.concat.merge import concatenate, concatenate_released
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.depth.reblocking import reblocked
from compression_dags.errors import InputError

if TYPE_CHECKING:
    import torch


def apply_plan(source: Checkpoint, plan: MergePlan, directory: Path) -> Checkpoint:
    """The checkpoint that is written: `source` with its layers dropped and merged as planned, renumbered, config
    remapped.

    Raises:
        InputError: the plan is for another number of layers, or merges layers whose tensors differ in name or shape.
    """
    if plan.base_layers != source.num_layers:
        raise InputError(f"the plan is for {plan.base_layers} layers; {source.path.name} has {source.num_layers}")
    architecture = source.architecture
    new_names = {
        name: architecture.layer_prefix(position) + local
        for position, layer in enumerate(plan.layers)
        for local, name in source.layer(layer.slot).items()
    }
    config = architecture.remap_config(source.config, plan.slots)
    blocks = reblocked(source, config, plan.slots) if architecture.kinds else {}
    home = {layer.slot: position for position, layer in enumerate(plan.layers)}
    made: dict[int, dict[str, torch.Tensor]] = {}
    tensors: dict[str, PlannedTensor] = {}
    for name in source.tensors:  # in file order, so that shards keep their locality
        index, local = architecture.split_name(name)
        if index is None:
            tensors[name] = blocks.get(name) or unchanged(source, name)
        elif name in new_names:
            position = home[index]
            if position not in made:
                made[position] = layer_tensors(source, plan, position)
            layer = plan.layers[position]
            tensors[new_names[name]] = _planned(source, layer, made[position], local, new_names[name])
    return write_checkpoint(directory, source, config, tensors, kept=plan.slots)


def removed_share(source: Checkpoint, plan: MergePlan) -> dict[str, float]:
    """Shares of the parameters and of the weight bytes that a plan removes, from the file headers."""
    kept = set(plan.slots)
    gone = [info for n, info in source.tensors.items() if source.architecture.split_name(n)[0] not in {None, *kept}]
    return {
        "ratio_of_parameters": sum(info.numel for info in gone) / source.numel,
        "ratio_of_bytes": sum(info.nbytes for info in gone) / source.nbytes,
    }


def _planned(
    source: Checkpoint, layer: PlannedLayer, new: dict[str, torch.Tensor], local: str, new_name: str
) -> PlannedTensor:
    name = source.layer(layer.slot)[local]
    if local not in new:
        return unchanged(source, name, new_name)
    info = source.tensors[name]
    return PlannedTensor(info.dtype, info.shape, lambda: new[local])


def layer_tensors(source: Checkpoint, plan: MergePlan, position: int) -> dict[str, torch.Tensor]:
    """The tensors of new layer `position` that differ from those of its slot: local name → value in the stored dtype.

    A kept layer has none. Deterministic: the bytes follow from the source and the plan.

    Raises:
        InputError: an unknown form, or sources whose tensors differ in name or shape.
    """
    layer = plan.layers[position]
    if layer.kept:
        return {}
    if layer.form not in FORMS:
        raise InputError(f"plan form {layer.form!r} is unknown; allowed: {', '.join(FORMS)}")
    _check_alike(source, layer)
    new = FORMS[layer.form](source, layer, plan.of_layer(position))
    stored = {local: source.tensors[name] for local, name in source.layer(layer.slot).items()}
    for local, tensor in new.items():
        if local not in stored or tuple(tensor.shape) != stored[local].shape:
            raise InputError(f"layers {layer.sources}: {layer.form} gives {local} {tuple(tensor.shape)}, not stock")
    return new


def _check_alike(source: Checkpoint, layer: PlannedLayer) -> None:
    first = source.layer(layer.slot)
    for other in layer.sources[1:]:
        theirs = source.layer(other)
        for local, name in first.items():
            if local not in theirs or source.tensors[theirs[local]].shape != source.tensors[name].shape:
                raise InputError(f"layers {layer.sources} cannot be merged: {local} differs between them")


def weighted_sum(source: Checkpoint, layer: PlannedLayer, _: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Σ share · W over the layer's sources for every tensor, summed in float32, in the stored dtype."""
    return {local: _share_sum(source, layer, local) for local in source.layer(layer.slot)}


def projection_sum(source: Checkpoint, layer: PlannedLayer, _: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same over the linear projections' weights alone; norms and biases stay those of the slot (MKA's code)."""
    names = {f"{p}.weight" for p in source.architecture.projections()}
    return {local: _share_sum(source, layer, local) for local in source.layer(layer.slot) if local in names}


def solved(source: Checkpoint, layer: PlannedLayer, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the plan itself holds."""
    return dict(held)


def _share_sum(source: Checkpoint, layer: PlannedLayer, local: str) -> torch.Tensor:
    first = source.tensor(source.layer(layer.slot)[local])
    total = torch.zeros(first.shape, dtype=torch.float32)
    for index, share in zip(layer.sources, layer.shares, strict=True):
        total += share * source.tensor(source.layer(index)[local]).float()
    return total.to(first.dtype)


#: How the tensors of a planned layer come about: (source, layer, tensors held by the plan) → changed tensors.
FORMS: dict[str, Callable[[Checkpoint, PlannedLayer, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "sum": weighted_sum,
    "projections": projection_sum,
    "concat": concatenate,
    "concat-released": concatenate_released,
    "solved": solved,
}


def reference_logits(
    source: Checkpoint,
    plan: MergePlan,
    *,
    replaced: dict[str, torch.Tensor] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> torch.Tensor:
    """Logits of the planned model on the gate's probe, from the source's layers alone: (2, T, vocabulary) float32.

    `replaced` holds tensors, by their full name in the source, that a later stage computed anew.
    """
    stream = DecoderStream(source, device=device, dtype=dtype, resident=False)
    config = source.text_config
    ids = probe_ids(config["vocab_size"], config.get("max_position_embeddings", PROBE_TOKENS)).numpy()
    blocks = TokenBlocks(ids.astype(np.int32), np.full(len(ids), ids.shape[1], dtype=np.int32), 0)
    (batch,) = stream.batches(blocks)
    with torch.inference_mode():
        for position, layer in enumerate(plan.layers):
            with stream.layer(layer.slot, prefetch=source.num_layers) as module:
                again = {k: replaced[n] for k, n in source.layer(layer.slot).items() if replaced and n in replaced}
                if new := layer_tensors(source, plan, position) or again:
                    new = stream.in_memory(layer.slot, new)
                    new = {k: t.to(stream.device, stream.dtype) for k, t in new.items()}
                    module.load_state_dict(new, assign=True, strict=False)
                batch.hidden = stream.apply(module, layer.slot, batch)
        return stream.logits(batch, batch.hidden).float().cpu()
