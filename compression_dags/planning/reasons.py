"""Why a candidate stays in the candidate table, or was given up in the race."""

from __future__ import annotations

import math

from compression_dags.planning.candidates import Candidate, CandidateTable
from compression_dags.provenance.wording import apart, counted, layers_said, number


def why(table: CandidateTable, a: Candidate) -> str:
    """A sentence for the row of a candidate: what it costs, and what beat it if something did."""
    cost = f"{a.label} costs {number(a.cost)} nats a token over {counted(a.rows, 'sequence')}"
    if not a.rows:
        cost = f"{a.label} costs {number(a.cost)} nats a token, the sum of its parts"
    if a.alive:
        return f"kept for the planner: {cost}, and nothing that is no larger is surely cheaper"
    if not math.isfinite(a.cost):
        return f"rejected: {a.label} gives no finite loss"
    if a.kind == "drop" and table.recovered:
        return f"rejected: {cost} without recovery, and removals were measured again after {table.recovered['method']}"
    if a.kind == "drop":
        cheaper = sum(b.cost < a.cost for b in table.alternatives if b.kind == "drop" and len(b.layers) == 1)
        others = counted(cheaper, "other layer")
        return f"rejected: {cost}, and {others} can be dropped for less, more than half of all surely"
    if a.kind == "merge":
        return _merge(table, a, cost)
    rivals = [b for b in table.alternatives if (b.kind, b.layer, b.group) == (a.kind, a.layer, a.group) and b is not a]
    beat = [b for b in rivals if b.bytes <= a.bytes and b.parameters <= a.parameters and b.cost < a.cost]
    if not beat:
        return f"rejected: {cost}, surely more on the first sequences than one that is no larger"
    best = min(beat, key=lambda b: b.cost)
    own, less = apart(a.cost, best.cost)
    return f"rejected: {a.label} costs {own} nats a token, and {best.label}, which is no larger, surely less ({less})"


def _merge(table: CandidateTable, a: Candidate, cost: str) -> str:
    """A merge dies with its layers' drops, or at a scheme with the merge or the scheme itself."""
    base = next(b for b in table.alternatives if (b.kind, b.layer, b.choice) == ("merge", a.layer, None))
    if a.choice is not None and base.alive:
        return f"rejected: {cost}, and the scheme was given up for layer {a.layer}"
    if a.choice is not None:
        return f"rejected: {cost}, and merging {layers_said((a.layer, a.layer + 1))} was given up"
    drops = {b.layer: b.cost for b in table.alternatives if b.kind == "drop" and len(b.layers) == 1}
    layer = min((i for i in (a.layer, a.layer + 1) if i in drops), key=lambda i: drops[i])
    return (
        f"rejected: {cost}, and dropping layer {layer} alone, which saves as much, surely less ({number(drops[layer])})"
    )
