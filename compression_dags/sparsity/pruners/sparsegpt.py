"""SparseGPT (Frantar & Alistarh, ICML 2023, IST-DASLab/sparsegpt) by the shared column sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import StatisticKind

if TYPE_CHECKING:
    pass


class SparseGPT(SparsifyStage):
    """Zero weights column by column, by w² / (H⁻¹)_jj, and let the columns to come make up for each error."""

    statistic: ClassVar[StatisticKind] = "hessian"
    rule: ClassVar[str] = "the least w²/(H⁻¹)ⱼⱼ, later columns making up for each"
    implementation: ClassVar[str] = "compression_dags.sparsity.pruners.column_sweep:prune"
    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, description="λ over the mean diagonal of the Hessian")
    block: int = Field(128, ge=1, description="columns whose mask is chosen at a time")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        m = self.asked.m
        if m and self.block % m:
            raise InputError(f"sparsify: block {self.block} is not a multiple of the {m} of pattern {self.pattern}")
