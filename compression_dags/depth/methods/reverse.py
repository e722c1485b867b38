"""Reverse pruning: remove the last layers first. The floor of every comparison (MKA's released code equals it)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.plan import MergePlan, depth_decisions, keep_only
from compression_dags.depth.reasons import from_the_end
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.provenance.decisions import Decision
from compression_dags.similarity.evidence import Evidence


class Reverse(MergeStage):
    """Drop the last layers, nearest the output first; needs no data.

    Source: "reverse-order" in Men et al. 2024 and Lu et al. 2024 (arXiv 2411.15558). The method is the removal of the
    tail, so the last layer is not protected by default.
    """

    version: ClassVar[str] = "1"
    method: Literal["reverse"] = "reverse"
    protect_last: int = Field(0, ge=0, description="last layers never touched")

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        free = self.free_layers(shape.layers)
        gone = free[len(free) - self.removed(shape.layers) :]
        plan = keep_only(self.method, shape.layers, [i for i in range(shape.layers) if i not in gone])
        depth = [float(shape.layers - 1 - i) for i in range(shape.layers)]
        reasons = from_the_end(self, shape.layers, gone, "reverse order")
        return plan, depth_decisions(plan, depth, "layers from the output", {}, reasons)
