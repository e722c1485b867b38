"""Better masks for weights that stay as they are: in every row a kept weight and a pruned one change places, while that
lowers the output error. The idea of SparseSwaps (2025), for masks from any method.

A row that prunes the inputs P has the error Σ_{i,j ∈ P} A_ij with A = (w wᵀ) ∘ H. With s = A 1_P, a kept p that
leaves and a pruned q that enters change it by exactly

    Δ(p, q) = 2 s_p + A_pp  −  2 s_q + A_qq  −  2 A_pq

A round takes s of all rows from one (rows, d) × (d, d) product, picks the most promising candidates of every row, and
makes swaps among them one at a time, best first; their block of A keeps s exact in between. Counts stay: per row, and
per group of N:M. Where the candidates are all inputs, a finished row is a local optimum for all of its swaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compression_dags.solvers.admm import check_parts
from compression_dags.solvers.refit import check_shapes, damped
from compression_dags.solvers.sweep import Rows

#: Inputs of a row that a round looks at.
CANDIDATES = 64
#: A swap has to lower its row's error by more than this share of it: far above rounding, so that no swap is a cycle.
LEAST_GAIN = 1e-5
#: Numbers of the largest temporary of one chunk of rows.
BATCH = 1 << 25


def swap_refine(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor,
    parts: Sequence[Rows],
    *,
    damping: float = 0.0,
    candidates: int = CANDIDATES,
    rounds: int = 100,
) -> Tensor:
    """Swap while it lowers ‖(W ∘ (1 − M))X‖² + λ‖W ∘ (1 − M)‖²: kept weights stay as they are.

    Args:
        weight: (rows, d) float32 or float64.
        hessian: (d, d) Σ x xᵀ.
        mask: (rows, d) bool, True = kept, from any method; not changed.
        parts: cover all rows; unstructured rows keep their own counts, N:M ones every group's.
        damping: λ over mean diag H.
        candidates: inputs of a row that a round looks at; with d or more, what is found is a 1-swap local optimum.
        rounds: at most; a row ends with its first round without a swap.

    Returns:
        (rows, d) bool. No row's error is higher than before.

    Raises:
        InputError: shapes or parts that do not fit.
        IntegrityError: the Hessian is not finite.
    """
    check_shapes("swaps", weight, hessian, mask)
    check_parts("swaps", weight, parts)
    matrix = damped(hessian, damping, "swaps").to(weight.dtype)
    weight = torch.where(hessian.diagonal() == 0, 0, weight)
    mask = mask.clone()
    for rows, m in _chunks(parts, weight.shape[1], candidates):
        active = torch.arange(rows.start, rows.stop, device=weight.device)
        for _ in range(rounds):
            kept, made = _round(matrix, weight[active], mask[active], m, candidates)
            mask[active] = kept
            active = active[made > 0]
            if not len(active):
                break
    return mask


def _chunks(parts: Sequence[Rows], inputs: int, candidates: int) -> Iterator[tuple[slice, int]]:
    """(rows, M or 0) of every part, cut so that the largest temporary fits `BATCH`."""
    for part in parts:
        m = part.pattern.m or 0
        step = max(1, BATCH // max(min(candidates, inputs) ** 2, inputs * max(1, m)))
        for start in range(part.start, part.stop, step):
            yield slice(start, min(start + step, part.stop)), m


def _round(matrix: Tensor, weight: Tensor, kept: Tensor, m: int, candidates: int) -> tuple[Tensor, Tensor]:
    """One round for some rows: kept (n, d) after it, and (n,) the swaps made."""
    away = torch.where(kept, 0, weight)
    pull = away @ matrix
    error = (away * pull).sum(1)
    s, own = weight * pull, weight.square() * matrix.diagonal()
    leave = torch.where(kept, 2 * s + own, torch.inf)
    enter = torch.where(kept, torch.inf, own - 2 * s)
    if m:
        index, real = _best_groups(matrix, weight, leave, enter, m, candidates)
    else:
        index, real = _extremes(leave, enter, candidates)
    some = weight.gather(1, index)
    gram = matrix[index[:, :, None], index[:, None, :]].mul_(some[:, :, None]).mul_(some[:, None, :])
    before = kept.gather(1, index)
    group = index // m if m else None
    after, made = _search(gram, s.gather(1, index), before, real, group, -LEAST_GAIN * error.clamp_min(0))
    # A sum of changes: an entry that only pads, and may repeat a candidate, changes nothing.
    changed = torch.zeros_like(kept, dtype=torch.int8).scatter_add_(1, index, (after != before).to(torch.int8))
    return kept ^ changed.bool(), made


def _extremes(leave: Tensor, enter: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """(n, c) the inputs cheapest to leave and cheapest to enter, apart from what they do to each other, and (n, c)
    bool, False where a row had too few of them and the index is any other."""
    rows, inputs = leave.shape
    if candidates >= inputs:
        index = torch.arange(inputs, device=leave.device).expand(rows, -1)
        return index, torch.ones_like(index, dtype=torch.bool)
    half = max(1, candidates // 2)
    found = [cost.topk(half, dim=1, largest=False) for cost in (leave, enter)]
    return torch.cat([f.indices for f in found], 1), torch.cat([f.values for f in found], 1).isfinite()


def _best_groups(
    matrix: Tensor, weight: Tensor, leave: Tensor, enter: Tensor, m: int, candidates: int
) -> tuple[Tensor, Tensor]:
    """As `_extremes`: all inputs of the groups of M whose best swap gains most."""
    rows, inputs = leave.shape
    groups = inputs // m
    blocks = matrix.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    w, out, back = (t.view(rows, groups, m) for t in (weight, leave, enter))
    pair = (w[..., :, None] * blocks).mul_(w[..., None, :]).mul_(-2).add_(out[..., :, None]).add_(back[..., None, :])
    chosen = max(1, min(groups, candidates // m))
    best = pair.flatten(2).amin(2).topk(chosen, dim=1, largest=False).indices
    index = (best[..., None] * m + torch.arange(m, device=weight.device)).flatten(1)
    return index, torch.ones_like(index, dtype=torch.bool)


def _search(
    gram: Tensor, s: Tensor, kept: Tensor, real: Tensor, group: Tensor | None, below: Tensor
) -> tuple[Tensor, Tensor]:
    """Swap within the candidates of every row, best first, while Δ < below.

    At most c/2 swaps: after so many, other candidates are worth a look.

    Args:
        gram: (n, c, c) their block of A.
        s, kept, real, group: (n, c).
        below: (n,).

    Returns:
        kept (n, c) afterwards, and (n,) the swaps made.
    """
    rows = torch.arange(len(s), device=s.device)
    made = torch.zeros(len(s), dtype=torch.long, device=s.device)
    own, count = gram.diagonal(dim1=1, dim2=2), gram.shape[1]
    apart = None if group is None else group[:, :, None] != group[:, None, :]
    for _ in range(max(1, count // 2)):
        leave = torch.where(kept & real, 2 * s + own, torch.inf)
        enter = torch.where(~kept & real, own - 2 * s, torch.inf)
        pair = torch.add(leave[:, :, None] + enter[:, None, :], gram, alpha=-2)
        if apart is not None:
            pair.masked_fill_(apart, torch.inf)
        least, where = pair.flatten(1).min(1)
        go = least < below
        if not bool(go.any()):
            break
        p, q = where // count, where % count
        s = s + torch.where(go[:, None], gram[rows, p] - gram[rows, q], 0)
        kept = kept.clone()
        kept[rows, p] ^= go
        kept[rows, q] ^= go
        made += go
    return kept, made
