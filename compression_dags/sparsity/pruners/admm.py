"""Masks by ADMM, kept weights by an exact refit, both aimed at what the dense model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import StatisticKind, Target

if TYPE_CHECKING:
    from compression_dags.sparsity.pruner import Problem, Pruned


class ADMM(SparsifyStage):
    """Choose masks by ADMM on the ℓ0 problem and refit the kept weights exactly.

    Masks are those of ALPS (Meng et al., NeurIPS 2024). New is what they aim at. Errors of earlier layers arrive in x̂,
    and `residual` asks every projection to make up for them: W* = argmin ‖W* x̂ − W x‖², and where the output joins the
    residual stream r, ‖(r̂ + W* x̂) − (r + W x)‖², with x and r of the dense model at the same tokens. W* is dense and
    found in closed form; what is pruned is W*. Where a norm stands before the residual stream (Gemma 3) it is `dense`,
    and experts aim at their own outputs; the ledger says so a matrix.
    """

    statistic: ClassVar[StatisticKind] = "hessian"
    rule: ClassVar[str] = "those that ADMM chose, the rest refitted"
    method: Literal["admm"] = "admm"
    damping: float = Field(0.01, gt=0, description="λ over the mean diagonal of the Hessian")
    target: Target = Field(
        "residual",
        description="own: W x of the pruned model's inputs; dense: of the dense model's; residual: such that the "
        "residual stream after it is the dense model's",
    )

    @property
    def follows(self) -> Target:
        return self.target

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.target != "own" and self.propagate == "dense":
            raise InputError(
                f"sparsify: admm with target {self.target} compares the pruned model with the dense one as it goes; "
                "propagate dense is for target own"
            )

    def prune(self, problem: Problem) -> list[Pruned]:
        import torch

        from compression_dags.solvers.admm import admm_mask
        from compression_dags.solvers.refit import propagated_target, reconstruction_error, refit
        from compression_dags.solvers.sweep import Rows, row_spans
        from compression_dags.sparsity.pruner import Pruned

        assert problem.hessian is not None
        problem.hessian.require_finite(" + ".join(problem.names))
        hessian = problem.hessian.matrix
        stack = torch.cat([w.float() for w in problem.weights])
        target = stack
        if problem.cross is not None:
            target = propagated_target(stack, hessian, problem.cross, self.damping, problem.drift)
        spans = row_spans(problem.weights)
        parts = [Rows(a, b, p) for (a, b), p in zip(spans, problem.patterns, strict=True)]
        chosen = admm_mask(target, hessian, parts, damping=self.damping)
        aim = "own" if problem.cross is None else "dense" if problem.drift is None else "residual"
        fitted = refit(target, hessian, chosen.mask, start=chosen.values, damping=self.damping)
        found = []
        for (a, b), weight in zip(spans, problem.weights, strict=True):
            new, mask = fitted.weight[a:b].to(weight.dtype), chosen.mask[a:b]
            lost = reconstruction_error(target[a:b], new.float(), hessian).double().sum()
            whole = reconstruction_error(target[a:b], torch.zeros_like(target[a:b]), hessian).double().sum()
            evidence = {"target": aim, "output_error": float((lost / whole).sqrt()) if whole > 0 else 0.0}
            found.append(Pruned(new, mask, evidence | chosen.evidence | fitted.evidence))
        return found
