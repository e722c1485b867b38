"""What a pruner is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compression_dags.solvers.patterns import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.solvers.hessian import Hessian


@dataclass(frozen=True)
class Problem:
    """Matrices that read one input.

    Attributes:
        names: module names.
        weights: (rows_i, d) each, in the stored dtype, on the device.
        patterns: what each must satisfy.
        hessian: Σ x xᵀ of the input, for pruners that need it.
        mean_square: (d,) float64, mean of x² a channel, for pruners that need it.
        tokens: behind the statistic.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    patterns: tuple[Pattern, ...]
    hessian: Hessian | None = None
    mean_square: Tensor | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Pruned:
    """One matrix: weight (rows, d) in the stored dtype with exact zeros, mask (True = kept), what to record."""

    weight: Tensor
    mask: Tensor
    evidence: dict[str, Any] = field(default_factory=dict)


def masked(problem: Problem, masks: Sequence[Tensor], evidence: dict[str, Any] | None = None) -> list[Pruned]:
    """Zeros where the masks say so; kept weights are the stored ones, bit for bit."""
    import torch

    pairs = zip(problem.weights, masks, strict=True)
    return [Pruned(torch.where(m, w, torch.zeros_like(w)), m, dict(evidence or {})) for w, m in pairs]
