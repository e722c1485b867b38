"""MKA as its paper describes it (Liu et al., EMNLP 2024)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.mka.released import similarity_table
from compression_dags.depth.plan import MergePlan, PlannedLayer, depth_decisions
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import apart, layers_said, number
from compression_dags.similarity.evidence import Evidence
from compression_dags.similarity.merge_tree import Merge, merge_tree

TABLES = {"binned": "npib", "ksg": "npib_ksg", "gaussian-copula": "npib_gaussian_copula"}


class MKAPaper(MergeStage):
    """Merge the most similar adjacent layers, θ = α θ_l + (1 − α) θ_m with α = S_lm, K times.

    Source: Liu et al., "Pruning via Merging" (EMNLP 2024), from its abstract and secondary quotations. S is the
    Normalized Pairwise Information Bottleneck of the layers' outputs over all sampled tokens, clipped to [0, 1]. Of all
    unprotected neighbours behind the early barrier the pair of largest S is merged, of equal ones the rear. A merged
    group's S to its neighbours is the mean over its members. Unlike the released code, which does none of this
    (`mka-released`), similarity chooses the layers, and every tensor is merged and written, norms too. Layers of
    different kinds (sliding and full attention, dense and experts) are never merged.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[tuple[str, ...]] = ("npib",)
    method: Literal["mka-paper"] = "mka-paper"
    barrier: float = Field(0.25, ge=0, lt=1, description="first share of the layers, never merged")
    estimator: Literal["binned", "ksg", "gaussian-copula"] = Field("binned", description="how S is estimated")

    def region(self, total: int) -> range:
        """Layers that may be merged."""
        free = self.free_layers(total)
        return range(max(free.start, math.ceil(self.barrier * total - 1e-9)), free.stop)

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        count, region = self.removed(shape.layers), self.region(shape.layers)
        pairs = [i for i in region[:-1] if shape.kind(i) == shape.kind(i + 1)]
        if count > len(pairs):
            raise InputError(
                f"{self.method} cannot merge {count} of {shape.layers} layers away: {len(region)} are unprotected and "
                f"behind the barrier ({self.barrier:g}), {len(pairs)} pairs of one kind; lower the ratio or barrier"
            )

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        self.check(shape)
        table = TABLES[self.estimator]
        similarity = similarity_table(evidence, table, shape.layers)
        bounds = [evidence.similarity.get(f"{table}_{side}") for side in ("low", "high")]
        region = self.region(shape.layers)

        def allowed(first: range, second: range) -> bool:
            inside = first.start in region and second[-1] in region
            return inside and shape.kind(first.start) == shape.kind(second.start)

        merges = merge_tree(similarity, *bounds, allowed=allowed, count=self.removed(shape.layers))
        # by the first layer of a group
        shares: dict[int, tuple[float, ...]] = dict.fromkeys(range(shape.layers), (1.0,))
        for merge in merges:
            alpha, first, second = share_of(merge), shares[merge.first.start], shares.pop(merge.second.start)
            shares[merge.first.start] = (*(alpha * s for s in first), *((1 - alpha) * s for s in second))
        planned = (PlannedLayer(tuple(range(i, i + len(s))), s) for i, s in sorted(shares.items()))
        plan = MergePlan(self.method, shape.layers, tuple(planned))
        return plan, self._decisions(shape, plan, merges, similarity, evidence, bounds[0] is not None)

    def _decisions(
        self,
        shape: ModelShape,
        plan: MergePlan,
        merges: list[Merge],
        similarity: np.ndarray,
        evidence: Evidence,
        intervals: bool,
    ) -> list[Decision]:
        """One row a layer; the first layer of each group that is merged into the one before it carries the record."""
        scores: list[float | None] = [*map(float, np.diagonal(similarity, 1)), None]
        notes: dict[int, dict[str, Any]] = {}
        for order, merge in enumerate(merges):
            scores[merge.second.start] = merge.value
            notes[merge.second.start] = {
                "merge": order + 1,
                "pair": [list(merge.first), list(merge.second)],
                "S": merge.value,
                "lambda": share_of(merge),
                "tensors": {"merged": "all, norms too", "kept": []},
                **({"low": merge.low, "high": merge.high, "overlaps": merge.overlaps} if intervals else {}),
            }
        note = {"estimator": self.estimator, "barrier": self.barrier, **_sizes(evidence)}
        for i in range(plan.base_layers):
            if found := _merge_of(merges, i):
                scores[i] = found[1].value
        unit = "S of the merge that joined it to the layer before, or to the next; if kept, with the next layer"
        reasons = [self._reason(i, shape, plan, merges, similarity) for i in range(plan.base_layers)]
        rows = depth_decisions(plan, scores, unit, note, reasons)
        sigma = evidence.similarity.get("npib_sigma")
        for i, row in enumerate(rows):
            extra: dict[str, Any] = {"sigma": float(sigma[i])} if sigma is not None else {}
            if (found := _merge_of(merges, i)) and i not in notes:
                extra["merged_by"] = {"merge": found[0], "S": found[1].value}
            rows[i] = replace(row, evidence={**row.evidence, **extra, **notes.get(i, {})})
        return rows

    def _reason(
        self, index: int, shape: ModelShape, plan: MergePlan, merges: list[Merge], similarity: np.ndarray
    ) -> str:
        region = self.region(shape.layers)
        if why := self.protection(index, shape.layers):
            return why
        if index not in region:
            return (
                f"protected: before the barrier, layer {region.start} ({number(self.barrier)} of {shape.layers} layers)"
            )
        if found := _merge_of(merges, index):
            order, merge = found
            home = next(layer for layer in plan.layers if index in layer.sources)
            share = number(home.shares[home.sources.index(index)])
            pair = f"{layers_said(merge.first)} and {layers_said(merge.second)}"
            return (
                f"merged into layer {home.slot} at share {share}: S {number(merge.value)} between {pair} was the "
                f"highest allowed in round {order}"
            )
        # a layer alone at the end was alone in the last round: what its pairs had then is what lost
        last = merges[-1]
        beside = [g for g in _groups_before(last, plan) if g.stop == index or g.start == index + 1]
        allowed = [g for g in beside if g.start in region and g[-1] in region]
        pairs = [(float(similarity[index, g.start : g.stop].mean()), g) for g in allowed if _alike(shape, index, g)]
        if not pairs:
            return "kept: no neighbour of its kind is free to be merged with it"
        value, group = max(pairs, key=lambda pair: pair[0])
        own, best = apart(value, last.value)
        return (
            f"kept: its S with {layers_said(group)}, {own}, was not the highest in the last round, where "
            f"{layers_said(last.first)} and {layers_said(last.second)} had {best}"
        )


