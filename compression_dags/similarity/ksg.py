"""Mutual information by nearest neighbours (Kraskov, Stögbauer & Grassberger 2004), of many pairs at once.

The values are scikit-learn's `mutual_info_regression`, which MKA's released code calls twice a pair of layers.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree
from scipy.special import digamma

#: Standard deviation of the tie-breaking jitter, for coordinates of unit variance (scikit-learn's).
_JITTER = 1e-10
#: Fixed-point steps between two ranks, and of the jitter's standard deviation (8 of them are a quarter of a rank).
_RANK, _RANK_JITTER = 1 << 20, 1 << 15
#: Tokens up to which (n, n) tables of differences are faster than k-d trees. At most 255: counts are bytes.
_DENSE = 192


def ksg_information(columns: np.ndarray, group: int = 1, neighbours: int = 5, seed: int = 0) -> np.ndarray:
    """Information in nats of every pair (i, j) of scalar coordinates whose groups are in order: (C, n) → (C, C).

    ψ(n) + ψ(k) − E[ψ(n_x + 1) + ψ(n_y + 1)], not below 0; n_x is the number of other points nearer in x than the k-th
    neighbour is in the maximum norm. Coordinates get unit variance and a jitter of 1e-10, as in scikit-learn. Here it
    is fixed for each coordinate, so results do not change from run to run. It differs between the roles of x and y,
    so that a coordinate paired with itself is not degenerate.

    Args:
        columns: float, or integer for ranks 0 … n − 1. Ranks have one variance and need only the order of their
            distances, so they are held in 32-bit fixed point, which halves the time.
        group: consecutive coordinates that belong together (to one layer). Entries with j in an earlier group are 0.
    """
    count = columns.shape[1]
    noise = np.random.default_rng(seed).standard_normal((2, *columns.shape))
    if np.issubdtype(columns.dtype, np.integer):
        a, b = columns * _RANK + np.rint(np.clip(noise, -7.9, 7.9) * _RANK_JITTER).astype(np.int64)
    else:
        x = columns / columns.std(axis=1, keepdims=True)
        a, b = x + noise * _JITTER * np.maximum(np.abs(x).mean(axis=1, keepdims=True), 1.0)
    near = (_dense_digammas if count <= _DENSE else _tree_digammas)(a, b, group, neighbours)
    information = np.maximum(digamma(count) + digamma(neighbours) - near, 0.0)
    order = np.arange(len(columns)) // group
    return np.where(order[:, None] <= order[None, :], information, 0.0)


def neighbour_entropies(points: np.ndarray, neighbours: int = 50) -> np.ndarray:
    """H = E[log(n r^d / K)], r the Euclidean distance to the K-th neighbour: (L, n, d) → (L,), as MKA's code has it.

    The volume of the unit ball and the digamma terms of Kozachenko & Leonenko are missing there, and here.
    """
    _, count, dimensions = points.shape
    found = []
    for layer in points:
        square = np.square(layer[:, None, :] - layer[None, :, :]).sum(axis=2)
        square.partition(neighbours, axis=1)  # the nearest is the point itself
        found.append(np.log(count * square[:, neighbours] ** (dimensions / 2) / neighbours).mean())
    return np.array(found)


def _dense_digammas(a: np.ndarray, b: np.ndarray, group: int, neighbours: int) -> np.ndarray:
    """E[ψ(n_x + 1) + ψ(n_y + 1)] of every pair in order, from the (n, n) differences of every coordinate."""
    total, count = a.shape
    table = digamma(np.arange(1, count + 1))
    kind, far = (np.int32, np.iinfo(np.int32).max) if a.dtype == np.int64 else (np.float64, np.inf)
    x, y = (np.abs(c[:, :, None] - c[:, None, :]).astype(kind) for c in (a, b))
    for apart in (x, y):
        apart[:, np.arange(count), np.arange(count)] = far
    farther, nearer = np.empty_like(y), np.empty(y.shape, dtype=bool)
    found = np.zeros((total, total))
    for i in range(total):  # against all later coordinates at once; nothing is copied or allocated
        start = i // group * group
        both, mask, theirs = farther[start:], nearer[start:], y[start:]
        np.maximum(x[i], theirs, out=both)
        both.partition(neighbours - 1, axis=2)
        radius = both[:, :, neighbours - 1, None].copy()
        for apart in (x[i], theirs):
            np.less(apart, radius, out=mask)
            found[i, start:] += table[np.einsum("pij->pi", mask.view(np.uint8))].mean(axis=1)
    return found


def _tree_digammas(a: np.ndarray, b: np.ndarray, group: int, neighbours: int) -> np.ndarray:
    """The same with a k-d tree a pair and sorted coordinates: O(n log n) a pair."""
    total, count = a.shape
    table = digamma(np.arange(1, count + 1))
    a, b = a.astype(np.float64), b.astype(np.float64)
    left, right = np.sort(a, axis=1), np.sort(b, axis=1)
    found = np.zeros((total, total))
    for i in range(total):
        for j in range(i // group * group, total):
            points = np.stack([a[i], b[j]], axis=1)
            radius = np.asarray(KDTree(points).query(points, k=neighbours + 1, p=np.inf)[0])[:, -1]
            both = table[_nearer(left[i], a[i], radius)] + table[_nearer(right[j], b[j], radius)]
            found[i, j] = both.mean()
    return found


def _nearer(ordered: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How many other points lie at |x − x'| < r, exactly: the rounding of x ± r is put right by one step each way."""
    last = len(x) - 1
    low = np.searchsorted(ordered, x - radius)
    low += x - ordered[np.minimum(low, last)] >= radius
    low -= x - ordered[np.maximum(low - 1, 0)] < radius
    high = np.searchsorted(ordered, x + radius)
    high -= ordered[np.maximum(high - 1, 0)] - x >= radius
    high += ordered[np.minimum(high, last)] - x < radius
    return np.clip(high, 0, last + 1) - np.clip(low, 0, last + 1) - 1
