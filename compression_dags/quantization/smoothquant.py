"""SmoothQuant (Xiao et al., ICML 2023): outliers of the inputs are moved into the weights, which round them better."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.errors import InputError
from compression_dags.quantization.gptq import GPTQ
from compression_dags.stage import StatisticKind, Target


class SmoothQuant(GPTQ):
    """Divide inputs by s_j = max|x_j|^α / max|W_j|^(1 − α), and round to nearest (or by GPTQ).

    For schemes that round inputs. The paper's are those that a norm makes. Inputs of the output projections are made
    by the rows of v and up, which have scales of their own, so that dividing them costs nothing: `where: all`.
    """

    version: ClassVar[str] = "3"
    implementation: ClassVar[str] = "compression_dags.quantization.migration:round_folded"
    method: Literal["smoothquant"] = "smoothquant"
    alpha: float = Field(0.65, ge=0, le=1, description="migration strength; the paper takes 0.5")
    where: Literal["all", "norms"] = Field(
        "all", description="norms: inputs that a norm makes (the paper); all: also those that v and up make"
    )
    peaks: Literal["sequence", "all"] = Field(
        "sequence",
        description="max|x| of a channel: the mean over sequences of the largest in each; all: the largest of all "
        "tokens (the paper), which one token decides, the more so the more tokens there are",
    )
    rounding: Literal["rtn", "gptq"] = "rtn"
    target: Target = Field("own", description="of `rounding: gptq`; as gptq's")

    @model_validator(mode="after")
    def _target_needs_gptq(self) -> SmoothQuant:
        if self.rounding == "rtn" and self.target != "own":
            raise InputError(f"smoothquant: target {self.target!r} needs rounding: gptq; to nearest follows own only")
        return self

    @property
    def versions(self) -> dict[str, str]:
        return super().versions | ({"quantize: gptq": GPTQ.version} if self.rounding == "gptq" else {})

    @property
    def wanted(self) -> StatisticKind:
        return "peak" if self.rounding == "rtn" else "hessian_peak"
