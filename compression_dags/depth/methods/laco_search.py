"""The search of `laco`: windows of layers from the top down, collapsed where the last hidden states hardly turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from compression_dags.architectures import ModelShape
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.depth.apply import layer_tensors
from compression_dags.depth.methods.laco import LaCo
from compression_dags.depth.plan import MergePlan, PlannedLayer, depth_decisions
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import IntegrityError
from compression_dags.passes.scored_rows import chosen_rows, even_rows
from compression_dags.passes.variant_scoring import Edit, Piece, VariantScorer, as_is
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import as_note, from_note
from compression_dags.provenance.wording import apart, counted, layers_said, number
from compression_dags.similarity.evidence import Evidence

#: Windows whose similarity is measured together; they share the states below them, and an accepted one voids the rest.
WINDOWS_AT_ONCE = 8


def plan(options: LaCo, shape: ModelShape, evidence: Evidence, probe: ProbeContext) -> tuple[MergePlan, list[Decision]]:
    """The plan of `laco`, and why, layer by layer."""
    search = _Search(options, shape, probe)
    merges = search.run()
    plan = MergePlan(options.method, shape.layers, tuple(g.planned for g in search.groups))
    last = {i: merge for merge in merges for i in (*merge.into, *merge.collapsed)}
    scores = [last[i].cosine if i in last else None for i in range(shape.layers)]
    reasons = [_reason(options, i, shape, plan, search, last.get(i)) for i in range(shape.layers)]
    decisions = depth_decisions(plan, scores, "cosine of last hidden states with the base model's", {}, reasons)
    return plan, [
        replace(d, evidence={**d.evidence, **_why(merges, search.refused, i)}) for i, d in enumerate(decisions)
    ]


def _reason(options: LaCo, index: int, shape: ModelShape, plan: MergePlan, search: _Search, merge: Merge | None) -> str:
    """Why a layer went, was merged by `merge` (its last one), or stayed."""
    wanted = counted(options.removed(shape.layers), "layer")
    if why := options.protection(index, shape.layers):
        return why
    if merge is None and index in search.refused:
        cosine, threshold, span = search.refused[index]
        found, needed = apart(cosine, threshold)
        return (
            f"kept: collapsing {layers_said(span)} gave a cosine of {found}, not above the threshold {needed}, and "
            f"the wanted {wanted} went elsewhere"
        )
    if merge is None:
        beside = [j for j in (index - 1, index + 1) if j in options.free_layers(shape.layers)]
        if not any(shape.kind(j) == shape.kind(index) for j in beside):
            return "kept: no unprotected neighbour of its kind is there to collapse with it"
        return f"kept: the wanted {wanted} were gone before the walk from the top tried to collapse it"
    span = layers_said((*merge.into, *merge.collapsed))
    cosine, threshold = apart(merge.cosine, merge.threshold)
    passed = f"gave a cosine of {cosine}, above the threshold {threshold}"
    home = next((layer for layer in plan.layers if index in layer.sources), None)
    if home is None:
        return f"dropped: collapsing {span} {passed}, and in their sum this layer's share is 0"
    if home.kept:
        return f"kept: collapsing {span} {passed}, and their sum is this layer as it is"
    share = number(home.shares[home.sources.index(index)])
    return f"merged into layer {home.slot} at share {share}: collapsing {span} {passed}"


@dataclass(frozen=True)
class Group:
    """Original layers (ascending) that are one layer now, and their shares; those of share 0 are gone."""

    members: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)

    @property
    def planned(self) -> PlannedLayer:
        return PlannedLayer(self.members, self.shares)


def collapse(groups: Sequence[Group]) -> Group:
    """θ_l + Σ_k (θ_{l+k} − θ_l) of layers that may be sums themselves: shares 1 − m of the first, 1 of the m others."""
    factors = [2.0 - len(groups)] + [1.0] * (len(groups) - 1)
    shares = {i: f * s for f, g in zip(factors, groups, strict=True) for i, s in zip(g.members, g.shares, strict=True)}
    kept = tuple(i for i, share in shares.items() if share)
    return Group(kept, tuple(shares[i] for i in kept))


@dataclass(frozen=True)
class Merge:
    """An accepted merge: original layers of layer l and of the layers collapsed into it, its cosine, and 𝒯 then."""

    into: tuple[int, ...]
    collapsed: tuple[int, ...]
    m: int
    cosine: float
    threshold: float


class _Search:
    """The walks. `at` is the layer l that is tried next; `known` the cosines of windows (l, m) of the present model."""

    def __init__(self, options: LaCo, shape: ModelShape, probe: ProbeContext):
        self.options, self.shape, self.probe = options, shape, probe
        self.groups = [Group((i,)) for i in range(shape.layers)]
        self.merges: list[Merge] = []
        self.walk = 0  # number of times that 𝒯 was lowered
        self.at = shape.layers - 1
        self.known: dict[tuple[int, int], float] = {}
        self.pieces: dict[Group, Piece] = {}
        self.refused: dict[int, tuple[float, float, list[int]]] = {}
        """Original layer → cosine, 𝒯 and original layers of the last window with it that was tried and refused."""

    @property
    def threshold(self) -> float:
        return round(self.options.threshold - self.walk * self.options.step, 9) + 0.0  # never −0

    @property
    def missing(self) -> int:
        return self.options.removed(self.shape.layers) - (self.shape.layers - len(self.groups))

    def run(self) -> list[Merge]:
        """Collapse until the wanted number of layers is gone.

        Raises:
            IntegrityError: whatever is collapsed, the last hidden states are not finite.
        """
        probe = self.probe
        stream = DecoderStream(probe.source, device=probe.device, dtype=probe.dtype)
        scored = VariantScorer(stream, chosen_rows(probe.blocks, even_rows(probe.blocks, self.options.rows)))
        states = scored.states(as_is(self.shape.layers))
        target = [stream.last_states(b, h) for b, h in zip(scored.batches, states, strict=True)]
        self._restore()
        for _ in probe.progress(range(self.missing), "laco (layers collapsed, at most)"):
            if not self.missing:
                break
            self._next_merge(scored, target)
            if probe.resume:
                probe.resume.save_if_due(len(self.merges), self._state)
        stream.close()
        return self.merges

    def _next_merge(self, scored: VariantScorer, target: list[Tensor]) -> None:
        while True:
            for window in self._windows():
                cosine = self._cosine(window, scored, target)
                if cosine > self.threshold:
                    return self._accept(window, cosine)
                self._refuse(window, cosine)
            if self.threshold < -1:
                raise IntegrityError("laco: no merge of these layers gives finite last hidden states")
            self.walk, self.at = self.walk + 1, self.shape.layers - 1

    def _windows(self) -> list[tuple[int, int]]:
        """(l, m) that the present walk still tries, from the top down."""
        free = self.options.free_layers(self.shape.layers)
        most = 1 + min(self.options.combined - 1, self.missing)
        found = []
        for start in range(min(self.at, len(self.groups) - 1), -1, -1):
            run = self._run_of(start, free)
            # as in the paper, the topmost window of a run is a whole one: no walk begins with smaller merges
            if len(run) > 1 and start <= max(run.start, run.stop - most):
                found.append((start, min(most, run.stop - start) - 1))
        return found

    def _run_of(self, position: int, free: range) -> range:
        """The longest stretch of unprotected layers of one kind around `position`; empty for a protected layer."""

        def alike(p: int) -> bool:
            slot = self.groups[p].members[0]
            return slot in free and self.shape.kind(slot) == kind

        kind = self.shape.kind(self.groups[position].members[0])
        if not alike(position):
            return range(0)
        start, stop = position, position + 1
        while start and alike(start - 1):
            start -= 1
        while stop < len(self.groups) and alike(stop):
            stop += 1
        return range(start, stop)

    def _cosine(self, window: tuple[int, int], scored: VariantScorer, target: list[Tensor]) -> float:

        if window not in self.known:
            ahead = [w for w in self._windows() if w[0] <= window[0] and w not in self.known][:WINDOWS_AT_ONCE]
            edits = [Edit(start, start + m + 1, (self._piece(self._collapsed(start, m)),)) for start, m in ahead]
            pieces = [self._piece(g) for g in self.groups]
            found = scored.measured(pieces, edits, lambda states: mean_cosine(scored, states, target))
            self.known.update(zip(ahead, found, strict=True))
            self.pieces = {g: p for g, p in self.pieces.items() if g in self.groups}
        return self.known[window]

    def _collapsed(self, start: int, m: int) -> Group:
        return collapse(self.groups[start : start + m + 1])

    def _piece(self, group: Group) -> Piece:
        if group not in self.pieces:
            alone = MergePlan(self.options.method, self.shape.layers, (group.planned,))
            self.pieces[group] = Piece(group.members[0], layer_tensors(self.probe.source, alone, 0))
        return self.pieces[group]

    def _refuse(self, window: tuple[int, int], cosine: float) -> None:
        start, m = window
        span = [i for g in self.groups[start : start + m + 1] for i in g.members]
        self.refused |= dict.fromkeys(span, (cosine, self.threshold, span))

    def _accept(self, window: tuple[int, int], cosine: float) -> None:
        start, m = window
        first, *others = self.groups[start : start + m + 1]
        gone = tuple(i for g in others for i in g.members)
        self.merges.append(Merge(first.members, gone, m, cosine, self.threshold))
        self.groups[start : start + m + 1] = [self._collapsed(start, m)]
        self.known.clear()
        self.at = start - self.options.interval

    def _state(self) -> dict[str, Tensor]:

        groups, merges = [asdict(g) for g in self.groups], [asdict(m) for m in self.merges]
        walk = {"walk": self.walk, "at": self.at, "refused": [[i, *why] for i, why in self.refused.items()]}
        return {"note": as_note({"groups": groups, "merges": merges, **walk})}

    def _restore(self) -> None:

        saved = self.probe.resume.load() if self.probe.resume else None
        if saved is None:
            return
        note = from_note(saved[1]["note"])
        self.walk, self.at = note["walk"], note["at"]
        self.refused = {i: (cosine, threshold, span) for i, cosine, threshold, span in note.get("refused", [])}
        self.groups = [Group(tuple(g["members"]), tuple(g["shares"])) for g in note["groups"]]
        self.merges = [
            Merge(**{**m, "into": tuple(m["into"]), "collapsed": tuple(m["collapsed"])}) for m in note["merges"]
        ]


def mean_cosine(scored: VariantScorer, states: list[Tensor], target: list[Tensor]) -> float:
    """Mean over sequences of the cosine of two models' last hidden states, flattened over a sequence's real tokens.

    Args:
        states: a candidate's, before the final norm, (b, T, d) a batch.
        target: the base model's, after it.
    """

    cosines: list[float] = []
    for batch, hidden, theirs in zip(scored.batches, states, target, strict=True):
        mask = batch.mask.to(hidden.device)
        ours, theirs = scored.stream.last_states(batch, hidden).float(), theirs.float()

        def dot(a: Tensor, b: Tensor, mask: Tensor = mask) -> Tensor:
            return (a * b).sum(-1).double().masked_fill(~mask, 0).sum(-1)

        cosines += (dot(ours, theirs) / (dot(ours, ours) * dot(theirs, theirs)).sqrt()).tolist()
    return sum(cosines) / len(cosines)


def _why(merges: list[Merge], refused: dict[int, tuple[float, float, list[int]]], layer: int) -> dict[str, Any]:
    """The accepted merges that a layer took part in, in order, and the last refused one."""
    return {
        "merges": [
            {"number": number, **asdict(merge)}
            for number, merge in enumerate(merges, 1)
            if layer in (*merge.into, *merge.collapsed)
        ],
        **_refusal(refused.get(layer)),
    }


def _refusal(refused: tuple[float, float, list[int]] | None) -> dict[str, Any]:
    """The last window with a layer that was tried in vain."""
    if refused is None:
        return {}
    cosine, threshold, span = refused
    return {"refused": {"layers": span, "cosine": cosine, "threshold": threshold}}
