"""The kinds of artifacts that recipes' steps make, in pipeline order, each with the kinds that it may read."""

from __future__ import annotations

from dataclasses import replace

from compression_dags.calibration.steps import KINDS as CALIBRATION
from compression_dags.registry import stage_kinds
from compression_dags.similarity.steps import KINDS as SIMILARITY
from compression_dags.step import BASE, WEIGHTS, Kind

#: Group of the analysis that recipes share; the other groups are stages.
ANALYSIS = "analysis"


def _table() -> dict[str, tuple[str, Kind]]:
    """Name → group and kind; the role `weights` is every kind that may have made them."""
    found = {kind.name: (ANALYSIS, kind) for kind in (*CALIBRATION, *SIMILARITY)}
    made: list[str] = []
    for stage, kinds in stage_kinds().items():
        for kind in kinds:
            reads = [n for role in kind.reads for n in ((BASE, *made) if role == WEIGHTS else (role,))]
            found[kind.name] = (stage, replace(kind, reads=tuple(dict.fromkeys(reads))))
            made += [kind.name] * kind.weights
    return found


TABLE = _table()
WEIGHTS_KINDS = tuple(name for name, (_, kind) in TABLE.items() if kind.weights)
#: Kinds that decide something: `merged_weights` only applies a plan.
DECIDERS = tuple(name for name, (group, _) in TABLE.items() if group != ANALYSIS and name != "merged_weights")
