"""What a pruner is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from compression_dags.solvers.patterns import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.passes.input_sums import InputSums
    from compression_dags.solvers.hessian import Hessian
    from compression_dags.sparsity.allocation import SparsityPlan


@dataclass(frozen=True)
class Problem:
    """Matrices that read one input.

    Attributes:
        names: module names.
        weights: (rows_i, d) each, in the stored dtype, on the device.
        patterns: what each must satisfy.
        hessian: Σ x xᵀ of the input, for pruners that need it.
        cross: (d, d) Σ x_dense xᵀ, for pruners that aim at the dense model's outputs.
        drift: (rows, d) Σ (r_dense − r) xᵀ of the residual stream that the output is added to, likewise.
        mean_square: (d,) float64, mean of x² a channel, for pruners that need it.
        tokens: behind the statistic.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    patterns: tuple[Pattern, ...]
    hessian: Hessian | None = None
    cross: Tensor | None = None
    drift: Tensor | None = None
    mean_square: Tensor | None = None
    tokens: int = 0

    @classmethod
    def of(
        cls,
        names: tuple[str, ...],
        weights: tuple[Tensor, ...],
        plan: SparsityPlan,
        seen: InputSums | None,
        label: str,
    ) -> Problem:
        patterns = tuple(plan.patterns[n] for n in names)
        if seen is None:
            return cls(names, weights, patterns)
        if seen.hessian is None:
            return cls(names, weights, patterns, mean_square=seen.mean_square(label), tokens=seen.tokens)
        return cls(names, weights, patterns, seen.hessian, seen.cross, seen.drift, tokens=seen.tokens)


@dataclass(frozen=True)
class Pruned:
    """One matrix: weight (rows, d) in the stored dtype with exact zeros, mask (True = kept), what to record."""

    weight: Tensor
    mask: Tensor
    evidence: dict[str, Any] = field(default_factory=dict)


def masked(problem: Problem, masks: Sequence[Tensor], evidence: dict[str, Any] | None = None) -> list[Pruned]:
    """Zeros where the masks say so; kept weights are the stored ones, bit for bit."""
    pairs = zip(problem.weights, masks, strict=True)
    return [Pruned(torch.where(m, w, torch.zeros_like(w)), m, dict(evidence or {})) for w, m in pairs]
