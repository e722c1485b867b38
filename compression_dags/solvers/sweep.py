"""The blocked column sweep of SparseGPT (Frantar & Alistarh 2023), for stacked matrices that share an input.

Columns are taken from the left. Column j's weights are replaced, and the error of that is spread over the columns to
come, so that the output error ‖(W − Ŵ)X‖² is least given what is fixed already:

    e_j = (w_j − ŵ_j) / U_jj          w_k ← w_k − e_j U_jk   for k > j          H⁻¹ = UᵀU

Inside a block the update is a column at a time, for later blocks one matrix product. What replaces a weight is the
`Rule`'s affair: 0 for pruning, a grid value for GPTQ.

Masks are chosen part by part, so that a stack of q, k, v has in each what was asked for it. Unstructured ones are
chosen when the sweep reaches a block, over all of its rows, by w²/U_jj² with exactly the right count (SparseGPT's `<=`
cuts ties too); N:M ones every M columns from the updated weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from compression_dags.errors import InputError
from compression_dags.kernels.sweep import AVAILABLE
from compression_dags.kernels.sweep import walk_block as triton_walk
from compression_dags.solvers.factor import Factor
from compression_dags.solvers.patterns import Pattern

BLOCK = 128


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a stack: one projection, with its own pattern."""

    start: int
    stop: int
    pattern: Pattern


