"""MKA as its public repository has it (SempraETY/Pruning-via-Merging): what it writes, and what it computes.

The repository pairs the last two layers K times with weights λ = σ(s_i / (s_i + s_j)), s the row means of its
similarity. It assigns each fused tensor into the dict that a fresh `state_dict()` call returned. The model never sees
it. So there are two methods: `mka-released` is what comes out, `mka-code-fixed-write` the same steps, stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.plan import MergePlan, PlannedLayer, depth_decisions, keep_only
from compression_dags.depth.reasons import from_the_end
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import layers_said, number
from compression_dags.similarity.evidence import Evidence

KERNEL = {"estimator": "ksg", "sigma": 8.0, "tokens": "first 57 of sequence 0", "states": "layer inputs"}


def released_lambdas(similarity: np.ndarray, last: int, count: int) -> list[float]:
    """λ of the code's steps k = 1 … K, pair (i, j) = (last − k, last − k + 1): share of layer i.

    λ = σ(s_i / (s_i + s_j)), s_i = mean_m S_im with S_ii included; S is never computed again. As s_i ≈ s_j between
    neighbours, λ ≈ σ(½) = 0.6225.

    Args:
        similarity: (L, L).
    """
    means = similarity.mean(axis=1)
    found = []
    for j in range(last, last - count, -1):
        share = means[j - 1] / (means[j - 1] + means[j])
        found.append(float(1 / (1 + np.exp(-share))))
    return found


def chained_shares(lambdas: Sequence[float]) -> tuple[float, ...]:
    """Shares of the K + 1 layers in the one that K steps leave, front first: λ_K, (1 − λ_K) λ_{K−1}, …, Π (1 − λ_k)."""
    shares: tuple[float, ...] = (1.0,)
    for value in lambdas:
        shares = (value, *((1 - value) * s for s in shares))
    return (*shares[:-1], 1.0 - math.fsum(shares[:-1]))


class MKAReleased(MergeStage):
    """Drop the last K layers: what MKA's public code really outputs, and nothing else.

    Source: Liu et al., "Pruning via Merging" (EMNLP 2024), and its repository SempraETY/Pruning-via-Merging, which
    assigns the fused tensors into a throw-away `state_dict()`. The model equals that of `reverse`, byte for byte; the
    ledger records the λ and the similarity that the code computes on the way. The first layer is protected here.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[tuple[str, ...]] = ("npib",)
    method: Literal["mka-released"] = "mka-released"
    protect_last: int = Field(0, ge=0, description="last layers never touched (the released code protects none)")

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        free = self.free_layers(shape.layers)
        gone = free[len(free) - self.removed(shape.layers) :]
        plan = keep_only(self.method, shape.layers, [i for i in range(shape.layers) if i not in gone])
        scores: list[float | None] = [None] * shape.layers
        notes: dict[int, dict[str, Any]] = {}
        if "npib_released" in evidence.similarity:  # it decides nothing, so the method does without
            table = similarity_table(evidence, "npib_released", shape.layers)
            steps = len(gone) - (gone.start == 0)  # the first layer of all has none before it
            for step, value in enumerate(released_lambdas(table, gone[-1], steps)):
                scores[gone[-1] - step] = value
                notes[gone[-1] - step] = _pair(table, gone[-1] - step - 1, gone[-1] - step)
        reasons = from_the_end(self, shape.layers, gone, "the released code")
        said = ["" if s is None else f"; λ {number(s)} before it is computed and not written" for s in scores]
        reasons = [reason + more for reason, more in zip(reasons, said, strict=True)]
        unit = "λ of the layer before, computed and not written"
        rows = depth_decisions(plan, scores, unit, {"written": False}, reasons)
        return plan, [replace(row, evidence={**row.evidence, **notes.get(i, {})}) for i, row in enumerate(rows)]


