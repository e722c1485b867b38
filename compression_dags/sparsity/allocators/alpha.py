"""AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912): layers with heavier-tailed spectra keep more. Data-free.

The eigenvalues λ of WᵀW are fitted by a power law p(λ) ∝ λ^−α above some λ_min; a small α is a heavy tail. The exponent
is Hill's: α = 1 + n / Σ_{λ_j ≥ λ_min} log(λ_j / λ_min). α, averaged over a decoder layer, is mapped linearly to
[1 − ε, 1 + ε] and scaled so that the mean over parameters is the target.

As in the released code (`lib/esd_utils.py`, haiquanlu/AlphaPruning): `peak` tries every λ_min up to 1.5 times the peak
of the histogram of log10 λ (100 bins) and takes the one with the least Kolmogorov-Smirnov distance. Its lower limit is
log10(0.95 · peak) compared with λ itself, not with log10 λ, so it rarely excludes any. `mid` takes the middle one.
Different here: no sparsity exceeds 0.99 (the released scaling can pass 1; what is cut off is shared by the rest).
Eigenvalues are found in float64. Those below 1e-12 of the largest are left out (their logarithm is rounding, or −∞).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

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
    need_probe,
    on_grid,
    per_matrix,
    place_among,
    sizes,
)
from compression_dags.sparsity.knapsack import scaled_to
from compression_dags.stage import implementation


class Alpha(GriddedAllocation):
    """AlphaPruning: sparsity rises with the power-law exponent of the weights' spectra; no data needed."""

    implementation: ClassVar[str] = "compression_dags.sparsity.allocators.spectra:exponent"
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
        probe = need_probe(probe, self.method)
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
        found = implementation(self)(probe.weights(matrix.name), self.fit)
        if not np.isfinite(found):
            raise IntegrityError(f"{matrix.name}: its spectrum has no power-law exponent (a zero or non-finite matrix)")
        return found
