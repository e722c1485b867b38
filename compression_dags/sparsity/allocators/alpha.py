"""AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912): layers with heavier-tailed spectra keep more. Data-free.

The eigenvalues λ of WᵀW are fitted by a power law p(λ) ∝ λ^−α above some λ_min; a small α is a heavy tail. The exponent
is Hill's: α = 1 + n / Σ_{λ_j ≥ λ_min} log(λ_j / λ_min). α, averaged over a decoder layer, is mapped linearly to
[1 − ε, 1 + ε] and scaled so that the mean over parameters is the target.

As in the released code (`lib/esd_utils.py`, haiquanlu/AlphaPruning): `peak` tries every λ_min up to 1.5 times the peak
of the histogram of log10 λ (100 bins) and takes the one with the least Kolmogorov-Smirnov distance; its lower limit is
log10(0.95 · peak) compared with λ itself, not with log10 λ, so it rarely excludes any. `mid` takes the middle one.
Different here: no sparsity exceeds 0.99 (the released scaling can pass 1; what is cut off is shared by the rest);
eigenvalues are found in float64; those below 1e-12 of the largest are left out (their logarithm is rounding, or −∞).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from compression_dags.errors import InputError, IntegrityError
from compression_dags.provenance.wording import counted, number, ranked
from compression_dags.sparsity.allocation import (
    MOST,
    UNSTRUCTURED,
    Allocated,
    AllocationProbe,
    GriddedAllocation,
    Matrix,
    SparsityEvidence,
    Unit,
    check_target,
    layer_units,
    need_bench,
    on_grid,
    per_matrix,
    place_among,
    sizes,
)
from compression_dags.sparsity.knapsack import scaled_to

if TYPE_CHECKING:
    from torch import Tensor

#: Eigenvalues below this share of the largest are rounding.
NEGLIGIBLE = 1e-12
_BINS = 100
_CANDIDATES_AT_ONCE = 512


class Alpha(GriddedAllocation):
    """AlphaPruning: sparsity rises with the power-law exponent of the weights' spectra; no data needed."""

    method: Literal["alpha"] = "alpha"
    epsilon: float = Field(0.3, gt=0, lt=1, description="ratios to the target span [1 − ε, 1 + ε] before scaling")
    fit: Literal["peak", "mid"] = Field("peak", description="where the tail begins")
    per: Literal["layer", "matrix"] = Field("layer", description="whether matrices of a layer share its mean exponent")

    @property
    def reads_weights(self) -> bool:
        return True

    def allocate(
        self,
        matrices: Sequence[Matrix],
        target: float,
        evidence: SparsityEvidence,
        probe: AllocationProbe | None = None,
        pattern: str = UNSTRUCTURED,
    ) -> Allocated:
        check_target(target)
        if target > MOST:
            raise InputError(f"sparsity {target} is more than {MOST}, the most a matrix may get from alpha")
        probe = need_bench(probe, self.method)
        exponents = {m.name: self._exponent(m, probe) for m in matrices}
        units = layer_units(matrices) if self.per == "layer" else [Unit(m.name, m.layer, (m,)) for m in matrices]
        alpha = np.array([np.mean([exponents[m.name] for m in u.matrices]) for u in units])
        width = alpha.max() - alpha.min()
        ratio = (
            (alpha - alpha.min()) / width * 2 * self.epsilon + 1 - self.epsilon if width > 0 else np.ones(len(units))
        )
        notes = () if width > 0 else ("all exponents are equal: allocation forced uniform",)
        size = sizes(units)
        shares = scaled_to(ratio, size, MOST, target * size.sum())
        clamped = int((shares >= MOST).sum())
        if clamped:
            notes += (f"{clamped} of {len(units)} ratios were cut at {MOST}",)
        rows = [{"alpha_mean": float(a), "share": float(s)} for a, s in zip(alpha, shares, strict=True)]
        by_name = {n: {**row, "alpha": exponents[n]} for n, row in per_matrix(units, rows).items()}
        summary = {"epsilon": self.epsilon, "fit": self.fit, "clamped": clamped, "granularity": self.granularity}
        return Allocated(on_grid(units, shares, target, self.granularity), by_name, summary, notes)

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        mean = number(allocated.evidence[matrix.name]["alpha_mean"])
        place, of = place_among(allocated, matrix.name, "alpha_mean")
        whose = (
            f"its layer's mean spectral exponent, {mean}," if self.per == "layer" else f"its spectral exponent, {mean},"
        )
        cut = f", cut at {MOST}" if allocated.evidence[matrix.name]["share"] >= MOST else ""
        unit = counted(of, "layer") if self.per == "layer" else f"{of} matrices"
        return (
            f"{whose} is {ranked(place, 'largest')} of {unit}, and a larger one loses more "
            f"(ε {number(self.epsilon)} about {number(target)}{cut})"
        )

    def _exponent(self, matrix: Matrix, probe: AllocationProbe) -> float:
        found = tail_exponent(spectrum(probe.weights(matrix.name)), self.fit)
        if not np.isfinite(found):
            raise IntegrityError(f"{matrix.name}: its spectrum has no power-law exponent (a zero or non-finite matrix)")
        return found


def spectrum(weight: Tensor) -> Tensor:
    """(rows, columns) → ascending positive eigenvalues of WᵀW, float64, on the weight's device."""
    import torch

    w = weight.double()
    if not bool(torch.isfinite(w).all()):
        return w.new_full((1,), torch.nan)
    values = torch.linalg.eigvalsh(w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w)
    return values[values > NEGLIGIBLE * values[-1]]


def tail_exponent(values: Tensor, fit: Literal["peak", "mid"]) -> float:
    """α of ascending eigenvalues; NaN for fewer than two different ones."""
    import torch

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
    import torch

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
    import torch

    starts = torch.arange(first, min(first + _CANDIDATES_AT_ONCE, stop), device=values.device)
    index = torch.arange(len(values), device=values.device)
    model = 1 - (values[None, :] / values[starts, None]) ** (1 - alphas[: len(starts), None])
    empirical = (index[None, :] - starts[:, None]) / (len(values) - starts[:, None]).double()
    return (model - empirical).abs().masked_fill(index[None, :] < starts[:, None], 0.0).amax(1)
