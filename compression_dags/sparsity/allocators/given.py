"""Sparsities that were decided elsewhere: by the budget planner, or by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError
from compression_dags.provenance.wording import number
from compression_dags.sparsity.allocation import (
    UNSTRUCTURED,
    Allocated,
    AllocationProbe,
    GriddedAllocation,
    Matrix,
    SparsityEvidence,
    check_target,
    layer_units,
    on_grid,
    per_matrix,
    sizes,
)

#: By how much the mean of what is given may miss the target.
NEAR = 0.005


class Given(GriddedAllocation):
    """Every layer gets the sparsity that is written down for it, and those that are not named get none."""

    method: Literal["given"] = "given"
    layers: dict[int, float] = Field(min_length=1, description="layer → sparsity; the others keep all weights")

    def check(self, target: float) -> None:
        check_target(target)
        for layer, share in self.layers.items():
            if layer < 0 or not 0 <= share < 1:
                raise InputError(f"given: layer {layer}: {share:g}: layers count from 0, and shares lie in [0, 1)")

    def check_model(self, target: float, shape: ModelShape) -> None:
        if missing := sorted(layer for layer in self.layers if layer >= shape.layers):
            raise InputError(f"given: there is no layer {missing[0]}; the model has {shape.layers}")
        if len({shape.kind(i) for i in range(shape.layers)}) > 1:
            return  # layers of several sizes are weighed when they are read
        mean = sum(self.layers.values()) / shape.layers
        if abs(mean - target) > NEAR:
            raise InputError(f"given: the layers' sparsities come to {mean:.4f} of the weights, not to {target:g}")

    def allocate(
        self,
        matrices: Sequence[Matrix],
        target: float,
        evidence: SparsityEvidence,
        probe: AllocationProbe | None = None,
        pattern: str = UNSTRUCTURED,
    ) -> Allocated:
        units = layer_units(matrices)
        for layer, share in self.layers.items():
            check_target(share)
            if layer not in {u.layer for u in units}:
                raise InputError(f"given: there is no layer {layer}; the model has {len(units)}")
        shares = np.array([self.layers.get(u.layer, 0.0) for u in units])
        mean = float(shares @ sizes(units) / sizes(units).sum())
        if abs(mean - target) > NEAR:
            raise InputError(f"given: the layers' sparsities come to {mean:.4f} of the weights, not to {target:g}")
        rows = per_matrix(units, [{"share": float(s)} for s in shares])
        return Allocated(on_grid(units, shares, mean, self.granularity), rows, {"mean": mean})

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        if matrix.layer not in self.layers:
            return f"the recipe names no sparsity for layer {matrix.layer}, and such layers keep all weights"
        return f"the recipe gives layer {matrix.layer} a sparsity of {number(self.layers[matrix.layer])}"
