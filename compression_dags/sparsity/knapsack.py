"""Sharing a budget of kept parameters among units (layers or matrices) within bounds.

* `fill_greedy`: maximise Σ v_i d_i subject to Σ p_i d_i ≤ B, low ≤ d ≤ high: a fractional knapsack, solved exactly by
  filling units in order of v_i / p_i. Values are given as logarithms, because ALS's span hundreds of decades and an LP
  solver's absolute tolerances then return its starting point or leave the budget unspent.
* `fill_smooth`: maximise Σ v_i d_i − λ Σ k_i (d_i − d̄)² with Σ p_i d_i = B. For a multiplier ν,
  d_i = clip(d̄ + (v_i − ν p_i) / (2 λ k_i)): piecewise linear in ν, so ν is found exactly between two breakpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compression_dags.errors import InputError

#: Units whose log v/p differ by less are equal, and share what is left in equal parts of their range.
TIE = 1e-12
_SLACK = 1e-9


@dataclass(frozen=True)
class Filled:
    """Attributes:
    density: (n,) float64, kept share of every unit.
    log_price: log of the value that one more parameter of budget would bring: v/p of the unit filled last; −inf
        if the budget is not used up.
    """

    density: np.ndarray
    log_price: float


def fill_greedy(log_value: np.ndarray, size: np.ndarray, low: np.ndarray, high: np.ndarray, budget: float) -> Filled:
    """Exact solution; among equal v/p the one that treats them alike.

    Args:
        log_value: (n,) log v_i.
        size: (n,) p_i > 0.
        low, high: (n,) bounds of the density.

    Raises:
        InputError: the lower bounds alone exceed the budget.
    """
    _check(size, low, high, budget)
    rate = log_value - np.log(size)
    density, left, price = low.astype(np.float64).copy(), float(budget - size @ low), -np.inf
    for tied in _ties(rate):
        room = float(size[tied] @ (high - low)[tied])
        if room <= 0:
            continue
        part = min(1.0, max(0.0, left / room))
        density[tied] = low[tied] + part * (high - low)[tied]
        left -= part * room
        if left <= _SLACK * budget:
            price = float(rate[tied].max())
            break
    return Filled(density, price)


def _ties(rate: np.ndarray) -> list[np.ndarray]:
    """Indices by falling rate, equal ones together."""
    order = np.argsort(-rate, kind="stable")
    breaks = np.flatnonzero(-np.diff(rate[order]) > TIE) + 1
    return np.split(order, breaks)


def fill_smooth(
    value: np.ndarray,
    size: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    budget: float,
    *,
    centre: np.ndarray | float = 0.0,
    strength: float = 0.5,
    curvature: np.ndarray | float = 1.0,
) -> Filled:
    """Exact solution of the quadratic form; `strength` is λ > 0, `curvature` k_i > 0.

    Raises:
        InputError: the bounds do not allow the budget.
    """
    _check(size, low, high, budget)
    if size @ high < budget * (1 - _SLACK):
        raise InputError(f"budget {budget:.6g} exceeds {size @ high:.6g}, all that the upper bounds allow")
    slope = 2 * strength * np.broadcast_to(np.asarray(curvature, dtype=np.float64), size.shape)
    middle = np.broadcast_to(np.asarray(centre, dtype=np.float64), size.shape)

    def at(multiplier: float) -> np.ndarray:
        return np.clip(middle + (value - multiplier * size) / slope, low, high)

    edges = np.concatenate([(value - slope * (bound - middle)) / size for bound in (low, high)])
    multiplier = crossing(edges, lambda nu: float(size @ at(nu)), budget)
    return Filled(at(multiplier), float(np.log(multiplier)) if multiplier > 0 else -np.inf)


def scaled_to(ratio: np.ndarray, size: np.ndarray, most: float, budget: float) -> np.ndarray:
    """min(k · ratio, most) with the factor k that makes Σ size · min(…) = budget. `ratio` ≥ 0, not all 0."""

    def at(factor: float) -> np.ndarray:
        return np.minimum(factor * ratio, most)

    edges = np.concatenate([[0.0], most / ratio[ratio > 0]])
    return at(crossing(edges, lambda factor: float(size @ at(factor)), budget))


def crossing(edges: np.ndarray, spend: Callable[[float], float], goal: float) -> float:
    """Where a monotone function, linear between `edges` and constant outside them, equals `goal` (or is nearest)."""
    edges = np.unique(edges)
    first, last = 0, len(edges) - 1
    ends = spend(edges[first]), spend(edges[last])
    rising = ends[1] >= ends[0]
    while last - first > 1:
        middle = (first + last) // 2
        if (spend(edges[middle]) < goal) == rising:
            first = middle
        else:
            last = middle
    below, above = spend(edges[first]), spend(edges[last])
    if above == below:
        return float(edges[first])
    part = min(1.0, max(0.0, (goal - below) / (above - below)))
    return float(edges[first] + part * (edges[last] - edges[first]))


def _check(size: np.ndarray, low: np.ndarray, high: np.ndarray, budget: float) -> None:
    if (size <= 0).any():
        raise InputError("every unit needs a positive size")
    if (low > high).any():
        worst = int(np.argmax(low - high))
        raise InputError(f"lower bound {low[worst]:.6g} is above the upper bound {high[worst]:.6g}")
    if size @ low > budget * (1 + _SLACK):
        raise InputError(f"budget {budget:.6g} is below {size @ low:.6g}, the least that the lower bounds allow")
