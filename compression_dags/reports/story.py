"""One layer's story: what every step of a recipe decided for it, in pipeline order, read from stored artifacts.

A step names layers as they are numbered in the model before it. After a merge the numbers change; the stored depth plan
says which new layer holds an original one, or stands in for it.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from compression_dags.architectures import Architecture
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.plan import MergePlan
from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import Artifact
from compression_dags.provenance.decisions import read_decisions
from compression_dags.provenance.wording import joined, layers_said, number
from compression_dags.registry import stage_kinds

#: Step → the stage that it belongs to. `merged_weights` applies a plan and decides nothing.
STAGES = {kind.name: stage for stage, kinds in stage_kinds().items() for kind in kinds if kind.name != "merged_weights"}
_WIDTH = 110
_PARAMETER = re.compile(r"\.(weight|bias)$")


@dataclass(frozen=True)
class Subject:
    """What a story is about.

    Attributes:
        layer: its number in the base model; None for a module outside the layers.
        module: name within the layer (`mlp.down_proj`), or full name outside; empty for a whole layer.
    """

    layer: int | None
    module: str = ""


@dataclass(frozen=True)
class Treatment:
    """Targets that a step decided upon alike, by their names in the model before the step."""

    targets: list[str]
    action: str
    reason: str
    values: list[float | None]
    unit: str


@dataclass(frozen=True)
class Chapter:
    """What one step decided.

    Attributes:
        layer: the subject's number in the model before the step; None where nothing of it is left.
        run: whether the step's artifact is stored.
        note: what follows for the numbering, or why there are no decisions.
    """

    step: str
    stage: str
    method: str
    fingerprint: str
    run: bool
    layer: int | None
    decisions: list[Treatment]
    note: str = ""


@dataclass(frozen=True)
class Story:
    """The chapters about one subject.

    Attributes:
        fate: `kept`, `merged` or `dropped` by the depth plan; `kept` without one.
        new_layer: the layer of the compressed model that holds it; None if it was dropped.
        stand_in: the layer of the compressed model that stands for it, by its new number.
    """

    base_layers: int
    layer: int | None
    module: str
    fate: str
    new_layer: int | None
    stand_in: int | None
    stages: list[Chapter] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def decided_names(steps: Sequence[tuple[str, Artifact | None]]) -> set[str]:
    """Everything that some step decided upon, also what has no tensor of its own (a tied head)."""
    found = [read_decisions(a.decisions)["target"] for _, a in steps if a and a.decisions]
    return {str(name) for targets in found for name in targets}


def subject_of(text: str, base: Checkpoint, slug: str, decided: Container[str] = ()) -> Subject:
    """What `24`, `layer 24`, `model.layers.24.mlp.down_proj` or `lm_head` names in a model.

    Args:
        decided: names that are known beside those of tensors.

    Raises:
        InputError: no such layer or module, naming what there is.
    """
    if match := re.fullmatch(r"(?:layers? )?(-?\d+)", text.strip()):
        index = int(match[1])
        _check_layer(index, base, slug)
        return Subject(index)
    name = _PARAMETER.sub("", text.strip())
    index, local = base.architecture.split_name(name)
    if index is None and (whole := re.fullmatch(rf"{re.escape(base.architecture.layers)}\.(-?\d+)", name)):
        index, local = int(whole[1]), ""
    if index is not None:
        _check_layer(index, base, slug)
    if name not in decided and not any(tensor.startswith(f"{name}.") for tensor in base.tensors):
        outside = sorted({_PARAMETER.sub("", n) for n in base.outside_layers()})
        example = base.architecture.layer_prefix(0) + base.architecture.projections()[-1]
        raise InputError(
            f"layer {text!r} is unknown in {slug}; there are layers 0 to {base.num_layers - 1}, modules such as "
            f"{example}, and {', '.join(outside)}"
        )
    return Subject(index, local)


def _check_layer(index: int, base: Checkpoint, slug: str) -> None:
    if not 0 <= index < base.num_layers:
        raise InputError(f"layer {index} is out of range: {slug} has layers 0 to {base.num_layers - 1}")


def story(subject: Subject, base: Checkpoint, steps: Sequence[tuple[str, Artifact | None]]) -> Story:
    """What every step decided for the subject.

    Args:
        steps: name of the step (`merge_plan`, `recovered_weights_1`, …) and its artifact, None if it was not run, in
            pipeline order.
    """
    found = next((a for name, a in steps if name == "merge_plan" and a), None)
    plan = MergePlan.outline(found.path) if found else None
    teller = _Teller(subject, base.architecture, plan)
    chapters = [teller.chapter(name, a) for name, a in steps if _kind(name) in STAGES]
    stand_in = subject.layer if plan is None else teller.stand_in
    new = subject.layer if plan is None else teller.home
    return Story(base.num_layers, subject.layer, subject.module, teller.fate, new, stand_in, chapters)


def _kind(name: str) -> str:
    """`recovered_weights_1` → `recovered_weights`."""
    return re.sub(r"_\d+$", "", name)


class _Teller:
    def __init__(self, subject: Subject, architecture: Architecture, plan: MergePlan | None):
        self.subject, self.architecture, self.plan = subject, architecture, plan
        self.home = self.stand_in = self.layer = subject.layer
        self.fate = "kept"
        if plan is not None and subject.layer is not None:
            self._follow(plan, subject.layer)

    def _follow(self, plan: MergePlan, layer: int) -> None:
        self.stand_in = next(p for p in range(len(plan.layers)) if layer in plan.covered(p))
        holders = (p for p, x in enumerate(plan.layers) if layer in x.sources and x.shares[x.sources.index(layer)])
        self.home = next(holders, None)
        if self.home is None:
            self.fate = "dropped"
        elif sum(share != 0 for share in plan.layers[self.home].shares) > 1:
            self.fate = "merged"

    # -- chapters ----------------------------------------------------------------------------------------------------

    def chapter(self, name: str, artifact: Artifact | None) -> Chapter:
        kind = _kind(name)
        stage = STAGES[kind]
        if artifact is None:
            return Chapter(name, stage, "", "", False, self.layer, [], "not run yet")
        rows = read_decisions(artifact.decisions) if artifact.decisions else pd.DataFrame()
        method = str(rows["method"].iloc[0]) if len(rows) else ""
        number_before = self.layer
        own = [row for row in rows.to_dict("records") if self._concerns(kind, row)]
        note = self._note(kind, bool(own), len(rows))
        if kind == "merge_plan":
            self.layer = self.home
        return Chapter(name, stage, method, artifact.fingerprint, True, number_before, _treatments(own), note)

    def _concerns(self, kind: str, row: dict[str, Any]) -> bool:
        target = str(row["target"])
        if self.subject.layer is None:
            return target == self.subject.module
        if kind == "merge_plan":
            return _within(self.subject.layer, target)
        if kind == "recovered_weights":
            return self._recovers(row, target)
        if self.layer is None:
            return False
        if match := re.fullmatch(r"layer (\d+) (\w+)", target):
            return int(match[1]) == self.layer and self._in_group(match[2])
        index, local = self.architecture.split_name(target)
        return index == self.layer and self._in_module(local)

    def _recovers(self, row: dict[str, Any], target: str) -> bool:
        """A repair of the layer itself, of all layers, or of the one that stands in for it."""
        assert self.plan is not None  # a recipe that recovers has a plan
        mine = self.stand_in
        if mine is None:
            return False
        if target == "logits":
            return bool(set(row["sources"]) & set(self.plan.layers[mine].sources))
        index, local = self._split(target)
        if index is not None and row["method"] == "linear-patch":
            return index == mine or (index < mine and row["action"] == "recover" and self.home is not None)
        return index == mine and (not local or self._in_module(local) or self.home is None)

    def _split(self, target: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.up_proj` → (3, `mlp.up_proj`); `model.layers.3` → (3, empty)."""
        if match := re.fullmatch(rf"{re.escape(self.architecture.layers)}\.(\d+)", target):
            return int(match[1]), ""
        return self.architecture.split_name(target)

    def _in_module(self, local: str) -> bool:
        module = self.subject.module
        return not module or local == module or local.startswith(f"{module}.")

    def _in_group(self, group: str) -> bool:
        return any(self._in_module(p) for g in self.architecture.groups if g.name == group for p in g.projections)

    # -- words -------------------------------------------------------------------------------------------------------

    def _note(self, kind: str, decided: bool, rows: int) -> str:
        if self.subject.layer is None:
            return "" if decided else "decides nothing about it"
        if kind == "merge_plan":
            return self._renumbered()
        if decided:
            return self._stands_in() if kind == "recovered_weights" and self.home is None else ""
        if self.home is None and kind != "recovered_weights":
            return f"nothing of it is left; see what was decided for {self._holder(self.stand_in)}"
        if kind == "recovered_weights":
            return (
                "repairs nothing here: no removed layer follows it" if rows else "repairs nothing: no layer was removed"
            )
        return "decides nothing about it"

    def _stands_in(self) -> str:
        return f"for {self._holder(self.stand_in)}, which stands in for it"

    def _holder(self, position: int | None) -> str:
        assert self.plan is not None and position is not None
        return f"new layer {position} (was {layers_said(self._real(position))})"

    def _real(self, position: int) -> list[int]:
        """Original layers that really are in a new layer."""
        assert self.plan is not None
        x = self.plan.layers[position]
        return [s for s, share in zip(x.sources, x.shares, strict=True) if share] or list(x.sources)

    def _renumbered(self) -> str:
        """Where the layer went, and what it or its stand-in stands for."""
        assert self.plan is not None and self.stand_in is not None
        covered = self.plan.covered(self.stand_in)
        if self.home is None:
            return f"it is gone; {self._holder(self.stand_in)} stands for {layers_said(covered)}"
        if self.fate == "merged":
            return f"it lives on in new layer {self.home}, which is made of {layers_said(self._real(self.home))}"
        gone = [i for i in covered if i != self.subject.layer]
        also = f", which also stands for the removed {layers_said(gone)}" if gone else ""
        return f"it is new layer {self.home}{also}"


