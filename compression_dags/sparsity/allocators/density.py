"""Allocators that score every layer: its density rises with the score, from the least to the largest by 2 · spread.

Densities are shifted so that their mean over parameters is 1 − S, which makes the target exact where layers differ in
size. Sparsities are clipped to [0, 0.99], and the rest shares what that costs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

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
    shifted,
    sizes,
)

INSIDE_EXPERTS = (
    "inputs of the experts' down projections are not recorded by the calibration pass; the scores leave those out"
)


class DensityAllocation(GriddedAllocation):
    """An allocator by a score of |W|·‖x‖ a layer; norms ‖x‖ come from the dense model."""

    reads_statistics = True

    spread: float = Field(gt=0, lt=0.5, description="half of what densities span before clipping")

    @property
    def reads_weights(self) -> bool:
        return True

    @abstractmethod
    def scores(
        self, units: Sequence[Unit], evidence: SparsityEvidence, probe: AllocationProbe
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """(n,) score of every layer, and what the ledger says of each."""

    def allocate(
        self,
        matrices: Sequence[Matrix],
        target: float,
        evidence: SparsityEvidence,
        probe: AllocationProbe | None = None,
        pattern: str = UNSTRUCTURED,
    ) -> Allocated:
        check_target(target)
        units = layer_units(matrices)
        score, rows = self.scores(units, evidence, need_probe(probe, self.method))
        notes = []
        if any(evidence.channel_norms(m) is None for u in units for m in u.matrices):
            notes.append(INSIDE_EXPERTS)
        width = score.max() - score.min()
        density = 2 * self.spread * (score - score.min()) / width if width > 0 else np.zeros_like(score)
        if width <= 0:
            notes.append("all layers score alike: allocation forced uniform")
        shares = shifted(-density, sizes(units), target)
        rows = [{**row, "share": float(s)} for row, s in zip(rows, shares, strict=True)]
        summary = {"spread": self.spread, "granularity": self.granularity}
        sparsity = on_grid(units, shares, target, self.granularity)
        return Allocated(sparsity, per_matrix(units, rows), summary, tuple(notes))
