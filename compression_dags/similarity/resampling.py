"""Intervals over prompts: repeated half-samples of the calibration sequences.

Tokens of one sequence are not independent, so whole sequences are drawn. Half of them, without repetition, have the
sampling variance of an ordinary bootstrap (a half-sample of S has variance (σ²/m)(1 − m/S) = σ²/S at m = S/2), and no
row twice: repeated rows pull mutual information and HSIC up, which an ordinary bootstrap would take for signal.
Source: McCarthy 1969 (balanced half-samples); Shao & Wu 1989 (delete-d jackknife).
"""

from __future__ import annotations

import numpy as np

SHARE = 0.90


def half_samples(sequences: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Rows whose sequence is in each half-sample: (resamples, n) bool. None (0, n) for fewer than two sequences.

    Args:
        sequences: (n,) integer, the sequence of every row.
    """
    names, row = np.unique(sequences, return_inverse=True)
    if len(names) < 2:
        return np.zeros((0, len(sequences)), dtype=bool)
    rng = np.random.default_rng(seed)
    drawn = np.zeros((resamples, len(names)), dtype=bool)
    for chosen in drawn:
        chosen[rng.permutation(len(names))[: len(names) // 2]] = True
    return drawn[:, row]


def interval(
    value: np.ndarray, replicates: np.ndarray, sequences: int, least: float, most: float
) -> tuple[np.ndarray, np.ndarray]:
    """The central 90 % interval around `value`, in [least, most].

    Replicates are centred at their own mean, because an estimate from half of the rows has another bias than one from
    all. Without replicates nothing is known: the interval is all of [least, most].

    Args:
        value: (L, L).
        replicates: (R, L, L), the same statistic on every half-sample.
        sequences: S, of which ⌊S/2⌋ are in every half-sample.
    """
    if not len(replicates):
        return np.full_like(value, least), np.full_like(value, most)
    half = sequences // 2
    spread = (replicates - replicates.mean(axis=0)) * np.sqrt(half / (sequences - half))
    low, high = np.quantile(spread, [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0)
    # the point itself always belongs to its interval, also where the quantiles of few replicates do not straddle it
    low, high = value + np.minimum(low, 0.0), value + np.maximum(high, 0.0)
    return np.clip(low, least, most), np.clip(high, least, most)