def _within(layer: int, target: str) -> bool:
    """Whether `layer 3` or `layers 3-5` names the layer."""
    match = re.fullmatch(r"layers? (\d+)(?:-(\d+))?", target)
    return bool(match) and int(match[1]) <= layer <= int(match[2] or match[1])


def _treatments(rows: list[dict[str, Any]]) -> list[Treatment]:
    """Rows with one action and reason as one, in order."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        unexplained = () if row["reason"] else (str(row["target"]),)
        alike.setdefault((row["action"], row["reason"], row["unit"], *unexplained), []).append(row)
    return [
        Treatment(
            [str(r["target"]) for r in of],
            of[0]["action"],
            of[0]["reason"],
            [None if pd.isna(r["value"]) else float(r["value"]) for r in of],
            of[0]["unit"],
        )
        for of in alike.values()
    ]


# -- text ------------------------------------------------------------------------------------------------------------


def story_text(told: Story, slug: str, recipe: str) -> str:
    """The story for people: a paragraph a step."""
    if told.layer is None:
        subject = told.module
    else:
        subject = f"layer {told.layer}" + (f", {told.module}," if told.module else "")
    lines = [f"{subject} of {slug} in {recipe}{_fate(told)}"]
    for _, alike in itertools.groupby(told.stages, key=lambda c: c.note if c.note and not c.decisions else c.step):
        chapters = list(alike)
        lines.append(", ".join(f"{c.step} ({c.method})" if c.method else c.step for c in chapters))
        said = [_said(treatment) for treatment in chapters[0].decisions]
        note = [chapters[0].note] if chapters[0].note else []
        said = note + said if chapters[0].stage == "recover" else said + note
        lines += [
            textwrap.fill(s, _WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)
            for s in said
        ]
    if not told.stages:
        lines.append("    the recipe has no stage: nothing was decided")
    return "\n".join(lines)


def _fate(told: Story) -> str:
    if told.layer is None or not any(c.stage == "merge" and c.run for c in told.stages):
        return ""
    where = f", new layer {told.new_layer}" if told.new_layer is not None else f", new layer {told.stand_in} stands in"
    return f": {told.fate}{where}"


def _said(treatment: Treatment) -> str:
    """`self_attn.q_proj, k_proj: the reason`; the layer itself is not named again."""
    reason = treatment.reason or _unexplained(treatment)
    names = [_short(target) for target in treatment.targets]
    named = [name for name in names if name]
    if not named:
        return reason
    count = f"{len(named)} matrices, " if len(named) > 2 else ""
    return f"{count}{joined(_without_parents(named))}: {reason}"


def _unexplained(treatment: Treatment) -> str:
    value = treatment.values[0]
    told = "" if value is None else f", {treatment.unit} {number(value)}"
    return f"{treatment.action}{told} (stored before reasons were recorded)"


def _short(target: str) -> str:
    """`model.layers.3.mlp.down_proj` → `mlp.down_proj`; nothing for a row about one whole layer."""
    if re.fullmatch(r"layer \d+", target):
        return ""
    if match := re.fullmatch(r"layer \d+ (\w+)", target):
        return match[1]
    if match := re.fullmatch(r".+\.layers\.(\d+)(?:\.(.+))?", target):
        return match[2] or f"new layer {match[1]}"
    return target


def _without_parents(names: list[str]) -> list[str]:
    """`self_attn.q_proj, self_attn.k_proj` → `self_attn.q_proj, k_proj`."""
    found, before = [], ""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        found.append(leaf if parent and parent == before else name)
        before = parent
    return found
