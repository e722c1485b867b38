"""Weighted sums of adjacent layers: the merge that CoMe (arXiv 2510.15304) compares itself with, really written."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.plan import MergePlan, PlannedLayer, depth_decisions
from compression_dags.depth.reasons import by_grouping
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.depth.windows import (
    cheapest_groups,
    influence_shares,
    joinable,
    refuse_more,
    window_distance,
)
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import number
from compression_dags.similarity.evidence import Evidence


class WeightedSum(MergeStage):
    """Replace groups of adjacent layers by one layer, each tensor the share-weighted sum of the members' tensors.

    Groups are contiguous and leave the wanted number of layers. Of all ways to cut the stack so, the one with the least
    total angular distance between group entries and exits is taken (dynamic programming, exact; CoMe's SBI
    chooses pairs greedily). Shares: BI_l^p / Σ BI^p over the members, CoMe's prior with p = `power`. Layers of
    different kinds (sliding and full attention, dense and experts) are never merged.
    """

    version: ClassVar[str] = "2"
    needs: ClassVar[tuple[str, ...]] = ("block_influence", "angular")
    method: Literal["weighted-sum"] = "weighted-sum"
    power: float = Field(
        1.0, ge=0, le=16, description="exponent p of block influence in the shares; 0 gives plain means"
    )
    largest_group: int = Field(4, ge=2, description="most layers merged into one")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        refuse_more(self, shape, self.largest_group)

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        groups = self._groups(shape, evidence.angular)
        planned = tuple(PlannedLayer(tuple(g), self._shares(g, evidence.block_influence)) for g in groups)
        plan = MergePlan(self.method, shape.layers, planned)
        distance = {i: float(evidence.angular[g[0], g[-1] + 1]) for g in groups for i in g if len(g) > 1}
        scores = [distance.get(i) for i in range(shape.layers)]
        share = {i: s for layer in planned for i, s in zip(layer.sources, layer.shares, strict=True)}

        def merged(index: int, group: range) -> str:
            return f"merged into layer {group.start} at share {number(share[index])}"

        may_join = joinable(shape, self.free_layers(shape.layers))
        reasons = by_grouping(self, groups, evidence.angular, may_join, merged)
        total = sum(distance[g.start] for g in groups if len(g) > 1)
        note = {"power": self.power, "total_distance": total}
        return plan, depth_decisions(plan, scores, "angular distance from group entry to exit", note, reasons)

    def _shares(self, group: range, influence: np.ndarray) -> tuple[float, ...]:
        return influence_shares(influence[group.start : group.stop], self.power)

    def _groups(self, shape: ModelShape, angular: np.ndarray) -> list[range]:
        total, goal = shape.layers, shape.layers - self.removed(shape.layers)
        distance = window_distance(shape, self.free_layers(total), angular)
        groups = cheapest_groups(total, goal, self.largest_group, distance)
        if groups is None:
            raise InputError(
                f"no {goal} groups of at most {self.largest_group} adjacent unprotected layers of one kind cover "
                f"{total} layers; lower the ratio or raise largest_group"
            )
        return groups
