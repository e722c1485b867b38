"""SparseGPT (Frantar & Alistarh, ICML 2023, IST-DASLab/sparsegpt) by the shared column sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import StatisticKind

if TYPE_CHECKING:
    from compression_dags.sparsity.pruner import Problem, Pruned


class SparseGPT(SparsifyStage):
    """Zero weights column by column, by w² / (H⁻¹)_jj, and let the columns to come make up for each error."""

    statistic: ClassVar[StatisticKind] = "hessian"
    rule: ClassVar[str] = "the least w²/(H⁻¹)ⱼⱼ, later columns making up for each"
    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, description="λ over the mean diagonal of the Hessian")
    block: int = Field(128, ge=1, description="columns whose mask is chosen at a time")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        m = self.asked.m
        if m and self.block % m:
            raise InputError(f"sparsify: block {self.block} is not a multiple of the {m} of pattern {self.pattern}")

    def prune(self, problem: Problem) -> list[Pruned]:
        import torch

        from compression_dags.solvers.factor import inverse_factor
        from compression_dags.solvers.hessian import energy
        from compression_dags.solvers.sweep import Rows, prune_sweep, row_spans
        from compression_dags.sparsity.pruner import Pruned

        assert problem.hessian is not None
        label = " + ".join(problem.names)
        problem.hessian.require_finite(label)
        factor = inverse_factor(problem.hessian.matrix, self.damping, label)
        stack = torch.cat([w.float() for w in problem.weights])
        spans = row_spans(problem.weights)
        parts = [Rows(a, b, p) for (a, b), p in zip(spans, problem.patterns, strict=True)]
        swept = prune_sweep(stack, factor, parts, block=self.block)
        found = []
        for (a, b), weight in zip(spans, problem.weights, strict=True):
            new, mask = swept.weight[a:b].to(weight.dtype), swept.mask[a:b]
            lost, whole = swept.error[a:b].double().sum(), energy(stack[a:b], problem.hessian.matrix)
            error = float((lost / whole).sqrt()) if whole > 0 else 0.0
            found.append(Pruned(new, mask, {"output_error": error, **factor.evidence}))
        return found
