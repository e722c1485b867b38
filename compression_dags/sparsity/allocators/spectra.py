"""Power-law exponents of the spectra of weights, for `alpha`."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

#: Eigenvalues below this share of the largest are rounding.
NEGLIGIBLE = 1e-12


_BINS = 100


_CANDIDATES_AT_ONCE = 512


def spectrum(weight: Tensor) -> Tensor:
    """(rows, columns) → ascending positive eigenvalues of WᵀW, float64, on the weight's device."""
    w = weight.double()
    if not bool(torch.isfinite(w).all()):
        return w.new_full((1,), torch.nan)
    values = torch.linalg.eigvalsh(w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w)
    return values[values > NEGLIGIBLE * values[-1]]


def tail_exponent(values: Tensor, fit: Literal["peak", "mid"]) -> float:
    """α of ascending eigenvalues; NaN for fewer than two different ones."""
    count = len(values)
    if count < 2 or not bool(values[-1] > values[0]):
        return float("nan")
    logs = values.log()
    remaining = torch.arange(count, 0, -1, dtype=torch.float64, device=values.device)
    tails = logs.flip(0).cumsum(0).flip(0) - remaining * logs
    if fit == "mid":
        middle = count // 2
        return float(1 + remaining[middle] / tails[middle])
    start, stop = _candidates(values)
    alphas = 1 + remaining[start:stop] / tails[start:stop]
    distances = torch.cat(
        [_distances(values, alphas[i - start :], i, stop) for i in range(start, stop, _CANDIDATES_AT_ONCE)]
    )
    return float(alphas[int(distances.argmin())])


def _candidates(values: Tensor) -> tuple[int, int]:
    """Range of indices that `peak` tries as λ_min."""
    logs = values.log10()
    counts = torch.histc(logs.cpu(), _BINS)
    edges = torch.linspace(float(logs[0]), float(logs[-1]), _BINS + 1, dtype=torch.float64)
    peak = 10 ** float(edges[int(counts.argmax())])
    tried = torch.nonzero((values >= np.log10(0.95 * peak)) & (values <= 1.5 * peak)).flatten()
    last = len(values) - 1  # an exponent needs two eigenvalues
    tried = tried[tried < last]
    return (int(tried[0]), int(tried[-1]) + 1) if len(tried) else (0, last)


def _distances(values: Tensor, alphas: Tensor, first: int, stop: int) -> Tensor:
    """Kolmogorov-Smirnov distances of the tails that begin at `first`, first + 1, …: a chunk of them."""
    starts = torch.arange(first, min(first + _CANDIDATES_AT_ONCE, stop), device=values.device)
    index = torch.arange(len(values), device=values.device)
    model = 1 - (values[None, :] / values[starts, None]) ** (1 - alphas[: len(starts), None])
    empirical = (index[None, :] - starts[:, None]) / (len(values) - starts[:, None]).double()
    return (model - empirical).abs().masked_fill(index[None, :] < starts[:, None], 0.0).amax(1)


def exponent(weight: Tensor, fit: Literal["peak", "mid"]) -> float:
    """α of the spectrum of a matrix (rows, columns)."""
    return tail_exponent(spectrum(weight), fit)
