"""A depth plan as a frozen value: which original layers each new layer is made of.

Applying a stored plan reproduces the bytes: `apply.py` reads only weights and a plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.stage import Progress, Stage, silent
from compression_dags.step import ANALYSIS, BASE, SIMILARITIES, Chain, Kind, Step

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.provenance.resume import ResumePoint

PLAN, PLAN_TENSORS = "plan.json", "plan.safetensors"
#: Of `apply.py`, which writes the checkpoint of a plan.
WRITER_VERSION = "1"


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the new model: the original layers it holds, the share of each, and how they become one.

    Attributes:
        sources: original layers, ascending. A kept layer has one.
        shares: of each source; they sum to 1 (LaCo's differences make some negative).
        form: a key of `apply.FORMS`. `sum`: Σ share · W over every tensor (one source: the layer as it is);
            `projections`: the same over linear projections, the rest from the first source; `concat` and
            `concat-released`: channels and heads chosen from each source; `solved`: tensors that the plan holds, the
            rest from `slot`.
    """

    sources: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)
    form: str = "sum"

    @property
    def kept(self) -> bool:
        """Whether the layer's bytes stay as they are."""
        return len(self.sources) == 1 and self.form == "sum"

    @property
    def slot(self) -> int:
        """The original layer whose place (attention type, per-layer config) it takes."""
        return self.sources[0]


@dataclass(frozen=True)
class MergePlan:
    """New layers in order. Original layers named by none of them are dropped.

    `tensors` holds what numbers in JSON cannot: kept channel indices, solved weights. Keys are
    `<position of the new layer>.<name>`.
    """

    method: str
    base_layers: int
    layers: tuple[PlannedLayer, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = [s for layer in self.layers for s in layer.sources]
        if not self.layers or sorted(set(named)) != named or named[-1] >= self.base_layers:
            raise InputError(f"not a depth plan over {self.base_layers} layers: {named}")
        if any(not math.isclose(sum(layer.shares), 1.0, abs_tol=1e-9) for layer in self.layers):
            raise InputError("shares of a planned layer must sum to 1")

    @property
    def slots(self) -> list[int]:
        return [layer.slot for layer in self.layers]

    @property
    def dropped(self) -> list[int]:
        named = {s for layer in self.layers for s in layer.sources}
        return [i for i in range(self.base_layers) if i not in named]

    def covered(self, position: int) -> range:
        """Original layers that new layer `position` stands for: its own, and the dropped ones after it."""
        starts = [0, *self.slots[1:], self.base_layers]
        return range(starts[position], starts[position + 1])

    def gaps(self) -> list[int]:
        """Positions of new layers that stand for more than one original layer."""
        return [p for p in range(len(self.layers)) if len(self.covered(p)) > 1]

    def of_layer(self, position: int) -> dict[str, Tensor]:
        """The tensors that the plan holds for new layer `position`, by their name within the layer."""
        prefix = f"{position}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def to_json(self) -> str:
        """The plan as it is stored: without the method's name, so that equal plans of two methods are equal bytes."""
        layers = [
            {"sources": x.sources, "shares": x.shares, **({"form": x.form} if x.form != "sum" else {})}
            for x in self.layers
        ]
        return json.dumps({"base_layers": self.base_layers, "layers": layers}, indent=1)

    def save(self, directory: Path) -> None:
        """Write `plan.json`, and `plan.safetensors` where the plan holds tensors."""
        (directory / PLAN).write_text(self.to_json())
        if self.tensors:
            from safetensors.torch import save_file

            save_file({k: t.cpu().contiguous() for k, t in self.tensors.items()}, directory / PLAN_TENSORS)

    @classmethod
    def outline(cls, directory: Path) -> MergePlan:
        """A stored plan without the tensors that it may hold; torch is not needed to read it."""
        raw = json.loads((directory / PLAN).read_text())
        layers = tuple(
            PlannedLayer(tuple(x["sources"]), tuple(x["shares"]), x.get("form", "sum")) for x in raw["layers"]
        )
        return cls("stored", raw["base_layers"], layers)

    @classmethod
    def load(cls, directory: Path) -> MergePlan:
        found = cls.outline(directory)
        tensors: Mapping[str, Tensor] = {}
        if (directory / PLAN_TENSORS).is_file():
            from safetensors.torch import load_file

            tensors = load_file(directory / PLAN_TENSORS)
        return replace(found, tensors=tensors)


def keep_only(method: str, base_layers: int, kept: list[int]) -> MergePlan:
    return MergePlan(method, base_layers, tuple(PlannedLayer((i,)) for i in kept))


@dataclass(frozen=True)
class Evidence:
    """What planners may read: small statistics of the calibration pass.

    Attributes:
        block_influence: (L,).
        angular, angular_last: (L+1, L+1), mean angle over π between the states at the entries of two layers.
        similarity: arrays of every other similarity artifact that the method needs, by name (`npib`, `cka`, …).
        statistics: what the calibration pass left (`norms.layers.3.mlp_output.mean_abs` → (channels,), …); filled for
            methods with `reads_statistics`.
    """

    block_influence: np.ndarray
    angular: np.ndarray
    angular_last: np.ndarray
    similarity: Mapping[str, np.ndarray] = field(default_factory=dict)
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)


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

    def check(self, facts: ModelShape) -> None:
        count, free = self.removed(facts.layers), len(self.free_layers(facts.layers))
        target = f"ratio {self.ratio}" if self.ratio is not None else f"layers {self.layers}"
        if count < 1:
            raise InputError(
                f"{target} of {facts.layers} layers removes none; the least is ratio {0.5 / facts.layers:.3g}"
            )
        if count > free or count >= facts.layers:
            raise InputError(
                f"{target} removes {count} of {facts.layers} layers, but only {free} are unprotected "
                f"(protect_first {self.protect_first}, protect_last {self.protect_last})"
            )

    def plan(
        self, facts: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        """Decide, and say why, layer by layer. `bench` is given to methods that measure."""
        raise AssertionError(f"{type(self).__name__} must define plan")


def depth_decisions(
    plan: MergePlan,
    scores: np.ndarray | Sequence[float | None],
    unit: str,
    evidence: dict[str, Any],
    reasons: Sequence[str],
) -> list[Decision]:
    """One row for every original layer: kept, dropped or merged, with its score, its rank among all and the reason."""
    values = [None if s is None else float(s) for s in scores]
    order = {
        i: r for r, i in enumerate(sorted(range(len(values)), key=lambda i: (values[i] is None, values[i] or 0.0)))
    }
    home = {s: layer for layer in plan.layers for s in layer.sources}
    rows = []
    for index in range(plan.base_layers):
        layer = home.get(index)
        action = "drop" if layer is None else "keep" if len(layer.sources) == 1 else "merge"
        note: dict[str, Any] = {"rank": order[index], **evidence}
        if layer is not None and action == "merge":
            note |= {"share": layer.shares[layer.sources.index(index)], "into": layer.slot}
        sources = list(layer.sources) if layer else []
        target, value = f"layer {index}", values[index]
        rows.append(Decision("merge", plan.method, index, target, action, sources, value, unit, reasons[index], note))
    return rows
