"""Which neighbours a similarity merges, and in what order: mean linkage, without torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Merge:
    """One step of merging neighbours.

    Attributes:
        first, second: adjacent groups of layers; `second` starts where `first` stops.
        value: mean similarity of their members.
        low, high: the mean of the members' interval bounds.
        overlaps: other candidates of the same step whose interval reaches `low`: from that many, this merge cannot be
            told apart.
    """

    first: range
    second: range
    value: float
    low: float
    high: float
    overlaps: int


def merge_tree(
    similarity: np.ndarray,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    *,
    allowed: Callable[[range, range], bool] = lambda first, second: True,
    count: int | None = None,
) -> list[Merge]:
    """The merges of the most similar allowed neighbours, again and again, with mean linkage; of equal ones the rear.

    Args:
        similarity, low, high: (L, L), and the bounds of its interval (default: the value itself).
        allowed: whether two neighbouring groups may become one.
        count: merges wanted; None goes on while any is allowed.

    Returns:
        Merges in order, fewer than `count` if no more are allowed.
    """
    bounds = [similarity if b is None else b for b in (similarity, low, high)]
    groups = [range(i, i + 1) for i in range(len(similarity))]
    found: list[Merge] = []
    while count is None or len(found) < count:
        pairs = [(a, b) for a, b in itertools.pairwise(groups) if allowed(a, b)]
        if not pairs:
            break
        scores = [[float(m[a.start : a.stop, b.start : b.stop].mean()) for m in bounds] for a, b in pairs]
        best = max(range(len(pairs)), key=lambda i: (scores[i][0], i))
        value, least, most = scores[best]
        overlaps = sum(i != best and score[2] >= least for i, score in enumerate(scores))
        first, second = pairs[best]
        found.append(Merge(first, second, value, least, most, overlaps))
        place = groups.index(first)
        groups[place : place + 2] = [range(first.start, second.stop)]
    return found
