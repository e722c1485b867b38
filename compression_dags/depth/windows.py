"""Which adjacent layers become one: the cheapest groups of a stack, the next pair of a greedy search, prior shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError

if TYPE_CHECKING:
    from compression_dags.depth.stage import MergeStage


def joinable(shape: ModelShape, free: range) -> list[bool]:
    """(L − 1) whether layers i and i + 1 may be in one group: both unprotected, and of one kind."""
    pairs = zip(range(shape.layers - 1), range(1, shape.layers), strict=True)
    return [a >= free.start and b < free.stop and shape.kind(a) == shape.kind(b) for a, b in pairs]


def window_distance(shape: ModelShape, free: range, angular: np.ndarray) -> Callable[[range], float]:
    """Distance from the entry of a group's first layer to the exit of its last; ∞ where it must not be a group.

    Args:
        angular: (L+1, L+1) distances between the states at the entries of two layers.
    """

    def distance(group: range) -> float:
        if len(group) == 1:
            return 0.0
        if group.start < free.start or group.stop > free.stop or len({shape.kind(i) for i in group}) > 1:
            return math.inf
        return float(angular[group.start, group.stop])

    return distance


def cheapest_groups(layers: int, goal: int, largest: int, cost: Callable[[range], float]) -> list[range] | None:
    """The `goal` contiguous groups of at most `largest` layers that cover all `layers` at the least total cost.

    Exact, by dynamic programming in O(goal · layers · largest); None if every way to do it costs ∞.
    """
    best = np.full((goal + 1, layers + 1), np.inf)
    cut = np.zeros((goal + 1, layers + 1), dtype=int)
    best[0, 0] = 0.0
    for count in range(1, goal + 1):
        for end in range(1, layers + 1):
            for start in range(max(0, end - largest), end):
                total = best[count - 1, start] + cost(range(start, end))
                if total < best[count, end]:
                    best[count, end], cut[count, end] = total, start
    if not np.isfinite(best[goal, layers]):
        return None
    groups, end = [], layers
    for count in range(goal, 0, -1):
        groups.append(range(cut[count, end], end))
        end = cut[count, end]
    return groups[::-1]


def fewest_groups(groups: Sequence[range], may_join: Sequence[bool], largest: int) -> int:
    """The least number of groups that joining neighbours can lead to, none with more than `largest` layers."""
    found, size = 0, 0
    for group in groups:
        if found and may_join[group.start - 1] and size + len(group) <= largest:
            size += len(group)
        else:
            found, size = found + 1, len(group)
    return found


def most_removed(shape: ModelShape, free: range, largest: int) -> int:
    """The most layers that groups of at most `largest` unprotected layers of one kind can save."""
    alone = [range(i, i + 1) for i in range(shape.layers)]
    return shape.layers - fewest_groups(alone, joinable(shape, free), largest)


def refuse_more(stage: MergeStage, shape: ModelShape, largest: int) -> None:
    """Refuse to merge more layers away than groups of at most `largest` allow.

    Raises:
        InputError: with the count and the most.
    """
    count, most = stage.removed(shape.layers), most_removed(shape, stage.free_layers(shape.layers), largest)
    if count > most:
        raise InputError(
            f"merge: {stage.method} is to remove {count} of {shape.layers} layers, but at most {most} can be merged "
            f"away: groups of at most {largest} adjacent unprotected layers of one kind (protect_first "
            f"{stage.protect_first}, protect_last {stage.protect_last})"
        )


def next_pair(
    groups: Sequence[range], scores: Sequence[float], may_join: Sequence[bool], largest: int, goal: int
) -> int | None:
    """The position p of least score (ties: the lowest) whose groups p and p + 1 may be joined; None if there is none.

    A pair after which `goal` groups could not be reached any more is passed over: a greedy search may strand single
    layers between full groups.

    Args:
        scores: (groups − 1) one for every pair of neighbours.
    """
    for p in sorted(range(len(groups) - 1), key=lambda p: (scores[p], p)):
        a, b = groups[p], groups[p + 1]
        if not may_join[b.start - 1] or len(a) + len(b) > largest or not math.isfinite(scores[p]):
            continue
        after = [*groups[:p], range(a.start, b.stop), *groups[p + 2 :]]
        if fewest_groups(after, may_join, largest) <= goal:
            return p
    return None


def greedy_groups(
    layers: int, goal: int, largest: int, may_join: Sequence[bool], angular: np.ndarray
) -> list[range] | None:
    """Groups that joining the closest two neighbours, again and again, leads to; None if `goal` cannot be reached."""
    groups = [range(i, i + 1) for i in range(layers)]
    while len(groups) > goal:
        scores = [float(angular[a.start, b.stop]) for a, b in pairwise(groups)]
        p = next_pair(groups, scores, may_join, largest, goal)
        if p is None:
            return None
        groups[p : p + 2] = [range(groups[p].start, groups[p + 1].stop)]
    return groups


def influence_shares(influence: Sequence[float] | np.ndarray, power: float) -> tuple[float, ...]:
    """CoMe's prior share of every member, BI_i^p / Σ BI^p; they sum to 1."""
    weight = np.maximum(influence, 1e-12)
    weight = (weight / weight.max()) ** power  # of the largest, so that no power makes all of them vanish
    share = weight / weight.sum()
    return (*map(float, share[:-1]), float(1.0 - share[:-1].sum()))
