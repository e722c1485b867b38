"""How reasons put numbers, ranks and lists of layers into words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def number(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits; whole numbers in full, ∞ and NaN as words."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def apart(*values: float) -> list[str]:
    """The values with as many significant digits, from 3 up, as tell different ones apart."""
    for digits in range(3, 17):
        said = [number(v, digits) for v in values]
        if len(set(said)) == len(set(values)):
            return said
    return [repr(v) for v in values]


def ordinal(place: int) -> str:
    """1 → `1st`, 12 → `12th`, 22 → `22nd`."""
    ending = "th" if 10 < place % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def ranked(place: int, superlative: str) -> str:
    """1, `lowest` → `the lowest`; 3, `lowest` → `the 3rd lowest`."""
    return f"the {superlative}" if place == 1 else f"the {ordinal(place)} {superlative}"


def counted(count: int, noun: str) -> str:
    """2, `layer` → `2 layers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def joined(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def layers_said(indices: Iterable[int]) -> str:
    """`layer 3`, `layers 3 and 4`, `layers 3 to 6`, `layers 1, 4 and 6`."""
    found = sorted(indices)
    if len(found) == 1:
        return f"layer {found[0]}"
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"layers {found[0]} to {found[-1]}"
    return f"layers {joined([str(i) for i in found])}"
