"""GPTQ (Frantar et al., ICLR 2023), by the sweep and the factor that SparseGPT shares."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compression_dags.quantization.stage import QuantizeStage
from compression_dags.stage import StatisticKind, Target


class GPTQ(QuantizeStage):
    """Round column by column; the columns to come make up for every error, by the Hessian of the inputs.

    Inputs are those of the model rounded so far, and so far the paper goes. Here every matrix is rounded for outputs
    that also make up for what the matrices before it lost (`target`): the column sweep is the paper's, of other
    weights. Projections that read one input share its Hessian and its factor.
    """

    version: ClassVar[str] = "4"
    statistic: ClassVar[StatisticKind] = "hessian"
    implementation: ClassVar[str] = "compression_dags.quantization.gptq_sweep:round_folded"
    method: Literal["gptq"] = "gptq"
    damping: float = Field(
        0.1, gt=0, description="λ over the mean diagonal of the Hessian, for sweep and target; the paper: 0.01"
    )
    act_order: bool = Field(
        True, description="round the inputs with the largest mean square first; scales are then found before (static)"
    )
    target: Target = Field(
        "residual",
        description="own: W x of the rounded model's inputs (the paper); dense: of the dense model's (GPTAQ); "
        "residual: such that the residual stream is the dense model's (dense where a norm stands before the stream)",
    )
    keep_zeros: bool = Field(True, description="weights that are 0 stay 0: a sparse model stays sparse")

    @property
    def follows(self) -> Target:
        return self.target
