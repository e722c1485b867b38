"""OWL (Yin et al., ICML 2024, arXiv 2310.05175): layers with more outliers keep more.

Score of a weight: |W_ij| · ‖x_j‖. Outlier ratio o_l: percent of a layer's scores above M times their mean. Densities:
d_l = 2λ (o_l − min o) / (max o − min o), shifted so that their mean is 1 − S.

Differences from the released code (`lib/prune_all.py`): its mean is over layers, whatever their size, so the target is
missed where layers differ. Here the shift makes the mean over parameters exact. Nothing there keeps a sparsity inside
[0, 1); here it is clipped (`density.py`). Norms come from the dense model, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compression_dags.provenance.wording import number, ranked
from compression_dags.sparsity.allocation import Allocated, AllocationProbe, Matrix, SparsityEvidence, Unit, place_among
from compression_dags.sparsity.allocators.density import DensityAllocation
from compression_dags.stage import implementation


class OWL(DensityAllocation):
    """Outlier-weighed layer-wise sparsity: layers with a larger share of |W|·‖x‖ above `threshold` × its mean keep
    more, within ± `spread`."""

    implementation: ClassVar[str] = "compression_dags.sparsity.allocators.scores:outlier_ratio"
    method: Literal["owl"] = "owl"
    threshold: float = Field(5.0, gt=0, description="M: an outlier exceeds this multiple of the layer's mean score")
    spread: float = Field(0.08, gt=0, lt=0.5, description="λ: densities span 2λ before clipping")

    def scores(
        self, units: Sequence[Unit], evidence: SparsityEvidence, probe: AllocationProbe
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        ratios = np.array([implementation(self)(u, evidence, probe, self.threshold) for u in units])
        return ratios, [{"outlier_percent": float(r)} for r in ratios]

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        percent = number(allocated.evidence[matrix.name]["outlier_percent"])
        place, of = place_among(allocated, matrix.name, "outlier_percent")
        return (
            f"{percent} % of its layer's weights are outliers, {ranked(place, 'largest')} share of {of} layers, "
            f"and more outliers keep more (± {number(self.spread)} about {number(target)})"
        )
