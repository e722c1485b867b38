"""One layer out of whole MLP channels and attention heads of several: CoMe's merge, repaired and as released.

CoMe (Wang et al. 2025, arXiv 2510.15304) keeps the most sensitive channels and KV groups S_a, S_b, … of each member and
stacks them, so that the new layer computes x → x + Σ_s f_s^{S_s}(x) in the shape of a stock layer. The residual
dimension is shared, so nothing needs aligning. Form `concat` keeps what the released code loses on the way:

* a KV head travels with its own query heads (the code tiles the mask, which scrambles every grouped-query model);
* the norm in front of a branch is folded: rows of member s are scaled by γ_s/γ_m, so each still sees its own γ (the
  code averages γ); a LayerNorm's β goes into the projection's bias;
* biases of the output projections are added, as the outputs are (the code weights them by the shares).

Norms over a head (Qwen3) or after a branch (Gemma 3) cannot be folded: they are share-weighted means. Of a branch that
only one member contributes to, every tensor is that member's, bit for bit. Form `concat-released` is the code's merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from compression_dags.architectures import ModelShape
from compression_dags.depth.stage import refuse_experts
from compression_dags.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.depth.plan import PlannedLayer

#: A mean γ_m smaller than this share of its largest member's γ would blow rows up; that member's γ is taken instead.
SMALLEST_GAMMA = 0.1


def concatenate(
    source: Checkpoint, layer: PlannedLayer, held: Mapping[str, Tensor], device: str = "cpu"
) -> dict[str, Tensor]:
    """Plan form `concat`: all tensors of the layer, in the stored dtype.

    Args:
        held: `channels.<s>` and `heads.<s>` (int32, ascending) for every original layer s of `layer.sources`: its kept
            MLP channels and KV heads.
        device: where to compute; the bytes do not depend on it, but for the last bit of a folded LayerNorm's β.

    Raises:
        InputError: indices of a member are missing, or the model is a mixture of experts.
    """
    refuse_experts(source.shape)
    channels, heads = (_held(layer, held, kind) for kind in ("channels", "heads"))
    members = _members(source, layer, device)
    return concatenate_members(members, channels, heads, layer.shares, source.shape)


def concatenate_members(
    members: Sequence[Mapping[str, Tensor]],
    channels: Sequence[Tensor],
    heads: Sequence[Tensor],
    shares: Sequence[float],
    shape: ModelShape,
) -> dict[str, Tensor]:
    """Tensors of one layer made of kept channels and KV groups of several, in the members' order.

    Args:
        members: local name → tensor of each member layer.
        channels: kept MLP channels of each member, (≥ 0,) integers, ascending.
        heads: kept KV heads of each member, (≥ 0,) integers, ascending; KV head j brings its g query heads
            j·g … j·g + g − 1 and their columns of the output projection.
        shares: weight of each member in what has to be averaged (γ_m and the norms that do not fold).

    Returns:
        Local name → tensor in the members' dtype, computed in float32. The counts need not add up to a stock layer.
        Tensors of neither branch are the first member's.

    Raises:
        InputError: a LayerNorm's β must fold into a projection that has no bias.
    """
    architecture = shape.architecture
    group = shape.heads // shape.kv_heads
    query = [_rows(h, group * shape.head_dim) for h in heads]
    pairs = [_rows(h, shape.head_dim) for h in heads]
    q, *kv = architecture.group("attention_input")
    norms = dict(architecture.input_norms)
    folder = _Folder(members, shares, architecture.norm_offset)
    reads: dict[str, Sequence[Tensor]] = {q: query, **dict.fromkeys(kv, pairs)}
    made = folder.branch(norms["attention_input"], reads, architecture.group("attention_output"), query)
    made |= folder.means((*architecture.head_norms, *architecture.branch_norms[:1]), query)
    reads = dict.fromkeys(architecture.group("mlp_input"), channels)
    made |= folder.branch(norms["mlp_input"], reads, architecture.group("mlp_output"), channels)
    made |= folder.means(architecture.branch_norms[1:], channels)
    return {local: made.get(local, tensor).to(tensor.dtype).contiguous() for local, tensor in members[0].items()}


def _held(layer: PlannedLayer, held: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    for s in layer.sources:
        if f"{kind}.{s}" not in held:
            raise InputError(f"the plan of layers {layer.sources} holds no {kind}.{s}: it is not a concat plan")
    return [held[f"{kind}.{s}"] for s in layer.sources]


def _members(source: Checkpoint, layer: PlannedLayer, device: str) -> list[dict[str, Tensor]]:
    return [{k: source.tensor(name).to(device) for k, name in source.layer(s).items()} for s in layer.sources]


def _rows(blocks: Tensor, width: int) -> Tensor:
    """Rows of blocks of `width`: [2, 5] and 3 → 6 7 8 15 16 17."""
    return (blocks.long()[:, None] * width + torch.arange(width, device=blocks.device)).flatten()


def _taken(tensor: Tensor, indices: Tensor, dim: int = 0) -> Tensor:
    return tensor.index_select(dim, indices.long().to(tensor.device))


class _Folder:
    """Members of one merge. Vectors are computed in float64, matrices in float32; one that nothing is done to stays."""

    def __init__(self, members: Sequence[Mapping[str, Tensor]], shares: Sequence[float], offset: float):
        self.members, self.shares, self.offset = members, shares, offset

    def branch(
        self, norm: str, reads: Mapping[str, Sequence[Tensor]], writes: Sequence[str], columns: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """One branch: its pre-norm, the projections that read it (rows), the one that writes (columns)."""
        who = self._givers(columns)
        made = self._norm(norm, who)
        for projection, rows in reads.items():
            parts = [self._folded(i, projection, rows[i], norm, made, fold=len(who) > 1) for i in who]
            for kind in parts[0]:
                made[f"{projection}.{kind}"] = torch.cat([part[kind] for part in parts])
        for projection in writes:
            weights = [_taken(self.members[i][f"{projection}.weight"], columns[i], dim=1) for i in who]
            made[f"{projection}.weight"] = torch.cat(weights, dim=1)
            if (bias := f"{projection}.bias") in self.members[0]:  # outputs are added, so their biases are
                made[bias] = torch.stack([self.members[i][bias].double() for i in who]).sum(0)
        return made

    def means(self, norms: Sequence[str], kept: Sequence[Tensor]) -> dict[str, Tensor]:
        """Norms that fold nowhere: share-weighted means over the members that give something."""
        who = self._givers(kept)
        names = [f"{n}.{kind}" for n in norms for kind in ("weight", "bias") if f"{n}.{kind}" in self.members[0]]
        return {name: self._mean(name, who) for name in names}

    def _givers(self, kept: Sequence[Tensor]) -> list[int]:
        """Members that give something to a branch (the first, if none does: it then has no rows)."""
        return [i for i, indices in enumerate(kept) if len(indices)] or [0]

    def _mean(self, name: str, who: Sequence[int]) -> Tensor:
        """Share-weighted mean in float64; the tensor itself if one member gives it."""
        values = [self.members[i][name].double() for i in who]
        weights = [max(0.0, self.shares[i]) for i in who]
        if not sum(weights) > 0:
            weights = [1.0] * len(who)
        total = values[0] * (weights[0] / sum(weights))
        for value, weight in zip(values[1:], weights[1:], strict=True):
            total = total + value * (weight / sum(weights))
        return values[0] if len(who) == 1 else total

    def _norm(self, norm: str, who: Sequence[int]) -> dict[str, Tensor]:
        """γ_m (and β_m) of the merged pre-norm, rounded as they will be stored: rows are scaled to what is stored."""
        made = {}
        for kind in ("weight", "bias"):
            name = f"{norm}.{kind}"
            if name not in self.members[0]:
                continue
            value = self._mean(name, who)
            if kind == "weight" and len(who) > 1:
                each = torch.stack([self.members[i][name].double() + self.offset for i in who])
                largest = each.gather(0, each.abs().argmax(0, keepdim=True))[0]
                small = (value + self.offset).abs() < SMALLEST_GAMMA * largest.abs()
                value = torch.where(small, largest - self.offset, value)
            made[name] = value.to(self.members[0][name].dtype)
        return made

    def _folded(
        self, member: int, projection: str, rows: Tensor, norm: str, made: Mapping[str, Tensor], *, fold: bool
    ) -> dict[str, Tensor]:
        """Weight and bias rows of one member, such that after the merged norm they give what they gave after its own:
        W γ_s/γ_m, and b + Wβ_s − (W γ_s/γ_m)β_m."""
        own = self.members[member]
        weight, bias = f"{projection}.weight", f"{projection}.bias"
        w = _taken(own[weight], rows)
        b = _taken(own[bias], rows) if bias in own else None
        gamma, beta = f"{norm}.weight", f"{norm}.bias"
        if fold and gamma in made:
            ours, merged = (t[gamma].double() + self.offset for t in (own, made))
            ratio = torch.where(merged == 0, 1.0, ours / merged)
            if beta in made:
                shift = w.double() @ (own[beta].double() - ratio * made[beta].double())
                b = self._shifted(b, shift, projection, norm)
            w = w.float() * ratio.float()
        return {"weight": w} if b is None else {"weight": w, "bias": b}

    def _shifted(self, bias: Tensor | None, shift: Tensor, projection: str, norm: str) -> Tensor | None:
        if bias is not None:
            return bias.double() + shift
        if bool((shift != 0).any()):
            raise InputError(f"{norm} has a bias that cannot fold into {projection}, which has none")
        return None


# -- as released ------------------------------------------------------------------------------------------------------


def tiled_queries(heads: Tensor, shape: ModelShape) -> Tensor:
    """Query heads that the released code keeps with the KV heads `heads`: (g · kept,) int32, ascending.

    It repeats the mask over KV heads g times, so that query head h follows KV head h mod n_kv. But query head h reads
    KV head ⌊h / g⌋ (specs: defect B1).
    """
    kept = torch.zeros(shape.kv_heads, dtype=torch.bool, device=heads.device)
    kept[heads.long()] = True
    return kept.repeat(shape.heads // shape.kv_heads).nonzero().flatten().int()


def concatenate_released(
    source: Checkpoint, layer: PlannedLayer, held: Mapping[str, Tensor], device: str = "cpu"
) -> dict[str, Tensor]:
    """Plan form `concat-released`: all tensors of the layer as the released code makes them, in the stored dtype.

    Norms are plain means over the members, biases of the output projections and norms over heads share-weighted sums,
    query heads are chosen by the tiled mask.

    Args:
        held: `channels.<s>` and `heads.<s>` as for `concat`; `queries.<s>`, the kept query heads, and
            `mixed.<local name>`, the value of a norm or bias, where a member was itself merged: then neither follows
            from the original layers and their shares.
        device: where to compute; the bytes are the same.

    Raises:
        InputError: indices of a member are missing, or the model is a mixture of experts.
    """
    shape = source.shape
    refuse_experts(shape)
    architecture = shape.architecture
    channels, heads = (_held(layer, held, kind) for kind in ("channels", "heads"))
    tiled = [held.get(f"queries.{s}", tiled_queries(h, shape)) for s, h in zip(layer.sources, heads, strict=True)]
    query, pairs = ([_rows(h, shape.head_dim) for h in kind] for kind in (tiled, heads))
    q, *kv = architecture.group("attention_input")
    reads = {q: query, **dict.fromkeys(kv, pairs), **dict.fromkeys(architecture.group("mlp_input"), channels)}
    writes = {
        **dict.fromkeys(architecture.group("attention_output"), query),
        **dict.fromkeys(architecture.group("mlp_output"), channels),
    }
    members = _members(source, layer, device)
    made: dict[str, Tensor] = {}
    for projection, rows in reads.items():
        for name in (n for n in (f"{projection}.weight", f"{projection}.bias") if n in members[0]):
            made[name] = torch.cat([_taken(m[name], r) for m, r in zip(members, rows, strict=True)])
    for projection, columns in writes.items():
        name = f"{projection}.weight"
        made[name] = torch.cat([_taken(m[name], c, dim=1) for m, c in zip(members, columns, strict=True)], dim=1)
    for name, shares in mixed_tensors(source, layer).items():
        value = held.get(f"mixed.{name}")
        made[name] = mixed([m[name] for m in members], shares) if value is None else value.to(device)
    return {local: made.get(local, tensor).contiguous() for local, tensor in members[0].items()}


def mixed_tensors(source: Checkpoint, layer: PlannedLayer) -> dict[str, tuple[float, ...]]:
    """Local names of what the released code averages, with the weights it does it with: norms plainly, biases of the
    output projections and norms over heads by the shares."""
    architecture = source.architecture
    equal = (1.0 / len(layer.sources),) * len(layer.sources)
    outputs = (*architecture.group("attention_output"), *architecture.group("mlp_output"))
    names = {
        **{f"{n}.{kind}": equal for n in architecture.norms for kind in ("weight", "bias")},
        **{f"{n}.{kind}": layer.shares for n in architecture.head_norms for kind in ("weight", "bias")},
        **{f"{p}.bias": layer.shares for p in outputs},
    }
    return {name: weights for name, weights in names.items() if name in source.layer(layer.slot)}


def mixed(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · tensor in float32, in the dtype of the first."""
    total = tensors[0].float() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor.float() * weight
    return total.to(tensors[0].dtype)
