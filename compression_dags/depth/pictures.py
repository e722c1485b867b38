"""The picture of a merge plan, drawn from what is stored: every method's plans alike, and old ones too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression_dags.depth.plan import MergePlan
from compression_dags.provenance.artifacts import DECISIONS
from compression_dags.provenance.decisions import read_decisions
from compression_dags.provenance.plots import ACCENT, LIGHT, SECOND, SOFT, sorted_bars_png

STAYS, GOES, HOLDS, MERGED = "stays", "goes", "others are merged into it", "merged into another"
COLOURS = {STAYS: SOFT, GOES: SECOND, HOLDS: ACCENT, MERGED: LIGHT}


def plan_png(directory: Path) -> bytes:
    """PNG bytes of a stored plan: a bar a layer as high as the value that decided, in the colour of its fate."""
    fates = fates_of(MergePlan.outline(directory))
    rows = read_decisions(directory / DECISIONS).to_dict("records")
    values: list[float | None] = [None] * len(fates)
    for row in rows:  # in the order of deciding: of a layer in several merges the last one counts
        for layer in _layers(row):
            values[layer] = None if row["value"] != row["value"] else row["value"]
    return sorted_bars_png(values, fates, COLOURS, "layer", rows[0]["unit"] if rows else "")


def fates_of(plan: MergePlan) -> list[str]:
    """What becomes of each original layer: a key of `COLOURS`."""
    fates = [GOES] * plan.base_layers
    for layer in plan.layers:
        for source in layer.sources:
            fates[source] = STAYS if layer.kept else HOLDS if source == layer.slot else MERGED
    return fates


def _layers(row: Mapping[Any, Any]) -> list[int]:
    """The layers that a decision is about: one, or all that a search joined in one round."""
    one = re.fullmatch(r"layer (\d+)", row["target"])
    return [int(one[1])] if one else list(row["sources"])
