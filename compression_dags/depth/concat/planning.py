"""The plans of `come`, `come-p` and `concat`: all at once from the calibration pass, or merge after merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compression_dags.architectures import ModelShape
from compression_dags.depth.concat.come import Come, ComeP, ConcatStage
from compression_dags.depth.concat.concat import Concat
from compression_dags.depth.concat.layers import (
    Choose,
    Chosen,
    StudentLayer,
    by_contribution,
    chosen_by_shares,
    chosen_freely,
    concatenated,
    ledger,
    plan_of,
    whole,
)
from compression_dags.depth.concat.search import Limits, Search
from compression_dags.depth.concat.sensitivity import Sensitivity, layer_sensitivity
from compression_dags.depth.concat.student_pass import AllTokens
from compression_dags.depth.concat.trials import ratio_trials
from compression_dags.depth.plan import MergePlan
from compression_dags.depth.reasons import LEAST_TOTAL, by_grouping
from compression_dags.depth.stage import ProbeContext
from compression_dags.depth.windows import (
    cheapest_groups,
    greedy_groups,
    influence_shares,
    joinable,
    window_distance,
)
from compression_dags.provenance.decisions import Decision
from compression_dags.similarity.evidence import Evidence


def plan(options: Come, shape: ModelShape, evidence: Evidence, probe: ProbeContext) -> tuple[MergePlan, list[Decision]]:
    """The plan of `come`, and why, layer by layer."""
    options.check(shape)
    if options.mode == "one-shot":
        rule = "the grouping, pair by pair, of least" if options.windows == "greedy" else LEAST_TOTAL
        groups = _groups(options, shape, evidence)
        return one_shot(options, shape, evidence, probe, groups, options.shares, options.power, rule)
    search = _search(options, shape, evidence, probe)

    def both(position: int) -> tuple[StudentLayer, dict[str, Any]]:
        pair = (position, position + 1)
        influence = [search.influence[p] for p in pair]
        known = [search.sensitivity(p) for p in pair]
        chosen, given, note = choose(known, influence, options.shares, options.power, shape)
        return settled(search.merged(position, chosen, given), options.shares, shape), note

    search.run(both, "come (merges)")
    return _searched(options, search, {"shares_by": options.shares, "power": options.power})


def _groups(options: Come, shape: ModelShape, evidence: Evidence) -> list[range]:
    free, goal = options.free_layers(shape.layers), shape.layers - options.removed(shape.layers)
    if options.windows == "greedy":
        may_join = joinable(shape, free)
        groups = greedy_groups(shape.layers, goal, options.largest(shape), may_join, evidence.angular)
    else:
        distance = window_distance(shape, free, evidence.angular)
        groups = cheapest_groups(shape.layers, goal, options.largest(shape), distance)
    assert groups is not None  # `check` refused the impossible
    return groups


def plan_by_trial(
    options: ComeP, shape: ModelShape, evidence: Evidence, probe: ProbeContext
) -> tuple[MergePlan, list[Decision]]:
    """The plan of `come-p`, and why, layer by layer."""

    options.check(shape)
    search = _search(options, shape, evidence, probe)
    trials: Choose = ratio_trials(search, options)
    search.run(trials, "come-p (merges)")
    rows = min(options.rows, len(probe.blocks.lengths))
    note = {"by": options.by, "granularity": options.granularity, "trial_rows": rows}
    return _searched(options, search, note)


def plan_windows(
    options: Concat, shape: ModelShape, evidence: Evidence, probe: ProbeContext
) -> tuple[MergePlan, list[Decision]]:
    """The plan of `concat`, and why, layer by layer."""
    options.check(shape)
    goal = shape.layers - options.removed(shape.layers)
    distance = window_distance(shape, options.free_layers(shape.layers), evidence.angular)
    groups = cheapest_groups(shape.layers, goal, options.largest(shape), distance)
    assert groups is not None  # `check` refused the impossible
    return one_shot(options, shape, evidence, probe, groups, options.shares, options.power)


def one_shot(
    options: ConcatStage,
    shape: ModelShape,
    evidence: Evidence,
    probe: ProbeContext,
    groups: Sequence[range],
    shares: str,
    power: float,
    rule: str = LEAST_TOTAL,
) -> tuple[MergePlan, list[Decision]]:
    """Every group as one layer, from the statistics of the calibration pass alone; `rule` says how they came."""

    layers, steps = [], []
    for group in probe.progress(groups, f"{options.method} (layers)"):
        members = [whole(i, shape) for i in group]
        if len(group) == 1:
            layers += members
            continue
        args = (probe.source, evidence.statistics)
        known = [layer_sensitivity(*args, i, options.score, probe.device) for i in group]
        influence = [float(evidence.block_influence[i]) for i in group]
        chosen, given, note = choose(known, influence, shares, power, shape)
        layers.append(settled(concatenated(members, chosen, given), shares, shape))
        distance = float(evidence.angular[group.start, group.stop])
        step = {"step": len(steps), "span": list(group), "distance": distance, "influence": influence}
        steps.append({**step, **note})
    plan = plan_of(options.method, "concat", layers, shape)
    note = {"mode": "one-shot", "score": options.score, "shares_by": shares, "layer_forwards": 0}
    may_join = joinable(shape, options.free_layers(shape.layers))
    alone = by_grouping(options, groups, evidence.angular, may_join, lambda *_: "", rule)
    return plan, ledger(plan, layers, steps, UNIT, note, alone.__getitem__, rule)


def _searched(options: ConcatStage, search: Search, note: dict[str, Any]) -> tuple[MergePlan, list[Decision]]:

    plan, blocks = search.plan(options.method), search.probe.blocks
    cost = {
        "layer_forwards": search.layer_forwards,
        "sequences": len(blocks.lengths),
        "tokens": blocks.tokens,
    }
    note = {"mode": "progressive", "score": options.score, **note, **cost}

    def alone(index: int) -> str:
        return options.protection(index, search.shape.layers) or search.alone(index)

    return plan, ledger(plan, search.layers, search.steps, UNIT, note, alone)


def _search(options: ConcatStage, shape: ModelShape, evidence: Evidence, probe: ProbeContext) -> Search:
    goal = shape.layers - options.removed(shape.layers)
    limits = Limits(options.free_layers(shape.layers), options.largest(shape), goal)
    return Search(shape, probe, limits, form="concat", score=options.score, rule=AllTokens(), evidence=evidence)


UNIT = "angular distance from the entry to the exit of the merged layers (SBI)"


def choose(
    known: Sequence[Sensitivity], influence: Sequence[float], shares: str, power: float, shape: ModelShape
) -> tuple[Chosen, tuple[float, ...], dict[str, Any]]:
    """What a merge keeps of every member, the members' shares, and what to note of it.

    Args:
        known, influence: of every member.
        shares: `bi`, `equal` or `free`.
    """

    given = influence_shares(influence, power if shares == "bi" else 0.0)
    chosen = chosen_freely(known, shape) if shares == "free" else chosen_by_shares(known, given, shape)
    note: dict[str, Any] = {kind: [len(c[kind]) for c in chosen] for kind in ("channels", "heads")}
    return chosen, given, note | ({} if shares == "free" else {"shares": list(given)})


def settled(layer: StudentLayer, shares: str, shape: ModelShape) -> StudentLayer:
    """A merged layer whose shares are what its members really give, where no prior set them."""

    return by_contribution(layer, shape) if shares == "free" else layer
