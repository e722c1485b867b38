"""Masks by ADMM, kept weights by an exact refit, both aimed at what the dense model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import StatisticKind, Target

if TYPE_CHECKING:
    pass


class ADMM(SparsifyStage):
    """Choose masks by ADMM on the ℓ0 problem and refit the kept weights exactly.

    Masks are those of ALPS (Meng et al., NeurIPS 2024). New is what they aim at. Errors of earlier layers arrive in x̂,
    and `residual` asks every projection to make up for them. That is W* = argmin ‖W* x̂ − W x‖², and where the output
    joins the residual stream r, ‖(r̂ + W* x̂) − (r + W x)‖², with x and r of the dense model at the same tokens. W* is
    dense and found in closed form; what is pruned is W*. Where a norm stands before the residual stream (Gemma 3) it is
    `dense`. Experts aim at their own outputs; the ledger says so a matrix.
    """

    statistic: ClassVar[StatisticKind] = "hessian"
    rule: ClassVar[str] = "those that ADMM chose, the rest refitted"
    implementation: ClassVar[str] = "compression_dags.sparsity.pruners.admm_refit:prune"
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
