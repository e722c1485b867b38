"""The same sparsity everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from compression_dags.provenance.wording import number
from compression_dags.sparsity.allocation import (
    UNSTRUCTURED,
    Allocated,
    Allocation,
    AllocationProbe,
    Matrix,
    SparsityEvidence,
    check_target,
)


class Uniform(Allocation):
    """Every matrix gets the target."""

    method: Literal["uniform"] = "uniform"

    def allocate(
        self,
        matrices: Sequence[Matrix],
        target: float,
        evidence: SparsityEvidence,
        probe: AllocationProbe | None = None,
        pattern: str = UNSTRUCTURED,
    ) -> Allocated:
        check_target(target)
        return Allocated({m.name: target for m in matrices})

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        return f"the uniform allocation gives every matrix the target, {number(target)}"
