"""OWL (Yin et al., ICML 2024, arXiv 2310.05175): layers with more outliers keep more.

Score of a weight: |W_ij| · ‖x_j‖. Outlier ratio o_l: percent of a layer's scores above M times their mean. Densities:
d_l = 2λ (o_l − min o) / (max o − min o), shifted so that their mean is 1 − S.

Differences from the released code (`lib/prune_all.py`): its mean is over layers, whatever their size, so the target is
missed where layers differ; here the shift makes the mean over parameters exact. Nothing there keeps a sparsity inside
[0, 1); here it is clipped to [0, 0.99] and the rest shares what that costs. Norms come from the dense model, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from compression_dags.provenance.wording import number, ranked
from compression_dags.sparsity.allocation import (
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
    shifted,
    sizes,
)
from compression_dags.stage import implementation

INSIDE_EXPERTS = (
    "inputs of the experts' down projections are not recorded by the calibration pass; the scores leave those out"
)


class OWL(GriddedAllocation):
    """Outlier-weighed layer-wise sparsity: layers with a larger share of |W|·‖x‖ above `threshold` × its mean keep
    more, within ± `spread`."""

    reads_statistics = True

    implementation: ClassVar[str] = "compression_dags.sparsity.allocators.scores:outlier_ratio"
    method: Literal["owl"] = "owl"
    threshold: float = Field(5.0, gt=0, description="M: an outlier exceeds this multiple of the layer's mean score")
    spread: float = Field(0.08, gt=0, lt=0.5, description="λ: densities span 2λ before clipping")

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
        units, probe = layer_units(matrices), need_probe(probe, self.method)
        ratios = np.array([implementation(self)(u, evidence, probe, self.threshold) for u in units])
        rows = [{"outlier_percent": float(r)} for r in ratios]
        return by_density_score(units, ratios, self.spread, target, self.granularity, rows, evidence)

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        percent = number(allocated.evidence[matrix.name]["outlier_percent"])
        place, of = place_among(allocated, matrix.name, "outlier_percent")
        return (
            f"{percent} % of its layer's weights are outliers, {ranked(place, 'largest')} share of {of} layers, "
            f"and more outliers keep more (± {number(self.spread)} about {number(target)})"
        )


def by_density_score(
    units: list[Unit],
    score: np.ndarray,
    spread: float,
    target: float,
    granularity: float,
    rows: list[dict],
    evidence: SparsityEvidence,
) -> Allocated:
    """Densities that rise with a score from the least to the largest by 2 · `spread`, about the target."""
    notes = []
    if any(evidence.channel_norms(m) is None for u in units for m in u.matrices):
        notes.append(INSIDE_EXPERTS)
    width = score.max() - score.min()
    density = 2 * spread * (score - score.min()) / width if width > 0 else np.zeros_like(score)
    if width <= 0:
        notes.append("all layers score alike: allocation forced uniform")
    shares = shifted(-density, sizes(units), target)
    rows = [{**row, "share": float(s)} for row, s in zip(rows, shares, strict=True)]
    summary = {"spread": spread, "granularity": granularity}
    return Allocated(on_grid(units, shares, target, granularity), per_matrix(units, rows), summary, tuple(notes))
