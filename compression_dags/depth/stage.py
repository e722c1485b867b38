"""What every depth method has in common: how much goes, what is protected, what it may read, and who plans."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from compression_dags.architectures import ModelShape
from compression_dags.architectures.uniformity import refuse_shared, refuse_unlike
from compression_dags.depth.plan import VERSION as WRITER_VERSION
from compression_dags.depth.plan import MergePlan
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.similarity.evidence import Evidence
from compression_dags.stage import Progress, Stage, implementation, silent
from compression_dags.step import ANALYSIS, BASE, SIMILARITIES, Chain, Kind, Step

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.provenance.resume import ResumePoint


@dataclass(frozen=True)
class ProbeContext:
    """What a method that measures works on: the base model's weights and the calibration tokens, on one device."""

    source: Checkpoint
    blocks: TokenBlocks
    device: str = "cpu"
    dtype: str = "float32"
    resume: ResumePoint | None = None
    progress: Progress = silent


class MergeStage(Stage):
    """Common options of the depth methods.

    `ratio` is the share of decoder layers removed, rounded to the nearest whole layer (ties up); `layers` is the exact
    number instead. Protected layers are neither removed nor merged.
    """

    stage: ClassVar[str] = "merge"
    kinds: ClassVar[tuple[Kind, ...]] = (
        Kind(
            "merge_plan",
            "Which layers stay, and how others are dropped, merged or concatenated.",
            (BASE, *ANALYSIS, *SIMILARITIES),
            picture="compression_dags.depth.pictures:plan_png",
        ),
        Kind(
            "merged_weights",
            "The plan applied: layers renumbered, per-layer config remapped, reload gate passed.",
            (BASE, "merge_plan"),
            weights=True,
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ()
    """Similarity assets that `plan` reads: block_influence, angular, npib, cka."""
    reads_statistics: ClassVar[bool] = False
    """Whether `plan` reads the channel norms of the calibration pass (`evidence.statistics`)."""
    measures: ClassVar[bool] = False
    """Whether `plan` reads weights or runs the model: it is then given a `ProbeContext`, and a GPU lease."""

    @property
    def analysis(self) -> bool:
        """Whether the method reads anything of the shared analysis."""
        return bool(self.needs) or self.reads_statistics or self.measures

    ratio: float | None = Field(None, gt=0, lt=1, description="share of decoder layers removed")
    layers: int | None = Field(None, ge=1, description="number of decoder layers removed")
    protect_first: int = Field(1, ge=0, description="first layers never touched")
    protect_last: int = Field(1, ge=0, description="last layers never touched")

    @model_validator(mode="after")
    def _one_target(self) -> MergeStage:
        if (self.ratio is None) == (self.layers is None):
            raise ValueError("give exactly one of ratio (0 < ratio < 1) and layers (≥ 1)")
        return self

    def steps(self, chain: Chain) -> tuple[Step, ...]:
        reads = [BASE, *(f"similarity_{need}" for need in self.needs)]
        reads += ["calibration_activations"] * self.reads_statistics + ["calibration_tokens"] * self.measures
        worker = "compression_dags.depth.workers"
        plan = Step(
            "merge_plan", self.code_version, self.options(), tuple(reads), f"{worker}:plan", self, gpu=self.measures
        )
        merged = Step("merged_weights", WRITER_VERSION, {}, (BASE, "merge_plan"), f"{worker}:apply", self, weights=True)
        return plan, merged

    def removed(self, total: int) -> int:
        """Number of layers to remove from a model of `total`."""
        if self.layers is not None:
            return self.layers
        assert self.ratio is not None
        return math.floor(self.ratio * total + 0.5 + 1e-9)

    def free_layers(self, total: int) -> range:
        return range(min(self.protect_first, total), max(self.protect_first, total - self.protect_last))

    def protection(self, index: int, total: int) -> str:
        """Why layer `index` of `total` may not be touched, in words; empty if it may."""
        free = self.free_layers(total)
        if index in free:
            return ""
        side, count = ("first", self.protect_first) if index < free.start else ("last", self.protect_last)
        where = f"{side} layer" if count == 1 else f"one of the {side} {min(count, total)} layers"
        return f"protected: {where} (protect_{side} {count})"

    def check(self, shape: ModelShape) -> None:
        refuse_shared(shape, f"merge: {self.method}", "leave its layers as they are")
        count, free = self.removed(shape.layers), len(self.free_layers(shape.layers))
        target = f"ratio {self.ratio}" if self.ratio is not None else f"layers {self.layers}"
        if count < 1:
            raise InputError(
                f"{target} of {shape.layers} layers removes none; the least is ratio {0.5 / shape.layers:.3g}"
            )
        if count > free or count >= shape.layers:
            raise InputError(
                f"{target} removes {count} of {shape.layers} layers, but only {free} are unprotected "
                f"(protect_first {self.protect_first}, protect_last {self.protect_last})"
            )

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        """The plan, and why, layer by layer. A method that measures names its worker, and needs a `probe`."""
        return implementation(self)(self, shape, evidence, probe)


def refuse_experts(shape: ModelShape, what: str = "concatenation of layers") -> None:
    """Raise InputError for mixtures of experts, whose channels are not the layer's, and for layers unlike a Llama's."""
    if shape.architecture.has_experts:
        raise InputError(
            f"{what} needs dense layers: {shape.architecture.model_type} is a mixture of experts; "
            "drop layers instead (shortgpt, sleb)"
        )
    refuse_unlike(shape, what, "drop layers instead (shortgpt, sleb)")
