"""SmoothQuant's factors, and the rounding of the matrices that take them."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_dags.passes.input_sums import InputSums
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.gptq_sweep import sweep_group
from compression_dags.quantization.nearest import nearest_group
from compression_dags.quantization.rounding_pass import RoundedGroup
from compression_dags.quantization.smoothing import Fold
from compression_dags.quantization.smoothquant import SmoothQuant


def round_folded(
    options: SmoothQuant, weights: dict[str, Tensor], seen: InputSums, choice: Choice, label: str, fold: Fold | None
) -> RoundedGroup:
    """The matrices with outliers of their input moved into them, rounded; see `QuantizeStage.round_folded`."""
    columns = None
    if fold is not None and (fold.norm or options.where == "all") and choice.format.activations < 16:
        columns = migration(seen.peak(label, options.peaks), list(weights.values()), options.alpha, fold)
        if fold.rows:  # stored scales of those rows are divided, maybe in float16: a common factor is free
            columns = (columns / (columns.max() * columns.min()).sqrt()).clamp(1e-3, 1e3)
        columns = fold.exact(columns)
    if options.rounding == "gptq":
        return sweep_group(options, weights, seen, choice, label, columns)
    return nearest_group(weights, choice, columns)


def migration(peak: Tensor, weights: list[Tensor], alpha: float, fold: Fold | None = None) -> Tensor:
    """s (in,) float32 of matrices (out_i, in) whose inputs reach `peak` (in,): the paper's equation 4.

    Inputs or weights that are 0 keep s = 1. Channels that share a factor (`fold`) take the largest of their peaks.
    """
    wide = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    if fold is not None:
        peak, wide = fold.widest(peak), fold.widest(wide)
    columns = peak.pow(alpha) / wide.pow(1 - alpha)
    return torch.where((peak > 0) & (wide > 0), columns, torch.ones_like(columns))
