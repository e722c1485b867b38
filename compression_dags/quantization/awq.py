"""AWQ (Lin et al., MLSys 2024): channels that matter are scaled up before rounding; then ranges are clipped.

Both searches need only H = Σ x xᵀ of the inputs: the error of the outputs is ‖ΔW X‖² = tr(ΔW H ΔWᵀ), so no activation
is kept and no layer is run for a candidate. Candidates are scored on a group's own outputs (the paper runs the block).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from compression_dags.provenance.wording import number
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.stage import StatisticKind


class AWQ(QuantizeStage):
    """Scale the inputs by s = rms(x)^α, with or without / mean|w|^(1 − α), α by grid search on the output error; clip
    every group's range likewise; round to nearest.

    s folds into the norm before, or into the rows of the projection before. α = 0 is RTN: the output error on the
    calibration tokens is never larger. Where rounding to nearest loses less than `least_error` nothing is searched:
    what is left to gain at 8 bits is below what calibration text tells of other text.
    """

    version: ClassVar[str] = "2"
    statistic: ClassVar[StatisticKind] = "hessian"
    implementation: ClassVar[str] = "compression_dags.quantization.awq_search:round_folded"
    method: Literal["awq"] = "awq"
    grid: int = Field(20, ge=1, le=200, description="values of α tried, from 0 to 1")
    duo: Literal["both", "on", "off"] = Field("both", description="divide s by mean|w|^(1 − α): with, without, both")
    clip: bool = Field(True, description="search a smaller range for every group of weights; never for query and key")
    least_clip: float = Field(0.5, gt=0, le=1, description="smallest share of a range that is tried")
    clip_grid: int = Field(11, ge=2, le=200, description="shares tried, from 1 down")
    least_error: float = Field(
        0.02, ge=0, le=1, description="‖(W − Ŵ)X‖ / ‖WX‖ of rounding to nearest below which a group is left at that"
    )

    def remark(self, evidence: Mapping[str, Any]) -> str:
        if "search" in evidence:
            return f"rounding to nearest loses less than {number(self.least_error)}, so nothing was searched"
        if "smoothed" in evidence:
            return "inputs stay unscaled, as nothing before takes the factors"
        scaled = f"α {number(evidence['alpha'])}{' with weights' if evidence['duo'] else ''}"
        return (
            f"{scaled} had the least output error"
            if evidence["alpha"]
            else "α 0 (no scaling) had the least output error"
        )
