"""Merging two layers by their activations: joint alignment, then the closed-form mean of every projection.

A scalar average of two layers shrinks them (0.62 W_a + 0.38 W_b of independent matrices has 0.73 of their norm). It
also mixes channels that have nothing to do with each other. Here

* γ of the norms is folded into the projections that read them, so that both layers speak about one input;
* the second layer's MLP channels and key-value groups are permuted to those of the first with which they agree most on
  the calibration tokens. The permutation is joint: gate rows, up rows and down columns; q, k, v rows and o columns.
  Nothing inside a head is permuted, because rotary embeddings tie its channels to positions;
* every projection becomes W* = (Σ λ_l W_l G_l)(Σ λ_l G_l)⁻¹ with G_l = Σ_t x_t x_tᵀ of layer l's own inputs: the
  minimiser of Σ_l λ_l ‖W* X_l − W_l X_l‖² (RegMean, Jin et al. 2023, arXiv 2212.09849).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from compression_dags.architectures import ModelShape
from compression_dags.depth.concat.merge import SMALLEST_GAMMA

#: Ridge of the mean, relative to the mean diagonal of Σ λ G.
RIDGE = 1e-4


@dataclass
class Member:
    """One of two layers to merge.

    Attributes:
        tensors: local name → weight, float32.
        grams: projection group (`attention_input`, …) → Σ x xᵀ of its input, (channels, channels).
    """

    tensors: dict[str, Tensor]
    grams: dict[str, Tensor]


def regression_mean(a: Member, b: Member, share: float, shape: ModelShape) -> dict[str, Tensor]:
    """The merged layer's tensors, float32; `share` λ is that of `a`. `b` should be aligned to `a` before."""
    architecture = shape.architecture
    merged = {k: share * t + (1 - share) * b.tensors[k] for k, t in a.tensors.items()}
    for group in architecture.groups:
        grams, scales = [a.grams[group.name], b.grams[group.name]], _folding(a, b, share, group.name, shape)
        if scales is not None:
            gamma_name, gamma, folds = scales
            merged[gamma_name] = gamma
            grams = [g / (f[:, None] * f[None, :]) for g, f in zip(grams, folds, strict=True)]
        for projection in group.projections:
            name = f"{projection}.weight"
            pair = [a.tensors[name], b.tensors[name]]
            if scales is not None:
                pair = [w * f[None, :] for w, f in zip(pair, scales[2], strict=True)]
            merged[name] = _weighted_mean(pair, grams, (share, 1 - share))
    return merged


def _folding(
    a: Member, b: Member, share: float, group: str, shape: ModelShape
) -> tuple[str, Tensor, tuple[Tensor, Tensor]] | None:
    """Name and value of the merged γ of the norm before `group`, and what the columns of each member are scaled by."""
    norm = dict(shape.architecture.input_norms).get(group)
    if norm is None or f"{norm}.bias" in a.tensors:
        return None
    offset = shape.architecture.norm_offset
    first, second = (m.tensors[f"{norm}.weight"] + offset for m in (a, b))
    mean = share * first + (1 - share) * second
    larger = torch.where(first.abs() >= second.abs(), first, second)
    gamma = torch.where(mean.abs() < SMALLEST_GAMMA * larger.abs(), larger, mean)
    gamma = torch.where(gamma == 0, torch.ones_like(gamma), gamma)
    folds = tuple(_nonzero(g / gamma) for g in (first, second))
    return f"{norm}.weight", gamma - offset, (folds[0], folds[1])


def _nonzero(fold: Tensor) -> Tensor:
    return torch.where(fold.abs() < 1e-6, torch.full_like(fold, 1e-6), fold)


def _weighted_mean(weights: list[Tensor], grams: list[Tensor], shares: tuple[float, float]) -> Tensor:
    total = sum(s * g.double() for s, g in zip(shares, grams, strict=True))
    right = sum(s * w.double() @ g.double() for s, w, g in zip(shares, weights, grams, strict=True))
    assert isinstance(total, Tensor) and isinstance(right, Tensor)
    ridge = RIDGE * total.diagonal().mean() + 1e-30
    # the ridge pulls to the plain share-weighted sum, not to zero
    plain = sum(s * w.double() for s, w in zip(shares, weights, strict=True))
    eye = torch.eye(len(total), dtype=total.dtype, device=total.device)
    return torch.linalg.solve(total + ridge * eye, (right + ridge * plain).T).T.float()


def matching_channels(a: Member, b: Member, cross: Tensor) -> Tensor:
    """(I,) for every MLP channel of `a` the channel of `b` that takes its place: the assignment of largest total
    correlation. `cross` is Σ_t z_a z_bᵀ (I, I) over the same tokens."""
    scale_a, scale_b = (m.grams["mlp_output"].diagonal().clamp_min(1e-30).sqrt() for m in (a, b))
    correlation = (cross / (scale_a[:, None] * scale_b[None, :])).double().cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(correlation, maximize=True)[1]).to(cross.device)


def matching_groups(a: Member, b: Member, cross: Tensor, shape: ModelShape) -> Tensor:
    """(n_kv,) for every key-value group of `a` the group of `b` in its place.

    Agreement of two groups is the cosine of their contributions to the residual stream, E⟨W_o,j u_j, W_o,k u_k⟩, since
    inside a head values have no basis of their own. `cross` is Σ_t u_a u_bᵀ over head outputs u.
    """
    (o,) = shape.architecture.group("attention_output")
    width = shape.heads // shape.kv_heads * shape.head_dim
    out_a, out_b = (m.tensors[f"{o}.weight"] for m in (a, b))

    def inner(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """(n_kv, n_kv) of tr(Wᵀ_left,j W_right,k C_kj)."""
        product = (left.T @ right) * sums
        blocks = product.reshape(shape.kv_heads, width, shape.kv_heads, width)
        return blocks.sum(dim=(1, 3))

    own_a = inner(a.grams["attention_output"], out_a, out_a).diagonal().clamp_min(1e-30).sqrt()
    own_b = inner(b.grams["attention_output"], out_b, out_b).diagonal().clamp_min(1e-30).sqrt()
    agreement = inner(cross, out_a, out_b) / (own_a[:, None] * own_b[None, :])
    rows = linear_sum_assignment(agreement.double().cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(rows).to(cross.device)


def permuted(member: Member, channels: Tensor, groups: Tensor, shape: ModelShape) -> Member:
    """The same function with its MLP channels and key-value groups in another order."""
    architecture = shape.architecture
    query, key, value = architecture.group("attention_input")
    (o,), (down,) = architecture.group("attention_output"), architecture.group("mlp_output")
    heads = shape.heads // shape.kv_heads
    queries = _expand(groups, heads * shape.head_dim)
    keys = _expand(groups, shape.head_dim)
    tensors, grams = dict(member.tensors), dict(member.grams)
    rows = [(query, queries), (key, keys), (value, keys), *((p, channels) for p in architecture.group("mlp_input"))]
    for projection, order in rows:
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name in tensors:
                tensors[name] = tensors[name][order]
    for projection, order, group in ((o, queries, "attention_output"), (down, channels, "mlp_output")):
        tensors[f"{projection}.weight"] = tensors[f"{projection}.weight"][:, order]
        grams[group] = grams[group][order][:, order]
    return Member(tensors, grams)


def _expand(order: Tensor, width: int) -> Tensor:
    return (order[:, None] * width + torch.arange(width, device=order.device)[None, :]).reshape(-1)