class MKACodeFixedWrite(MergeStage):
    """The steps of MKA's public code with the merged weights really written.

    Source: the repository SempraETY/Pruning-via-Merging of Liu et al. 2024. Always the last two layers, K times,
    whatever the similarity says. That only sets λ = σ(s_i / (s_i + s_j)) ≈ 0.62, from the released kernel (57 token
    positions of one sequence, σ = 8, KSG) on the inputs of every layer. The K steps are one weighted sum, with shares
    λ_K, (1 − λ_K) λ_{K−1}, …: the third layer already counts for less than a tenth. Projection weights are summed;
    norms, biases and experts are the surviving layer's. For comparison with published logs, though calibrated on the
    recipe's corpus instead of MMLU's test questions, and rounded once instead of at every step.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[tuple[str, ...]] = ("npib",)
    method: Literal["mka-code-fixed-write"] = "mka-code-fixed-write"
    protect_last: int = Field(0, ge=0, description="last layers never touched (the released code protects none)")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        count, free = self.removed(shape.layers), self.free_layers(shape.layers)
        if count >= len(free):
            raise InputError(
                f"{self.method} merges {count + 1} layers into one, but only {len(free)} of {shape.layers} are free "
                f"(protect_first {self.protect_first}, protect_last {self.protect_last}); lower the ratio"
            )
        _refuse_opaque(self.method, shape)
        group = self._group(shape.layers)
        kinds = {i: "/".join(shape.kind(i)) for i in group}
        if odd := [i for i in group if kinds[i] != kinds[group[-1]]]:
            raise InputError(
                f"{self.method} would merge layers {group[0]} to {group[-1]}, of different kinds: {odd[-1]} is "
                f"{kinds[odd[-1]]}, {group[-1]} is {kinds[group[-1]]}; lower the ratio, or use mka-paper"
            )

    def _group(self, total: int) -> range:
        free = self.free_layers(total)
        return free[len(free) - self.removed(total) - 1 :]

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        self.check(shape)
        similarity, group = similarity_table(evidence, "npib_released", shape.layers), self._group(shape.layers)
        lambdas = released_lambdas(similarity, group[-1], len(group) - 1)
        merged = PlannedLayer(tuple(group), chained_shares(lambdas), "projections")
        layers = [merged if i == group.start else PlannedLayer((i,)) for i in range(shape.layers) if i not in group[1:]]
        plan = MergePlan(self.method, shape.layers, tuple(layers))
        scores: list[float | None] = [None] * shape.layers
        notes: dict[int, dict[str, Any]] = {}
        for step, value in enumerate(lambdas):
            j = group[-1] - step
            scores[j] = value
            notes[j] = {"merge": step + 1, **_pair(similarity, j - 1, j)}
        weights = {
            "merged": [f"{p}.weight" for p in shape.architecture.projections()],
            "kept": [*shape.architecture.norms, "biases", *(["experts"] if shape.architecture.experts else [])],
        }
        reasons = [self._reason(i, shape.layers, merged, scores[i]) for i in range(shape.layers)]
        rows = depth_decisions(plan, scores, "λ of the layer before", {}, reasons)
        for i in group:
            notes[i] = {**notes.get(i, {}), "tensors": weights}
        return plan, [replace(row, evidence={**row.evidence, **notes.get(i, {})}) for i, row in enumerate(rows)]

    def _reason(self, index: int, total: int, merged: PlannedLayer, before: float | None) -> str:
        """Args: before: λ of the layer before."""
        if why := self.protection(index, total):
            return why
        group = layers_said(merged.sources)
        if index not in merged.sources:
            return f"kept: the released code always merges the last layers, here only {group}"
        share = number(merged.shares[merged.sources.index(index)])
        step = f" (λ of layer {index - 1}: {number(before)})" if before is not None else ""
        return (
            f"merged into layer {merged.slot} at share {share}{step}: the released code always merges the last layers, "
            f"here {group}"
        )


def _pair(similarity: np.ndarray, i: int, j: int) -> dict[str, Any]:
    means = similarity[[i, j]].mean(axis=1)
    return {"pair": [i, j], "S": float(similarity[i, j]), "row_means": means.tolist(), **KERNEL}


def similarity_table(evidence: Evidence, name: str, layers: int) -> np.ndarray:
    """A similarity array (L, L) of the evidence.

    Raises:
        InputError: the analysis could not compute it, or it is for another number of layers.
    """
    table = evidence.similarity.get(name)
    if table is None:
        raise InputError(
            f"similarity_npib holds no {name} for this model and calibration (its metadata says why): use longer "
            "sequences (57 tokens or more), or a method that reads `npib` itself, such as mka-paper"
        )
    if table.shape != (layers, layers):
        raise InputError(f"{name} is {table.shape}, but the model has {layers} layers")
    return table


def _refuse_opaque(method: str, shape: ModelShape) -> None:
    """Raise InputError where a layer has matrices that are no projections: the code would keep them as they are."""
    architecture = shape.architecture
    if architecture.kinds and (left := architecture.opaque or [p for k in architecture.kinds for p in k.experts]):
        raise InputError(
            f"{method} averages linear projections alone, and {architecture.model_type} has other matrices "
            f"({left[0]}); use mka-paper or laco, which average all tensors"
        )
