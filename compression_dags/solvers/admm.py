"""Masks by ADMM on the ℓ0 problem: ALPS (Meng, Behdin, Wang & Mazumder, NeurIPS 2024).

    min ‖(Ŵ − W)X‖²  with Ŵ in the pattern      as      Ŵ = D,  D in the pattern,  V the multiplier

    B ← (G + ρD − V)(H' + ρI)⁻¹      D ← the pattern's largest entries of B + V/ρ      V ← V + ρ(B − D)

H' is the damped H scaled to a unit diagonal, so that entries of B are compared by what they weigh in the output, and
G = W'H'. ρ grows slowly while the support still changes much: a small ρ explores, a large one settles. The support
found is refitted exactly.

ALPS inverts H' + ρI from one eigendecomposition. A Cholesky factor and inverse for every new ρ, some ten times, cost d³
flops each, which a GPU does far faster than one eigendecomposition. And H' + ρI is well conditioned in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compression_dags.errors import InputError, IntegrityError
from compression_dags.solvers.refit import DAMPING, check_shapes, damped
from compression_dags.solvers.sweep import Rows, smallest

#: Numbers that are sorted to find a threshold among many more.
SAMPLE = 1 << 18
#: ρ grows to this at most, and shrinks to this share of the first.
LARGEST, SMALLEST = 1e6, 1e-2


@dataclass(frozen=True)
class Schedule:
    """When ρ changes, and when it is enough.

    The ALPS authors have rho 0.1, every 3 and stuck 0.005, else the same. Half their first ρ and twice their patience
    cost 2.5 times the iterations but hardly more factors. Errors were 0.5 % lower on novella-13m, and up to a quarter
    lower on inputs that are correlated more.

    Attributes:
        rho: the first ρ, for an H' with unit diagonal.
        every: iterations between two looks at the support.
        steps: (share of the kept weights that changed, factor of ρ): the first share exceeded gives the factor.
        stuck: a first change below this share of the largest possible one starts again with a fifth of ρ.
        settle: iterations after which a change below `settled` ends it.
        settled: share of the kept weights.
        iterations: at most.
    """

    rho: float = 0.05
    every: int = 6
    steps: tuple[tuple[float, float], ...] = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
    stuck: float = 0.05
    settle: int = 30
    settled: float = 3e-4
    iterations: int = 300

    def factor(self, change: float) -> float:
        return next((grow for share, grow in self.steps if change > share), 1.0)


@dataclass(frozen=True)
class Found:
    """Attributes:
    mask: (rows, d) bool, True = kept.
    values: (rows, d) ADMM's values there, 0 elsewhere: near their best, to start a refit from.
    iterations: of ADMM: a (rows, d) × (d, d) product each.
    factors: how often ρ changed: d³ flops each.
    rho: the last ρ.
    """

    mask: Tensor
    values: Tensor
    iterations: int
    factors: int
    rho: float

    @property
    def evidence(self) -> dict[str, float | int]:
        return {"admm_iterations": self.iterations, "admm_factors": self.factors, "admm_rho": self.rho}


def admm_mask(
    weight: Tensor,
    hessian: Tensor,
    parts: Sequence[Rows],
    *,
    damping: float = DAMPING,
    scope: str = "matrix",
    schedule: Schedule | None = None,
    half: bool | None = None,
) -> Found:
    """Masks of a stack of matrices that share an input; the values beside them are where to start `refit` from.

    Args:
        weight: (rows, d) float32 or float64; not changed.
        hessian: (d, d) Σ x xᵀ.
        parts: cover all rows; every part has its own pattern.
        damping: λ over mean diag H.
        scope: unstructured counts are exact per `matrix` (part) or per `row`.
        half: see below.

    Raises:
        InputError: shapes or patterns that do not fit, an unknown scope.
        IntegrityError: the Hessian is not finite, or not positive definite.

    `half` rounds the two factors of ADMM's product to bfloat16, sums in float32; None: on a GPU for float32 weights.
    The product is of the correction to W alone: novella-13m's errors after the refit differ by less than 0.2 %.
    """
    check_shapes("admm", weight, hessian)
    check_parts("admm", weight, parts)
    if scope not in {"matrix", "row"}:
        raise InputError(f"admm: scope {scope!r} is unknown; allowed: matrix, row")
    if half is None:
        half = weight.is_cuda and weight.dtype == torch.float32
    matrix = damped(hessian, damping, "admm").to(weight.dtype)
    scale = matrix.diagonal().sqrt()
    matrix = matrix / scale / scale[:, None]
    scaled = torch.where(hessian.diagonal() == 0, 0, weight) * scale  # weights of dead inputs go first
    found = _iterate(scaled, matrix, parts, scope, schedule or Schedule(), half)
    return replace(found, values=found.values / scale)


def _iterate(w: Tensor, matrix: Tensor, parts: Sequence[Rows], scope: str, plan: Schedule, half: bool) -> Found:
    rho, growing, factors = plan.rho, False, 1
    first = before = keep_largest(w, parts, scope)
    kept_count = int(first.sum())
    total, most = max(1, kept_count), 2 * min(kept_count, first.numel() - kept_count)
    d, v, inverse = w * first, torch.zeros_like(w), _inverse(matrix, rho)
    b, step = w, 0
    for step in range(1, plan.iterations + 1):
        b = w + _product((d - w).mul_(rho).sub_(v), inverse, half)  # = (G + ρD − V)(H' + ρI)⁻¹
        d = b + v / rho
        kept = keep_largest(d, parts, scope)
        d *= kept
        v.add_(b - d, alpha=rho)
        if step % plan.every:
            continue
        moved, before = int((kept != before).sum()), kept
        change = moved / total
        if growing and (change == 0 or (step >= plan.settle and change < plan.settled)):
            break
        if growing or moved > plan.stuck * most or rho < SMALLEST * plan.rho:
            growing, rho = True, min(rho * plan.factor(change), LARGEST)
        else:
            rho /= 5  # so large that the support hardly leaves its start: begin again
            before, d, v = first, w * first, torch.zeros_like(w)
        inverse, factors = _inverse(matrix, rho), factors + 1
    mask = keep_largest(b, parts, scope)
    return Found(mask, b * mask, step, factors, rho)


def _inverse(matrix: Tensor, rho: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(rho)
    lower, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        raise IntegrityError("admm: the Hessian is not positive definite; use a larger damping")
    return torch.cholesky_inverse(lower)


def _product(left: Tensor, right: Tensor, half: bool) -> Tensor:
    if not half:
        return left @ right
    left, right = left.bfloat16(), right.bfloat16()
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def check_parts(name: str, weight: Tensor, parts: Sequence[Rows]) -> None:
    """
    Raises:
        InputError: parts that do not cover the rows in order, or a pattern that does not fit a row.
    """
    ends = [0, *(p.stop for p in parts)]
    if [p.start for p in parts] != ends[:-1] or ends[-1] != len(weight):
        raise InputError(f"{name}: parts {[(p.start, p.stop) for p in parts]} do not cover {len(weight)} rows in order")
    for index, part in enumerate(parts):
        part.pattern.check_row(weight.shape[1], f"{name}: part {index}")


def keep_largest(values: Tensor, parts: Sequence[Rows], scope: str = "matrix") -> Tensor:
    """(rows, d) bool: the largest magnitudes that every part's pattern leaves, exact counts, ties pruned by index."""
    kept = torch.empty_like(values, dtype=torch.bool)
    for part in parts:
        own, pattern = values[part.start : part.stop].abs(), part.pattern
        if pattern.m is None and scope == "matrix":
            pruned = smallest_of_many(own.flatten(), int(pattern.sparsity * own.numel() + 0.5)).view_as(own)
        else:
            width = pattern.m or own.shape[1]
            count = int(pattern.sparsity * width + 0.5) if pattern.zeros is None else pattern.zeros
            order = own.unflatten(1, (-1, width)).sort(dim=2, stable=True).indices
            pruned = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :count], True).flatten(1)
        kept[part.start : part.stop] = ~pruned
    return kept


def smallest_of_many(score: Tensor, count: int, sample: int = SAMPLE) -> Tensor:
    """`smallest`, for many numbers: a sorted sample brackets the threshold, and only what lies between is sorted."""
    if len(score) <= 4 * sample or not 0 < count < len(score):
        return smallest(score, count)
    ordered = score[:: len(score) // sample].sort().values
    at, margin = count * len(ordered) // len(score), len(ordered) // 256
    low, high = ordered[max(0, at - margin)], ordered[min(len(ordered) - 1, at + margin)]
    below, inside = score < low, (score >= low) & (score <= high)
    rank, between = count - int(below.sum()), score[inside]
    if not 0 < rank <= len(between):  # the sample misled
        return smallest(score, count)
    below[inside] = smallest(between, rank)
    return below