def _merge_of(merges: list[Merge], layer: int) -> tuple[int, Merge] | None:
    """The merge that joined a layer to the one before it, with its number from 1; of the first layer of a group the
    first merge that it took part in."""
    joins = ((n, m) for n, m in enumerate(merges, 1) if m.second.start == layer)
    takes_part = ((n, m) for n, m in enumerate(merges, 1) if layer in m.first)
    return next(joins, None) or next(takes_part, None)


def _groups_before(merge: Merge, plan: MergePlan) -> list[range]:
    """Groups of original layers as they were before the last merge."""
    after = [range(x.sources[0], x.sources[-1] + 1) for x in plan.layers]
    return [part for g in after for part in ((merge.first, merge.second) if merge.first.start == g.start else (g,))]


def _alike(shape: ModelShape, layer: int, group: range) -> bool:
    return shape.kind(layer) == shape.kind(group.start)


def share_of(merge: Merge) -> float:
    """α = clip(S, 0, 1), the share of the front group."""
    return min(max(merge.value, 0.0), 1.0)


def _sizes(evidence: Evidence) -> dict[str, int]:
    names = {"tokens": "npib_samples", "bins": "npib_bins"}
    return {k: int(evidence.similarity[v][0]) for k, v in names.items() if v in evidence.similarity}