def row_spans(matrices: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Rows [start, stop) of each matrix in the stack of all of them."""
    return list(pairwise([0, *accumulate(len(m) for m in matrices)]))


@dataclass(frozen=True)
class Swept:
    """Attributes:
    weight: (rows, d), zeros exact.
    mask: (rows, d) bool, True where a weight is kept.
    error: (rows,) Σ_j e_j²: the row's output error, in the units of the damped H.
    """

    weight: Tensor
    mask: Tensor
    error: Tensor


def prune_sweep(
    weight: Tensor,
    factor: Factor,
    parts: Sequence[Rows],
    *,
    block: int = BLOCK,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Swept:
    """A stack of matrices, pruned.

    Args:
        weight: (rows, d) float32 or float64; not changed.
        parts: cover all rows, in order.
        block: columns a block; a multiple of every M.
        mask: (rows, d) bool, True = kept: use it instead of choosing.
        backend: `torch`, `triton`, or `auto` (Triton on a GPU where it is installed). Masks are the same; weights
            differ by rounding.

    Raises:
        InputError: a pattern that the row length or the block does not fit, or parts that do not cover the rows.
    """
    _check(weight, parts, block)
    walk = _walker(weight, backend)
    w = weight.clone()
    w[:, factor.dead] = 0
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    error = torch.zeros(len(w), dtype=w.dtype, device=w.device)
    upper, groups = factor.upper, _groups(parts, w.device) if mask is None else None
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        own = upper[start:stop, start:stop].contiguous()
        if mask is None:
            _choose(w, kept, own.diagonal(), parts, start, stop)
        errors = walk(w[:, start:stop], kept[:, start:stop], own, groups)
        error += errors.square().sum(1)
        if stop < w.shape[1]:
            w[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return Swept(w, kept, error)


def _check(weight: Tensor, parts: Sequence[Rows], block: int) -> None:
    ends = [0, *(p.stop for p in parts)]
    if [p.start for p in parts] != ends[:-1] or ends[-1] != len(weight):
        raise InputError(f"sweep: parts {[(p.start, p.stop) for p in parts]} do not cover {len(weight)} rows in order")
    for index, part in enumerate(parts):
        part.pattern.check_row(weight.shape[1], f"part {index}", block)
    if len({p.pattern.m for p in parts if p.pattern.m}) > 1:
        raise InputError("sweep: parts of one stack must have one M")


def _walker(weight: Tensor, backend: str):
    if backend == "auto":
        backend = "torch"
        if weight.is_cuda and weight.dtype == torch.float32:
            backend = "triton" if AVAILABLE else "torch"
    if backend == "triton":
        return triton_walk
    if backend != "torch":
        raise InputError(f"sweep: backend {backend!r} is unknown; allowed: auto, torch, triton")
    return walk_block


@dataclass(frozen=True)
class Groups:
    """N:M choice inside a block: M, and for every row how many of M are pruned (−1: the mask is given)."""

    m: int
    zeros: Tensor


def _groups(parts: Sequence[Rows], device: torch.device) -> Groups | None:
    m = next((p.pattern.m for p in parts if p.pattern.m), None)
    if m is None:
        return None
    zeros = [torch.full((p.stop - p.start,), -1 if p.pattern.zeros is None else p.pattern.zeros) for p in parts]
    return Groups(m, torch.cat(zeros).to(device, torch.int32))


def _choose(w: Tensor, kept: Tensor, diagonal: Tensor, parts: Sequence[Rows], start: int, stop: int) -> None:
    """Unstructured masks of one block, in place: every part's share of zeros, exact over the blocks so far."""
    for part in parts:
        if part.pattern.m is None:
            rows = part.stop - part.start
            count = _zeros(part.pattern.sparsity, rows, stop) - _zeros(part.pattern.sparsity, rows, start)
            score = (w[part.start : part.stop, start:stop] / diagonal).square()
            kept[part.start : part.stop, start:stop] = ~smallest(score.flatten(), count).view_as(score)


def _zeros(sparsity: float, rows: int, columns: int) -> int:
    """Zeros of the first so many columns: rounded once, so the blocks of a matrix add up to its exact count."""
    return int(sparsity * rows * columns + 0.5)


def smallest(score: Tensor, count: int) -> Tensor:
    """(n,) → (n,) bool: exactly the `count` smallest, ties by index. No synchronisation with the device."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= len(score):
        return torch.ones_like(score, dtype=torch.bool)
    # On a GPU a radix sort of the values fills the device; a kth-value selection runs on one of its processors.
    threshold = score.sort().values[count - 1] if score.is_cuda else score.kthvalue(count).values
    below, equal = score < threshold, score == threshold
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))


def group_ranks(score: Tensor) -> Tensor:
    """(…, m) → (…, m) int32: rank of every entry in its group, the smallest first, ties by index."""
    m = score.shape[-1]
    less = score[..., None, :] < score[..., :, None]
    earlier = torch.ones(m, m, dtype=torch.bool, device=score.device).tril(-1)
    equal = (score[..., None, :] == score[..., :, None]) & earlier
    return (less | equal).sum(-1, dtype=torch.int32)


def walk_block(w: Tensor, kept: Tensor, upper: Tensor, groups: Groups | None) -> Tensor:
    """The errors e (rows, width) of one block of columns, which it prunes in place.

    Args:
        w, kept: (rows, width) views, written.
        upper: (width, width) U of the block.
    """
    columns = w.T.contiguous()  # a column is then a row: contiguous for every step
    mask = kept.T.contiguous()
    diagonal = upper.diagonal()
    errors = torch.empty_like(columns)
    for j in range(len(columns)):
        if groups is not None and j % groups.m == 0:
            _choose_group(columns, mask, diagonal, groups, j)
        now = columns[j]
        stored = torch.where(mask[j], now, 0)
        errors[j] = (now - stored) / diagonal[j]
        columns[j] = stored
        if j + 1 < len(columns):
            columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    w.copy_(columns.T)
    kept.copy_(mask.T)
    return errors.T.contiguous()


def _choose_group(columns: Tensor, mask: Tensor, diagonal: Tensor, groups: Groups, j: int) -> None:
    own = slice(j, j + groups.m)
    score = (columns[own] / diagonal[own, None]).square()
    pruned = group_ranks(score.T) < groups.zeros[:, None]
    mask[own] = torch.where(groups.zeros >= 0, ~pruned.T, mask[own])
