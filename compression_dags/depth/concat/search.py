"""CoMe's progressive loop: choose a pair of adjacent layers, make them one, measure what changed, again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from torch import Tensor

from compression_dags.architectures import ModelShape
from compression_dags.depth.concat.layers import (
    Choose,
    Chosen,
    StudentLayer,
    as_tensors,
    concatenated,
    from_tensors,
    plan_of,
    whole,
)
from compression_dags.depth.concat.merge import (
    concatenate,
    concatenate_released,
    mixed,
    mixed_tensors,
    tiled_queries,
)
from compression_dags.depth.concat.sensitivity import Score, Sensitivity, layer_sensitivity
from compression_dags.depth.concat.student_pass import AllTokens, StudentPass
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.depth.stage import ProbeContext
from compression_dags.depth.windows import joinable, next_pair
from compression_dags.errors import InputError
from compression_dags.passes.variant_scoring import Piece
from compression_dags.provenance.resume import as_note, from_note
from compression_dags.provenance.wording import apart, counted, layers_said
from compression_dags.similarity.evidence import Evidence


@dataclass(frozen=True)
class Limits:
    """Which pairs may be merged: unprotected layers, groups of at most `largest` original ones, down to `goal`."""

    free: range
    largest: int
    goal: int


class Search:
    """A student under construction, and what the last pass said about each of its layers.

    Args:
        form: `concat`, or `concat-released`.
        rule: how influence and distance are measured.
        evidence: of the calibration pass; the first choice then needs no pass of its own.
    """

    def __init__(
        self,
        shape: ModelShape,
        probe: ProbeContext,
        limits: Limits,
        *,
        form: str,
        score: Score,
        rule: AllTokens,
        evidence: Evidence | None = None,
    ):
        self.shape, self.probe, self.limits = shape, probe, limits
        self.form = form
        self.score: Score = score
        self.student = StudentPass(probe, score, rule)
        self.layers = [whole(i, shape, queries=form == "concat-released") for i in range(shape.layers)]
        self.pieces = [Piece(i) for i in range(shape.layers)]
        self.influence = [float("nan")] * shape.layers
        self.distances = [float("nan")] * (shape.layers - 1)
        self._sensitivity: list[Sensitivity | None] = [None] * shape.layers
        self.evidence = evidence
        self.steps: list[dict[str, Any]] = []
        self.last_pairs: list[list[Any]] | None = None
        """Pairs that the last merge was chosen from: first layer of each group, end of the second, distance."""
        self.extra_forwards = 0
        """Layer-forwards of a method's own measurements."""

    # -- what is known -------------------------------------------------------------------------------------------------

    def sensitivity(self, position: int) -> Sensitivity:
        """Of the student's layer at a position; of one not measured yet, from the calibration pass."""
        known = self._sensitivity[position]
        if known is None:
            assert self.evidence is not None
            (index,) = self.layers[position].span
            statistics = self.evidence.statistics
            known = layer_sensitivity(self.probe.source, statistics, index, self.score, self.probe.device)
            self._sensitivity[position] = known
        return known

    def _begin(self) -> None:
        if self.evidence is None:
            self._measure(0)
            return
        self.influence = [float(x) for x in self.evidence.block_influence]
        self.distances = [float(self.evidence.angular[i, i + 2]) for i in range(self.shape.layers - 1)]

    def _measure(self, start: int) -> None:
        order = sorted(range(len(self.distances)), key=lambda p: (isnan(self.distances[p]), self.distances[p], p))
        likely = list(dict.fromkeys(max(0, p - 1) for p in order))
        for position, found in self.student.measure(self.pieces, start, likely).items():
            self.influence[position] = found.influence
            self._sensitivity[position] = found.sensitivity
            if found.distance is not None:
                self.distances[position - 1] = found.distance

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, choose: Choose, description: str) -> None:
        """Merge pairs until the goal is reached; `choose` says how the layers at a position and the next become one.

        Raises:
            InputError: no pair is left that may be merged.
        """
        may_join = joinable(self.shape, self.limits.free)
        rounds = self.shape.layers - self.limits.goal
        done = self._restore()
        if not done:
            self._begin()
        for step in self.probe.progress(range(done, rounds), description):
            spans = [layer.span for layer in self.layers]
            position = next_pair(spans, self.distances, may_join, self.limits.largest, self.limits.goal)
            if position is None:
                raise InputError(
                    f"after {step} of {rounds} merges no pair of adjacent unprotected layers of one kind is left whose "
                    f"groups have at most {self.limits.largest} original layers; lower the ratio"
                )
            self._accept(position, *choose(position))
            if step + 1 < rounds:
                self._measure(max(0, position - 1))
            if self.probe.resume:
                self.probe.resume.save_if_due(step + 1, self._state)
        self.student.stream.close()

    def merged(self, position: int, chosen: Chosen, shares: tuple[float, ...]) -> StudentLayer:
        """The layers at `position` and the next as one that keeps the chosen units."""
        members = self.layers[position : position + 2]
        if self.form == "concat":
            return concatenated(members, chosen, shares)
        queries = [tiled_queries(c["heads"], self.shape) for c in chosen]
        chosen = [{**c, "queries": q} for c, q in zip(chosen, queries, strict=True)]
        layer = concatenated(members, chosen, shares)
        return replace(layer, mixed=self._mixed(position, shares)) if any(m.merged for m in members) else layer

    def _mixed(self, position: int, shares: tuple[float, ...]) -> dict[str, Tensor]:
        """What the released code averages, from the members as they stand: means of means are not means."""
        source, pair = self.probe.source, self.pieces[position : position + 2]
        weights = mixed_tensors(source, PlannedLayer((pair[0].slot, pair[1].slot), shares))

        def now(piece: Piece, name: str) -> Tensor:
            value = piece.tensors.get(name)
            return source.tensor(source.layer(piece.slot)[name]) if value is None else value.cpu()

        return {name: mixed([now(p, name) for p in pair], share) for name, share in weights.items()}

    def piece(self, layer: StudentLayer, device: str | None = None) -> Piece:
        """The layer as the student runs it; computed on the probe's device, held on `device` or there."""
        planned, held = layer.planned(self.form)
        if planned.kept:
            return Piece(planned.slot)
        build = concatenate if self.form == "concat" else concatenate_released
        made = build(self.probe.source, planned, held, self.probe.device)
        return Piece(planned.slot, {name: t.to(device or self.probe.device) for name, t in made.items()})

    def _accept(self, position: int, layer: StudentLayer, note: dict[str, Any]) -> None:
        members = self.layers[position : position + 2]
        self.steps.append(
            {
                "step": len(self.steps),
                "span": list(layer.span),
                "tree": [m.tree for m in members],
                "distance": self.distances[position],
                "influence": self.influence[position : position + 2],
                "next_best": self._others(position),
                **note,
            }
        )
        self.last_pairs = self._pairs()
        self.layers[position : position + 2] = [layer]
        self.pieces[position : position + 2] = [self.piece(layer)]
        self.influence[position : position + 2] = [float("nan")]
        self._sensitivity[position : position + 2] = [None]
        del self.distances[position]  # its neighbours are stale now, and still the best guess of what comes next
        self.student.changed(position, self.pieces)

    def _pairs(self) -> list[list[Any]]:
        """Neighbours that may be joined, as in `last_pairs`."""
        may_join = joinable(self.shape, self.limits.free)
        spans = [layer.span for layer in self.layers]
        return [
            [a.start, b.start, b.stop, distance]
            for a, b, distance in zip(spans, spans[1:], self.distances, strict=False)
            if may_join[b.start - 1] and len(a) + len(b) <= self.limits.largest
        ]

    def alone(self, index: int) -> str:
        """Why an original layer that nothing protects is in no merge: what its pairs were in the last round."""
        if self.last_pairs is None:
            return "kept: no pair with it was chosen in any round"
        own = [(d, a, b, end) for a, b, end, d in self.last_pairs if index in (a, b)]
        if not own:
            return (
                f"kept: no unprotected neighbour of its kind could be joined to it, with at most "
                f"{self.limits.largest} layers in one"
            )
        distance, a, b, end = min(own)
        pair = f"{layers_said(range(a, b))} and {layers_said(range(b, end))}"
        mine, chosen = apart(distance, self.steps[-1]["distance"])
        if distance >= self.steps[-1]["distance"]:
            return (
                f"kept: its closest pair of the last round, {pair}, was {mine} apart in angle, the chosen one {chosen}"
            )
        return (
            f"kept: joining {pair}, {mine} apart in angle, would have left too few pairs to remove "
            f"{counted(self.shape.layers - self.limits.goal, 'layer')}; the chosen one is {chosen}"
        )

    def _others(self, position: int) -> dict[str, float]:
        """Distances of the next best pairs."""
        order = sorted((d, p) for p, d in enumerate(self.distances) if p != position)
        spans = [layer.span for layer in self.layers]
        return {f"{spans[p].start}-{spans[p + 1].stop - 1}": round(d, 9) for d, p in order[:4]}

    @property
    def layer_forwards(self) -> int:
        """Forwards of one layer over the calibration tokens (of a method's own measurements: over its rows)."""
        return self.student.layer_forwards + self.extra_forwards

    def plan(self, method: str) -> MergePlan:
        return plan_of(method, self.form, self.layers, self.shape)

    # -- resuming ------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        layers, tensors = as_tensors(self.layers)
        note = {"layers": layers, "steps": self.steps, "forwards": [self.student.layer_forwards, self.extra_forwards]}
        return {"note": as_note(note | {"last_pairs": self.last_pairs}), **tensors}

    def _restore(self) -> int:
        """Merges already done; the student is then as it was, and measured again unless it is complete."""
        saved = self.probe.resume.load() if self.probe.resume else None
        if saved is None:
            return 0
        done, tensors = saved
        note = from_note(tensors["note"])
        self.layers, self.steps = from_tensors(note["layers"], tensors), note["steps"]
        self.last_pairs = note.get("last_pairs")
        self.pieces = [self.piece(layer) for layer in self.layers]
        self.influence = [float("nan")] * len(self.layers)
        self.distances = [float("nan")] * (len(self.layers) - 1)
        self._sensitivity = [None] * len(self.layers)
        if done < self.shape.layers - self.limits.goal:
            self._measure(0)
        self.student.layer_forwards, self.extra_forwards = note["forwards"]
        return done
