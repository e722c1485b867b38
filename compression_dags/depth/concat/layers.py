"""What a concatenated student keeps of which original layers, and how that becomes a plan and a ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compression_dags.architectures import ModelShape
from compression_dags.depth.concat.sensitivity import Sensitivity, counts, strongest, strongest_of_all
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import counted, layers_said, number

#: What is kept of each member of a merge: positions within that member, by kind (`channels`, `heads`, `queries`).
Chosen = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """What is kept of original layer `source`: `channels` and `heads` (and `queries` where they go their own way),
    int32 ascending, by their numbers in that layer; `share` is its weight in what has to be averaged."""

    source: int
    share: float
    kept: Mapping[str, Tensor] = field(repr=False)

    @property
    def empty(self) -> bool:
        return not any(len(t) for t in self.kept.values())


@dataclass(frozen=True)
class StudentLayer:
    """One layer of the student.

    Attributes:
        span: the original layers that it stands for.
        parts: what it keeps of each, ascending; its channels and heads are theirs, one after the other.
        tree: how it came about: an original layer, or a list of trees.
        mixed: values of averaged tensors that the parts do not determine (form `concat-released`, merged twice).
    """

    span: range
    parts: tuple[Part, ...]
    tree: Any
    mixed: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def merged(self) -> bool:
        return len(self.span) > 1

    def planned(self, form: str) -> tuple[PlannedLayer, dict[str, Tensor]]:
        """The layer in a plan, and the tensors that the plan holds for it.

        Form `concat` leaves out original layers that give nothing; one that gives all is that layer, as it is.
        """
        parts = [p for p in self.parts if not p.empty] if form == "concat" else self.parts
        if len(parts) == 1:
            return PlannedLayer((parts[0].source,)), {}
        held = {f"{kind}.{p.source}": t for p in parts for kind, t in p.kept.items()}
        held |= {f"mixed.{name}": t for name, t in self.mixed.items()}
        return PlannedLayer(tuple(p.source for p in parts), _to_one([p.share for p in parts]), form), held


def whole(index: int, shape: ModelShape, *, queries: bool = False) -> StudentLayer:
    """An original layer as it is; `queries` where query heads may part from their KV heads."""
    sizes = {"channels": shape.intermediate, "heads": shape.kv_heads} | ({"queries": shape.heads} if queries else {})
    kept = {kind: torch.arange(size, dtype=torch.int32) for kind, size in sizes.items()}
    return StudentLayer(range(index, index + 1), (Part(index, 1.0, kept),), index)


def concatenated(members: Sequence[StudentLayer], chosen: Chosen, shares: Sequence[float]) -> StudentLayer:
    """One layer that keeps the `chosen` positions of every member: composed down to the original layers."""
    parts = []
    for member, positions, share in zip(members, chosen, shares, strict=True):
        start = dict.fromkeys(positions, 0)
        for part in member.parts:
            kept = {}
            for kind, where in positions.items():
                have = part.kept[kind]
                inside = where[(where >= start[kind]) & (where < start[kind] + len(have))] - start[kind]
                kept[kind] = have[inside.long()]
                start[kind] += len(have)
            parts.append(Part(part.source, share * part.share, kept))
    span = range(members[0].span.start, members[-1].span.stop)
    return StudentLayer(span, tuple(parts), [m.tree for m in members])


def by_contribution(layer: StudentLayer, shape: ModelShape) -> StudentLayer:
    """The layer with shares that say what each part really gives: the mean of its shares of channels and heads."""

    def share(part: Part) -> float:
        return 0.5 * (len(part.kept["channels"]) / shape.intermediate + len(part.kept["heads"]) / shape.kv_heads)

    return replace(layer, parts=tuple(replace(p, share=share(p)) for p in layer.parts))


def chosen_by_shares(members: Sequence[Sensitivity], shares: Sequence[float], shape: ModelShape) -> Chosen:
    """The most sensitive units of every member, as many as its share of a stock layer."""
    channels, heads = (counts(shares, total) for total in (shape.intermediate, shape.kv_heads))
    return [
        {"channels": strongest(m.channels, c), "heads": strongest(m.heads, h)}
        for m, c, h in zip(members, channels, heads, strict=True)
    ]


def chosen_freely(members: Sequence[Sensitivity], shape: ModelShape) -> Chosen:
    """The most sensitive units of all members together."""
    channels = strongest_of_all([m.channels for m in members], shape.intermediate)
    heads = strongest_of_all([m.heads for m in members], shape.kv_heads)
    return [{"channels": c, "heads": h} for c, h in zip(channels, heads, strict=True)]


def _to_one(shares: Sequence[float]) -> tuple[float, ...]:
    total = sum(shares)
    weights = [s / total for s in shares] if total > 0 else [1 / len(shares)] * len(shares)
    return (*weights[:-1], 1.0 - sum(weights[:-1]))


def plan_of(method: str, form: str, layers: Sequence[StudentLayer], shape: ModelShape) -> MergePlan:
    """The plan of a student."""
    planned = [layer.planned(form) for layer in layers]
    tensors = {f"{p}.{name}": t for p, (_, held) in enumerate(planned) for name, t in held.items()}
    return MergePlan(method, shape.layers, tuple(p for p, _ in planned), tensors)


def ledger(
    plan: MergePlan,
    layers: Sequence[StudentLayer],
    steps: Sequence[Mapping[str, Any]],
    unit: str,
    note: Mapping[str, Any],
    alone: Callable[[int], str],
    grouping: str = "",
) -> list[Decision]:
    """One row for every original layer: `concat` if it lives on in a merged one, `drop` if nothing of it is kept.

    Args:
        steps: what was noted of every merge; `span` is the original layers of the merged layer, `distance` the value
            that decided.
        note: what holds for all rows.
        alone: why an original layer is in no merge.
        grouping: how the groups were found where no pair was chosen after another.
    """
    rows = []
    for student, planned in zip(layers, plan.layers, strict=True):
        mine = [s for s in steps if student.merged and set(s["span"]) <= set(student.span)]
        about = _about(student, planned) | {"merges": [dict(s) for s in mine]} if student.merged else {}
        for index in student.span:
            inside = index in planned.sources
            action = "drop" if not inside else "keep" if planned.kept else "concat"
            touched = [s for s in mine if index in s["span"]]
            share = {"share": planned.shares[planned.sources.index(index)]} if action == "concat" else {}
            reason = why_merged(action, index, student, planned, touched[-1], grouping) if touched else alone(index)
            rows.append(
                Decision(
                    "merge",
                    plan.method,
                    index,
                    f"layer {index}",
                    action,
                    list(planned.sources) if inside else [],
                    float(touched[-1]["distance"]) if touched else None,
                    unit,
                    reason,
                    {**share, **about, **note},
                )
            )
    return rows


def why_merged(
    action: str, index: int, student: StudentLayer, planned: PlannedLayer, step: Mapping[str, Any], grouping: str
) -> str:
    """Why a layer is in a merge, and what of it is kept. `step` is the last merge that it took part in."""
    distance = number(step["distance"])
    if "tree" in step:
        first, second = (layers_said(_leaves(tree)) for tree in step["tree"])
        chosen = f"{first} and {second} were the closest pair of round {step['step'] + 1}, {distance} apart"
        if trials := [loss for loss in step.get("trials", {}).values() if loss is not None]:
            ratio = f"ratio {number(step['shares'][0])} of {first} to {second}, the closest pair ({distance})"
            chosen = f"{ratio}, won {counted(len(step['trials']), 'trial')} with {number(min(trials))}"
    else:
        chosen = f"{layers_said(step['span'])} are one in {grouping} angular distance ({distance})"
    own = next(p for p in student.parts if p.source == index)
    kept = {kind: (len(own.kept[kind]), sum(len(p.kept[kind]) for p in student.parts)) for kind in own.kept}
    channels, heads = ("{} of {}".format(*kept[kind]) for kind in ("channels", "heads"))
    if action == "drop":
        return f"dropped: {chosen}, which leaves it {channels} channels and {heads} KV heads"
    if action == "keep":
        return f"kept: {chosen}, which leaves it all {channels} channels, so it stays as it is"
    share = number(planned.shares[planned.sources.index(index)])
    return f"concatenated into layer {planned.slot} at share {share} ({channels} channels): {chosen}"


def _leaves(tree: Any) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for part in tree for leaf in _leaves(part)]


def _about(student: StudentLayer, planned: PlannedLayer) -> dict[str, Any]:
    def number(kind: str) -> dict[str, int]:
        return {str(p.source): len(p.kept[kind]) for p in student.parts}

    released = planned.form == "concat-released"
    return {
        "into": planned.slot,
        "tree": student.tree,
        "channels": number("channels"),
        "kv_groups": number("heads"),
        "kept_sha256": kept_digest(student.parts),
        "norms": "plain mean" if released else "as they are" if planned.kept else "folded into the rows",
        "query_heads": "by the tiled mask" if released else "with their KV head",
    }


def kept_digest(parts: Sequence[Part]) -> str:
    """sha256 of the kept indices of all parts, in order: for each, every kind's name and its int32 bytes."""
    digest = hashlib.sha256()
    for part in parts:
        for kind, indices in sorted(part.kept.items()):
            digest.update(f"{part.source} {kind}\n".encode())
            digest.update(indices.cpu().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def as_tensors(layers: Sequence[StudentLayer]) -> tuple[list[Any], dict[str, Tensor]]:
    """A student as JSON and tensors, for `ResumePoint`; `from_tensors` is the inverse."""
    note = [[x.span.start, x.span.stop, x.tree, [[p.source, p.share] for p in x.parts]] for x in layers]
    tensors = {
        f"kept.{at}.{p.source}.{kind}": t for at, x in enumerate(layers) for p in x.parts for kind, t in p.kept.items()
    }
    return note, tensors | {f"mixed.{at}.{name}": t for at, x in enumerate(layers) for name, t in x.mixed.items()}


def from_tensors(note: Sequence[Any], tensors: Mapping[str, Tensor]) -> list[StudentLayer]:
    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    return [
        StudentLayer(
            range(start, stop),
            tuple(Part(s, w, below(f"kept.{at}.{s}.")) for s, w in parts),
            tree,
            below(f"mixed.{at}."),
        )
        for at, (start, stop, tree, parts) in enumerate(note)
    ]


#: Chooses how the layers at a position and the next become one: (merged layer, what to note of it).
Choose = Callable[[int], tuple[StudentLayer, dict[str, Any]]]
