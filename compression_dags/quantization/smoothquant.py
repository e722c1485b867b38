"""SmoothQuant (Xiao et al., ICML 2023): outliers of the inputs are moved into the weights, which round them better."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.errors import InputError
from compression_dags.quantization.gptq import GPTQ, sweep_group
from compression_dags.stage import StatisticKind, Target

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.passes.input_sums import InputSums
    from compression_dags.quantization.formats import Choice
    from compression_dags.quantization.rounding_pass import RoundedGroup
    from compression_dags.quantization.smoothing import Fold


class SmoothQuant(GPTQ):
    """Divide inputs by s_j = max|x_j|^α / max|W_j|^(1 − α), and round to nearest (or by GPTQ).

    For schemes that round inputs. The paper's are those that a norm makes. Inputs of the output projections are made
    by the rows of v and up, which have scales of their own, so that dividing them costs nothing: `where: all`.
    """

    version: ClassVar[str] = "3"
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

    def round_folded(
        self, weights: dict[str, Tensor], seen: InputSums, choice: Choice, label: str, fold: Fold | None
    ) -> RoundedGroup:
        from compression_dags.quantization.awq import nearest_group

        columns = None
        if fold is not None and (fold.norm or self.where == "all") and choice.format.activations < 16:
            columns = migration(seen.peak(label, self.peaks), list(weights.values()), self.alpha, fold)
            if fold.rows:  # stored scales of those rows are divided, maybe in float16: a common factor is free
                columns = (columns / (columns.max() * columns.min()).sqrt()).clamp(1e-3, 1e3)
            columns = fold.exact(columns)
        if self.rounding == "gptq":
            return sweep_group(self, weights, seen, choice, label, columns)
        return nearest_group(weights, choice, columns)


def migration(peak: Tensor, weights: list[Tensor], alpha: float, fold: Fold | None = None) -> Tensor:
    """s (in,) float32 of matrices (out_i, in) whose inputs reach `peak` (in,): the paper's equation 4.

    Inputs or weights that are 0 keep s = 1. Channels that share a factor (`fold`) take the largest of their peaks.
    """
    import torch

    wide = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    if fold is not None:
        peak, wide = fold.widest(peak), fold.widest(wide)
    columns = peak.pow(alpha) / wide.pow(1 - alpha)
    return torch.where((peak > 0) & (wide > 0), columns, torch.ones_like(columns))
