"""A depth plan that was decided elsewhere: by the budget planner, or by hand."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.architectures import ModelShape
from compression_dags.depth.plan import MergePlan, PlannedLayer, depth_decisions
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import layers_said, number
from compression_dags.similarity.evidence import Evidence


class Planned(MergeStage):
    """Drop the named layers, and replace the named pairs of neighbours by their mean."""

    version: ClassVar[str] = "1"
    method: Literal["planned"] = "planned"
    drop: tuple[int, ...] = Field((), description="layers that go, counted from 0")
    fuse: tuple[tuple[int, int], ...] = Field((), description="pairs (i, i + 1) that become their mean")
    costs: dict[int, float] = Field({}, description="why: predicted KL (nats a token), by first layer")
    protect_first: int = Field(0, ge=0, description="first layers never touched")
    protect_last: int = Field(0, ge=0, description="last layers never touched")

    @model_validator(mode="after")
    def _one_target(self) -> Planned:
        if self.ratio is not None or self.layers is not None:
            raise InputError("planned: drop and fuse say which layers go; ratio and layers cannot be given")
        if not (self.drop or self.fuse):
            raise InputError("planned: give layers to drop, or pairs to fuse")
        named = [*self.drop, *(i for pair in self.fuse for i in pair)]
        if len(set(named)) < len(named):
            raise InputError(f"planned: layers {sorted(i for i in set(named) if named.count(i) > 1)} are named twice")
        if bad := [pair for pair in self.fuse if pair[1] != pair[0] + 1]:
            raise InputError(f"planned: fuse {list(bad[0])} must be neighbours (i, i + 1)")
        return self

    def removed(self, total: int) -> int:
        return len(self.drop) + len(self.fuse)

    def check(self, shape: ModelShape) -> None:
        free = self.free_layers(shape.layers)
        for layer in (*self.drop, *(i for pair in self.fuse for i in pair)):
            if layer not in free:
                raise InputError(
                    f"planned: layer {layer} is not among the unprotected layers {free.start} to {free[-1]}"
                )
        for first, second in self.fuse:
            if shape.kind(first) != shape.kind(second):
                raise InputError(f"planned: layers {first} and {second} are of different kinds and cannot be fused")
        if self.removed(shape.layers) >= shape.layers:
            raise InputError(f"planned: removes {self.removed(shape.layers)} of {shape.layers} layers")

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        second = {pair[1] for pair in self.fuse}
        pairs = dict(self.fuse)
        layers = tuple(
            PlannedLayer((i, pairs[i]), (0.5, 0.5)) if i in pairs else PlannedLayer((i,))
            for i in range(shape.layers)
            if i not in self.drop and i not in second
        )
        plan = MergePlan(self.method, shape.layers, layers)
        firsts = {i: pair[0] for pair in self.fuse for i in pair}
        scores = [self.costs.get(firsts.get(i, i)) for i in range(shape.layers)]
        reasons = [self._reason(i, shape.layers, scores[i]) for i in range(shape.layers)]
        return plan, depth_decisions(plan, scores, "predicted KL without it (nats a token)", {}, reasons)

    def _reason(self, index: int, total: int, cost: float | None) -> str:
        price = "" if cost is None else f", at a predicted KL of {number(cost)} nats a token"
        if index in self.drop:
            return f"dropped: the recipe names layer {index} under drop{price}"
        if pair := next((pair for pair in self.fuse if index in pair), None):
            return f"merged into layer {pair[0]}: the recipe fuses {layers_said(pair)} into their mean{price}"
        return self.protection(index, total) or "kept: the recipe names it neither under drop nor under fuse"
