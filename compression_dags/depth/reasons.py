"""Why a depth method kept, dropped or merged a layer: the sentences that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from compression_dags.depth.stage import MergeStage
from compression_dags.provenance.wording import apart, counted, layers_said, number, ranked

LEAST_TOTAL = "the grouping of least total"


def by_score(
    stage: MergeStage, total: int, gone: set[int], scores: Sequence[float] | np.ndarray, what: str
) -> list[str]:
    """A reason for every layer where those of lowest score are dropped, of equal scores the earlier.

    Args:
        scores: (total,) of all layers.
        what: name of the score, such as `block influence`.
    """
    free = list(stage.free_layers(total))
    place = {i: p for p, i in enumerate(sorted(free, key=lambda i: (scores[i], i)), 1)}
    lowest = "lowest is" if len(gone) == 1 else f"{len(gone)} lowest are"
    reasons = []
    for i in range(total):
        score = f"{what} {number(scores[i])}"
        if why := stage.protection(i, total):
            reasons.append(f"{why}; its {score} was not compared")
            continue
        rank = f"{score} is {ranked(place[i], 'lowest')} of the {len(free)} unprotected layers"
        if i in gone:
            reasons.append(f"dropped: {rank}, and the {lowest} removed")
        else:
            tie = "; of equal ones the earlier goes" if any(scores[i] == scores[j] for j in gone) else ""
            reasons.append(f"kept: {rank}, and only the {lowest} removed{tie}")
    return reasons


def from_the_end(stage: MergeStage, total: int, gone: Sequence[int], by: str) -> list[str]:
    """A reason for every layer where the last unprotected ones are dropped.

    Args:
        by: whose rule it is, such as `the released code`.
    """
    reasons = []
    for i in range(total):
        place = f"{counted(total - 1 - i, 'layer')} from the output"
        if why := stage.protection(i, total):
            reasons.append(why)
        elif i in gone:
            rank = ranked(max(gone) - i + 1, "last")
            reasons.append(f"dropped: {place}, {rank} of the unprotected layers, and {by} removes the last {len(gone)}")
        else:
            reasons.append(f"kept: {place}, and {by} removes only {layers_said(gone)}, nearest to it")
    return reasons


def by_grouping(
    stage: MergeStage,
    groups: Sequence[range],
    angular: np.ndarray,
    may_join: Sequence[bool],
    merged: Callable[[int, range], str],
    rule: str = LEAST_TOTAL,
) -> list[str]:
    """A reason for every layer where a grouping of adjacent layers was chosen by angular distance.

    Args:
        angular: (L+1, L+1) distances between the states at the entries of two layers.
        may_join: (L − 1) whether a layer and the next may be in one group.
        merged: (layer, its group) → how the sentence about a merged layer begins.
        rule: how the groups were found.
    """
    total = groups[-1].stop
    cost = {g: float(angular[g.start, g.stop]) for g in groups if len(g) > 1}
    whole = f"{rule} angular distance that leaves {len(groups)} layers"
    reasons = []
    for group in groups:
        for i in group:
            if why := stage.protection(i, total):
                reasons.append(why)
            elif len(group) > 1:
                begin = merged(i, group)
                reasons.append(f"{begin}: {layers_said(group)}, {number(cost[group])} apart, are one in {whole}")
            else:
                pairs = [(float(angular[a, a + 2]), 2 * a + 1 - i) for a in (i - 1, i) if _joins(a, may_join)]
                if not pairs:
                    reasons.append("kept: no unprotected neighbour of its kind is there to merge it with")
                    continue
                least, neighbour = min(pairs)
                total_cost, alone = apart(sum(cost.values()), least)
                reasons.append(
                    f"kept: alone in {whole} ({total_cost}); with layer {neighbour} it would have been {alone} apart"
                )
    return reasons


def _joins(first: int, may_join: Sequence[bool]) -> bool:
    return 0 <= first < len(may_join) and may_join[first]
