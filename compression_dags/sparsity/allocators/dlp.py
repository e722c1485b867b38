"""DLP (ICML 2025, code ironartisan/DLP): layers with a smaller mean |W|·‖x‖ than the others keep more.

o_l: mean of |W_ij| · ‖x_j‖ over a layer. Relative importance 1 − o_l / Σ o. Densities: 2α (imp − min) / (max − min),
shifted so that their mean is 1 − S. (The paper speaks of medians; the released unstructured path, `lib/prune.py`, takes
means, as here.) For clipping and the parameter-weighted shift see `density.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compression_dags.errors import InputError
from compression_dags.provenance.wording import counted, number, ranked
from compression_dags.sparsity.allocation import Allocated, AllocationProbe, Matrix, SparsityEvidence, Unit, place_among
from compression_dags.sparsity.allocators.density import DensityAllocation
from compression_dags.stage import implementation


class DLP(DensityAllocation):
    """Dynamic layer-wise pruning: layers with a larger mean |W|·‖x‖ than others keep less, within ± `spread`."""

    implementation: ClassVar[str] = "compression_dags.sparsity.allocators.scores:mean_score"
    method: Literal["dlp"] = "dlp"
    spread: float = Field(0.15, gt=0, lt=0.5, description="α: densities span 2α before clipping")

    def scores(
        self, units: Sequence[Unit], evidence: SparsityEvidence, probe: AllocationProbe
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        mean = np.array([implementation(self)(u, evidence, probe) for u in units])
        if mean.sum() <= 0:
            raise InputError("dlp: all weights or all activations are 0; no layer is more important than another")
        importance = 1 - mean / mean.sum()
        rows = [
            {"mean_score": float(o), "relative_importance": float(i)} for o, i in zip(mean, importance, strict=True)
        ]
        return importance, rows

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        mean = number(allocated.evidence[matrix.name]["mean_score"])
        place, of = place_among(allocated, matrix.name, "mean_score")
        return (
            f"its layer's mean |W|·‖x‖, {mean}, is {ranked(place, 'largest')} of {counted(of, 'layer')}, and a larger "
            f"one keeps less (± {number(self.spread)} about {number(target)})"
        )
