"""CoMe (Wang et al. 2025, arXiv 2510.15304): adjacent layers become one by concatenating channels and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.concat.merge import refuse_experts
from compression_dags.depth.plan import Evidence, MergePlan, MergeStage, ProbeContext
from compression_dags.depth.reasons import LEAST_TOTAL, by_grouping
from compression_dags.depth.windows import (
    cheapest_groups,
    greedy_groups,
    influence_shares,
    joinable,
    most_removed,
    window_distance,
)
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision

if TYPE_CHECKING:
    from compression_dags.depth.concat.layers import Choose, Chosen, StudentLayer
    from compression_dags.depth.concat.search import Search
    from compression_dags.depth.concat.sensitivity import Sensitivity

#: Most original layers in one, where a recipe does not say: every one should be able to give a KV group.
LARGEST_GROUP = 4
UNIT = "angular distance from the entry to the exit of the merged layers (SBI)"


class ConcatStage(MergeStage):
    """What the methods that concatenate have in common."""

    needs: ClassVar[tuple[str, ...]] = ("block_influence", "angular")
    reads_statistics: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    method: str
    score: Literal["l1", "l2"] = Field(
        "l1",
        description="sensitivity of a unit: mean |a| · L1 norm of its column (the paper), or root mean square · L2",
    )
    largest_group: int | None = Field(
        None,
        ge=2,
        description=f"most original layers in one; default {LARGEST_GROUP}, fewer where there are fewer KV heads",
    )

    def largest(self, shape: ModelShape) -> int:
        return self.largest_group or min(LARGEST_GROUP, shape.kv_heads)

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        name = f"merge: {self.method}"
        refuse_experts(shape, name)
        members = max(2, self.largest_group or 2)
        if shape.kv_heads < members:
            raise InputError(
                f"{name} would make one of up to {members} layers, but a layer has {shape.kv_heads} KV head(s) to "
                "share among them: lower largest_group, or drop layers instead (shortgpt, sleb)"
            )
        count, largest = self.removed(shape.layers), self.largest(shape)
        most = most_removed(shape, self.free_layers(shape.layers), largest)
        if count > most:
            raise InputError(
                f"{name} is to remove {count} of {shape.layers} layers, but at most {most} can be merged away: groups "
                f"of at most {largest} adjacent unprotected layers of one kind (protect_first {self.protect_first}, "
                f"protect_last {self.protect_last})"
            )

    def _one_shot(
        self,
        shape: ModelShape,
        evidence: Evidence,
        probe: ProbeContext,
        groups: Sequence[range],
        shares: str,
        power: float,
        rule: str = LEAST_TOTAL,
    ) -> tuple[MergePlan, list[Decision]]:
        """Every group as one layer, from the statistics of the calibration pass alone; `rule` says how they came."""
        from compression_dags.depth.concat.layers import concatenated, ledger, plan_of, whole
        from compression_dags.depth.concat.sensitivity import layer_sensitivity

        layers, steps = [], []
        for group in probe.progress(groups, f"{self.method} (layers)"):
            members = [whole(i, shape) for i in group]
            if len(group) == 1:
                layers += members
                continue
            args = (probe.source, evidence.statistics)
            known = [layer_sensitivity(*args, i, self.score, probe.device) for i in group]
            influence = [float(evidence.block_influence[i]) for i in group]
            chosen, given, note = choose(known, influence, shares, power, shape)
            layers.append(settled(concatenated(members, chosen, given), shares, shape))
            distance = float(evidence.angular[group.start, group.stop])
            step = {"step": len(steps), "span": list(group), "distance": distance, "influence": influence}
            steps.append({**step, **note})
        plan = plan_of(self.method, "concat", layers, shape)
        note = {"mode": "one-shot", "score": self.score, "shares_by": shares, "layer_forwards": 0}
        may_join = joinable(shape, self.free_layers(shape.layers))
        alone = by_grouping(self, groups, evidence.angular, may_join, lambda *_: "", rule)
        return plan, ledger(plan, layers, steps, UNIT, note, alone.__getitem__, rule)

    def _searched(self, search: Search, note: dict[str, Any]) -> tuple[MergePlan, list[Decision]]:
        from compression_dags.depth.concat.layers import ledger

        plan, blocks = search.plan(self.method), search.probe.blocks
        cost = {
            "layer_forwards": search.layer_forwards,
            "sequences": len(blocks.lengths),
            "tokens": blocks.tokens,
        }
        note = {"mode": "progressive", "score": self.score, **note, **cost}

        def alone(index: int) -> str:
            return self.protection(index, search.shape.layers) or search.alone(index)

        return plan, ledger(plan, search.layers, search.steps, UNIT, note, alone)

    def _search(self, shape: ModelShape, evidence: Evidence, probe: ProbeContext) -> Search:
        from compression_dags.depth.concat.search import Limits, Search
        from compression_dags.depth.concat.student_pass import AllTokens

        goal = shape.layers - self.removed(shape.layers)
        limits = Limits(self.free_layers(shape.layers), self.largest(shape), goal)
        return Search(shape, probe, limits, form="concat", score=self.score, rule=AllTokens(), evidence=evidence)


def choose(
    known: Sequence[Sensitivity], influence: Sequence[float], shares: str, power: float, shape: ModelShape
) -> tuple[Chosen, tuple[float, ...], dict[str, Any]]:
    """What a merge keeps of every member, the members' shares, and what to note of it.

    Args:
        known, influence: of every member.
        shares: `bi`, `equal` or `free`.
    """
    from compression_dags.depth.concat.layers import chosen_by_shares, chosen_freely

    given = influence_shares(influence, power if shares == "bi" else 0.0)
    chosen = chosen_freely(known, shape) if shares == "free" else chosen_by_shares(known, given, shape)
    note: dict[str, Any] = {kind: [len(c[kind]) for c in chosen] for kind in ("channels", "heads")}
    return chosen, given, note | ({} if shares == "free" else {"shares": list(given)})


def settled(layer: StudentLayer, shares: str, shape: ModelShape) -> StudentLayer:
    """A merged layer whose shares are what its members really give, where no prior set them."""
    from compression_dags.depth.concat.layers import by_contribution

    return by_contribution(layer, shape) if shares == "free" else layer


class Come(ConcatStage):
    """Merge adjacent layers into one of the stock shape that keeps the most sensitive channels and heads of each.

    CoMe (Wang et al. 2025, arXiv 2510.15304). Each step takes the two neighbours whose entry and exit are closest in
    angle (SBI), gives each member a share of the channels and KV groups (BI^p / Σ BI^p), keeps the units of largest
    mean |activation| · ‖column‖₁, and measures again. Unlike the released code: SBI over all tokens instead of the last
    of each sequence and before the final norm, cosines in float32, each member's norm folded into its rows, query heads
    with their own KV head, biases added, ends protected, layers of one kind only. `one-shot` chooses everything from
    the cached calibration pass, without running the model.
    """

    version: ClassVar[str] = "1"
    method: Literal["come"] = "come"
    mode: Literal["progressive", "one-shot"] = Field(
        "progressive", description="progressive: measure again after every merge; one-shot: from the cached pass alone"
    )
    windows: Literal["optimal", "greedy"] = Field(
        "optimal", description="one-shot: groups of least total distance, or pair by pair"
    )
    shares: Literal["bi", "equal", "free"] = Field(
        "bi", description="bi: by block influence; equal; free: one ranking of all members' units"
    )
    power: float = Field(1.0, ge=0, description="exponent p of block influence in the shares")

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        assert probe is not None  # `measures`
        self.check(shape)
        if self.mode == "one-shot":
            rule = "the grouping, pair by pair, of least" if self.windows == "greedy" else LEAST_TOTAL
            groups = self._groups(shape, evidence)
            return self._one_shot(shape, evidence, probe, groups, self.shares, self.power, rule)
        search = self._search(shape, evidence, probe)

        def both(position: int) -> tuple[StudentLayer, dict[str, Any]]:
            pair = (position, position + 1)
            influence = [search.influence[p] for p in pair]
            known = [search.sensitivity(p) for p in pair]
            chosen, given, note = choose(known, influence, self.shares, self.power, shape)
            return settled(search.merged(position, chosen, given), self.shares, shape), note

        search.run(both, "come (merges)")
        return self._searched(search, {"shares_by": self.shares, "power": self.power})

    def _groups(self, shape: ModelShape, evidence: Evidence) -> list[range]:
        free, goal = self.free_layers(shape.layers), shape.layers - self.removed(shape.layers)
        if self.windows == "greedy":
            may_join = joinable(shape, free)
            groups = greedy_groups(shape.layers, goal, self.largest(shape), may_join, evidence.angular)
        else:
            distance = window_distance(shape, free, evidence.angular)
            groups = cheapest_groups(shape.layers, goal, self.largest(shape), distance)
        assert groups is not None  # `check` refused the impossible
        return groups


class ComeP(ConcatStage):
    """CoMe with the share of each pair found by trial: r = 0, 1/G, …, 1 of the first layer, the best one is kept.

    CoMe-P, the posterior variant of arXiv 2510.15304 (its released code stops with an error before the first merge).
    Pairs are chosen as in `come`. `loss` compares the next-token loss of the whole student, from the cached states
    below the pair; `window` the error of the pair's exit state against that of the original layers on the same entry
    state. r = 0 and r = 1 are plain drops of a layer, bit for bit, so the search contains its own baseline.
    """

    version: ClassVar[str] = "1"
    method: Literal["come-p"] = "come-p"
    by: Literal["loss", "window"] = Field("loss", description="what the ratios are compared by")
    granularity: int = Field(20, ge=1, description="G: ratios 0, 1/G, …, 1 are tried")
    rows: int = Field(16, ge=1, description="calibration sequences on which ratios are compared, taken evenly")

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        from compression_dags.depth.concat.trials import ratio_trials

        assert probe is not None  # `measures`
        self.check(shape)
        search = self._search(shape, evidence, probe)
        trials: Choose = ratio_trials(search, self)
        search.run(trials, "come-p (merges)")
        rows = min(self.rows, len(probe.blocks.lengths))
        note = {"by": self.by, "granularity": self.granularity, "trial_rows": rows}
        return self._searched(search, note)
