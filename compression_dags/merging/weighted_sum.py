"""Weighted sums of adjacent layers: the merge that CoMe (arXiv 2510.15304) compares itself with, really written."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from compression_dags.architectures import StackFacts
from compression_dags.errors import InputError
from compression_dags.merging.plan import Bench, Evidence, MergePlan, MergeStage, PlannedLayer, depth_decisions
from compression_dags.provenance.decisions import Decision


class WeightedSum(MergeStage):
    """Replace groups of adjacent layers by one layer, each tensor the share-weighted sum of the members' tensors.

    Groups: of all ways to cut the stack into contiguous groups that leave the wanted number of layers, the one with the
    smallest total angular distance between group entries and exits (dynamic programming, exact; CoMe's SBI chooses
    pairs greedily). Shares: BI_l^p / Σ BI^p over the members, CoMe's prior with p = `power`. Layers of different kinds
    (sliding and full attention, dense and experts) are never merged.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[tuple[str, ...]] = ("block_influence", "angular")
    method: Literal["weighted-sum"] = "weighted-sum"
    power: float = Field(1.0, ge=0, description="exponent p of block influence in the shares; 0 gives plain means")
    largest_group: int = Field(4, ge=2, description="most layers merged into one")

    def plan(
        self, facts: StackFacts, evidence: Evidence, bench: Bench | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        groups = self._groups(facts, evidence.angular)
        planned = tuple(PlannedLayer(tuple(g), self._shares(g, evidence.block_influence)) for g in groups)
        plan = MergePlan(self.method, facts.layers, planned)
        distance = {i: float(evidence.angular[g[0], g[-1] + 1]) for g in groups for i in g if len(g) > 1}
        scores = [distance.get(i) for i in range(facts.layers)]
        return plan, depth_decisions(plan, scores, "angular distance from group entry to exit", {"power": self.power})

    def _shares(self, group: range, influence: np.ndarray) -> tuple[float, ...]:
        weight = np.maximum(influence[group.start : group.stop], 1e-12) ** self.power
        share = weight / weight.sum()
        return (*map(float, share[:-1]), float(1.0 - share[:-1].sum()))

    def _groups(self, facts: StackFacts, angular: np.ndarray) -> list[range]:
        total, goal = facts.layers, facts.layers - self.removed(facts.layers)
        best = np.full((goal + 1, total + 1), np.inf)
        cut = np.zeros((goal + 1, total + 1), dtype=int)
        best[0, 0] = 0.0
        for count in range(1, goal + 1):
            for end in range(1, total + 1):
                for start in range(max(0, end - self.largest_group), end):
                    cost = best[count - 1, start] + self._cost(facts, angular, range(start, end))
                    if cost < best[count, end]:
                        best[count, end], cut[count, end] = cost, start
        if not np.isfinite(best[goal, total]):
            raise InputError(
                f"no {goal} groups of at most {self.largest_group} adjacent unprotected layers of one kind cover "
                f"{total} layers; lower the ratio or raise largest_group"
            )
        groups, end = [], total
        for count in range(goal, 0, -1):
            groups.append(range(cut[count, end], end))
            end = cut[count, end]
        return groups[::-1]

    def _cost(self, facts: StackFacts, angular: np.ndarray, group: range) -> float:
        if len(group) == 1:
            return 0.0
        free = self.free_layers(facts.layers)
        if group.start < free.start or group.stop > free.stop or len({facts.kind(i) for i in group}) > 1:
            return np.inf
        return float(angular[group.start, group.stop])
