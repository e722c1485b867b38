"""A sparsity that rises linearly with depth: s_l = S + β (l − l̄). The null model that any allocator must beat.

ATP (ICML 2025, wzhuang-xmu/ATP) tries β = 0.002, 0.004, … and keeps the one with the best perplexity on WikiText-2's
test split, which is then its result. Here candidates are scored on calibration text kept apart, by
`probe.held_out_loss`: first a coarse grid of rises β (L − 1), then golden-section steps around the best. l̄ is weighted
by parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError, IntegrityError
from compression_dags.provenance.wording import number
from compression_dags.sparsity.allocation import (
    MOST,
    UNSTRUCTURED,
    Allocated,
    AllocationProbe,
    GriddedAllocation,
    Matrix,
    SparsityEvidence,
    layer_units,
    make_plan,
    on_grid,
    per_matrix,
    shifted,
    sizes,
)

_GOLDEN = (math.sqrt(5) - 1) / 2


class Ramp(GriddedAllocation):
    """Sparsity rises linearly with depth; the slope is given (`beta`), or searched on held-out calibration text by
    pruning with each candidate."""

    method: Literal["ramp"] = "ramp"
    beta: float | None = Field(None, description="rise from one layer to the next; absent: searched")
    least_rise: float = Field(0.0, gt=-1, lt=1, description="search: least difference between last and first layer")
    most_rise: float = Field(
        0.3, gt=-1, lt=1, description="search: largest difference, if no sparsity leaves [0, 0.99]"
    )
    points: int = Field(4, ge=2, le=50, description="search: rises on the first grid, both ends included")
    refine: int = Field(3, ge=0, le=50, description="search: further rises tried around the best")

    @property
    def measures(self) -> bool:
        return self.beta is None

    def check(self, target: float) -> None:
        super().check(target)
        if self.least_rise >= self.most_rise:
            raise InputError(f"ramp: least_rise {self.least_rise} must be below most_rise {self.most_rise}")

        low, high = self._span(target)
        if self.beta is None and low >= high:
            raise InputError(
                f"ramp: no rise between {self.least_rise} and {self.most_rise} fits sparsity {target}: no layer may "
                f"leave 0 to {MOST}"
            )

    def check_model(self, target: float, shape: ModelShape) -> None:
        room, rise = 2 * min(target, MOST - target), (self.beta or 0.0) * max(1, shape.layers - 1)
        if abs(rise) > room + 1e-9:
            raise InputError(
                f"ramp: beta {self.beta:g} over {shape.layers} layers is a rise of {rise:g}; sparsity {target} leaves "
                f"room for {room:g} (beta {room / max(1, shape.layers - 1):.4g}): no layer may leave 0 to {MOST}"
            )

    def _span(self, target: float) -> tuple[float, float]:
        """Rises that are searched; beyond them some layer would leave [0, MOST] and the ramp would bend."""
        room = 2 * min(target, MOST - target)
        return max(self.least_rise, -room), min(self.most_rise, room)

    def allocate(
        self,
        matrices: Sequence[Matrix],
        target: float,
        evidence: SparsityEvidence,
        probe: AllocationProbe | None = None,
        pattern: str = UNSTRUCTURED,
    ) -> Allocated:
        self.check(target)
        steps = max(1, max(m.layer for m in matrices) - min(m.layer for m in matrices))
        if self.beta is not None:
            return self._of(matrices, target, self.beta * steps, [])
        if probe is None:
            raise InputError("ramp: searching for beta needs a model to score; give beta, or calibration text")
        losses: dict[str, float] = {}
        tried: list[dict] = []

        def score(rise: float) -> float:
            plan = make_plan(self.method, matrices, self._of(matrices, target, rise, []), target, pattern)
            if plan.digest not in losses:
                losses[plan.digest] = float(probe.held_out_loss(plan))
            tried.append({"rise": rise, "beta": rise / steps, "loss": losses[plan.digest]})
            return losses[plan.digest]

        best = search(score, *self._span(target), self.points, self.refine)
        return self._of(matrices, target, best, tried)

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        slope, tried = allocated.summary["beta"], allocated.summary["tried"]
        ramp = f"layer {matrix.layer} of a ramp of {number(slope)} a layer about {number(target)}"
        if not tried:
            return f"{ramp}, the slope that the recipe gives"
        loss = min(t["loss"] for t in tried if t["beta"] == slope)
        return f"{ramp}, the slope of least held-out loss ({number(loss)}) of {len(tried)} tried"

    def _of(self, matrices: Sequence[Matrix], target: float, rise: float, tried: list[dict]) -> Allocated:
        units = layer_units(matrices)
        depth = np.array([u.layer for u in units], dtype=np.float64)
        steps = max(1.0, float(depth.max() - depth.min()))
        shares = shifted(rise * depth / steps, sizes(units), target)
        summary = {"rise": rise, "beta": rise / steps, "tried": tried, "granularity": self.granularity}
        rows = per_matrix(units, [{"share": float(s)} for s in shares])
        return Allocated(on_grid(units, shares, target, self.granularity), rows, summary)


def search(score: Callable[[float], float], low: float, high: float, points: int, refine: int) -> float:
    """The argument with the least score among those tried: an even grid, then golden sections around its best point.

    A score that is not finite counts as the worst.

    Raises:
        IntegrityError: no score is finite.
    """
    found: dict[float, float] = {}

    def at(x: float) -> float:
        if x not in found:
            loss = score(x)
            found[x] = loss if math.isfinite(loss) else math.inf
        return found[x]

    grid = np.linspace(low, high, points).tolist()
    values = [at(x) for x in grid]
    best = int(np.argmin(values))
    if not math.isfinite(values[best]):
        raise IntegrityError("ramp: the held-out loss is not finite for any slope tried")
    left, middle, right = grid[max(0, best - 1)], grid[best], grid[min(points - 1, best + 1)]
    for _ in range(refine):
        upper = right - middle >= middle - left
        x = middle + (1 - _GOLDEN) * ((right if upper else left) - middle)
        if at(x) < at(middle):
            left, middle, right = (middle, x, right) if upper else (left, x, middle)
        else:
            left, right = (left, x) if upper else (x, right)
    return min(found, key=lambda x: (found[x], x))
