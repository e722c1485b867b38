"""A solution as a recipe file that runs like any other, its evidence in the comments above."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from compression_dags.architectures import Architecture
from compression_dags.planning.budget_solver import Solution
from compression_dags.planning.candidates import Candidate, CandidateTable
from compression_dags.quantization.formats import Choice


def recipe_of(
    solution: Solution,
    table: CandidateTable,
    architecture: Architecture,
    *,
    name: str,
    description: str,
    calibration: dict[str, Any],
) -> dict[str, Any]:
    """The recipe's mapping, with the recovery and the quantizer that the candidate table was measured with.

    Layers are numbered as they are after depth was removed.
    """
    stages: list[dict[str, Any]] = []
    depth = [a for a in solution.taken if a.gone]
    if depth:
        drop = [layer for a in depth if a.kind == "drop" for layer in a.layers]
        fuse = [[a.layer, a.layer + 1] for a in depth if a.kind == "merge"]
        alone = {a.layer: a.cost for a in table.alternatives if len(a.layers) == 1}
        costs = {layer: round(alone[layer], 6) for layer in drop}
        costs |= {a.layer: round(a.cost, 6) for a in depth if a.kind == "merge"}
        stages.append({"merge": {"method": "planned", "drop": drop, "fuse": fuse, "costs": costs}})
        if table.recovered:
            stages.append({"recover": table.recovered})
    if sparsify := sparsify_stage(solution):
        stages.append({"sparsify": sparsify})
    if quantize := quantize_stage(solution, table, architecture):
        stages.append({"quantize": quantize})
    return {"name": name, "description": description, "calibration": calibration, "stages": stages}


def quantize_stage(solution: Solution, table: CandidateTable, architecture: Architecture) -> dict[str, Any] | None:
    """Options of the quantizer: the most frequent scheme for all, the others as overrides, what stays dense ignored."""
    chosen = chosen_schemes(solution, table)
    schemes = Counter(c for c in chosen.values() if c is not None)
    if not schemes:
        return None
    usual = min(schemes, key=lambda c: (-schemes[c], c.scheme, c.group_size or 0))
    found: dict[str, Any] = {**table.quantizer, **usual.options()}
    kept = _patterns(architecture, [cell for cell, choice in chosen.items() if choice is None])
    if kept:
        found["ignore"] = ["lm_head", *kept]
    others = sorted((c for c in schemes if c != usual), key=lambda c: (c.scheme, c.group_size or 0))
    overrides = {
        pattern: choice.options()
        for choice in others
        for pattern in _patterns(architecture, [cell for cell, own in chosen.items() if own == choice])
    }
    return found | ({"overrides": overrides} if overrides else {})


def chosen_schemes(solution: Solution, table: CandidateTable) -> dict[tuple[int, str], Choice | None]:
    """(new layer, group) → scheme, None for what stays dense."""
    found: dict[tuple[int, str], Choice | None] = {}
    for a in solution.taken:
        if a.kind != "drop":
            found |= {(_new(solution, a.layer), g): a.choice for g in table.groups if a.group in (None, g)}
    return dict(sorted(found.items(), key=lambda item: (item[0][0], table.groups.index(item[0][1]))))


def _new(solution: Solution, layer: int) -> int:
    """Number of a layer after others went."""
    return layer - sum(other < layer for a in solution.taken for other in a.gone)


def sparsify_stage(solution: Solution, method: str = "sparsegpt") -> dict[str, Any] | None:
    """Options of the pruner: each layer's share of zeros as it was chosen."""
    shares = {_new(solution, a.layer): a.share for a in solution.taken if a.kind == "sparsify"}
    if not shares:
        return None
    kept = len({(a.layer) for a in solution.taken if a.kind != "drop"})
    target = round(sum(shares.values()) / kept, 6)
    return {"method": method, "sparsity": target, "allocation": {"method": "given", "layers": shares}}


def _patterns(architecture: Architecture, cells: list[tuple[int, str]]) -> list[str]:
    """One pattern a group of projections, for all of its layers."""
    found = []
    for group in architecture.groups:
        layers = [str(layer) for layer, name in cells if name == group.name]
        if layers:
            names = "|".join(re.escape(p) for p in group.projections)
            found.append(rf"re:{re.escape(architecture.layers)}\.({'|'.join(layers)})\.({names})$")
    return found


def recipe_text(recipe: dict[str, Any], solution: Solution, table: CandidateTable) -> str:
    """The file: evidence as comments, then YAML that `load_recipe` reads."""
    lines = [
        f"# Made by `compression-dags plan`. Predicted KL {solution.cost:.4f} nats a token; "
        f"{solution.bytes:,} bytes of {solution.dense_bytes:,}, {solution.parameters:,} parameters, "
        f"{solution.bits:.2f} bits a weight.",
        f"# Costs were measured on {table.tokens:,} calibration tokens: one change at a time, all projections at one "
        f"scheme by {table.quantizer['method']}, and dropped layers "
        f"{'after recovery by ' + table.recovered['method'] if table.recovered else 'as they are'}.",
        *_mixing(table),
        "# layer  what, and the KL that it alone costs",
    ]
    for layer in range(table.layers):
        own = [a for a in solution.taken if a.layer == layer]
        if own:
            lines.append(f"# {layer:5d}  {', '.join(_said(a) for a in own)}")
    body = yaml.safe_dump(recipe, sort_keys=False, width=110, default_flow_style=None)
    return "\n".join(lines) + "\n" + body


def _mixing(table: CandidateTable) -> list[str]:
    """What mixtures of schemes were measured to cost over what the sum of their parts promised."""
    said = [f"{kl / cost:.2f} at {bits:.2f} bits" for bits, cost, kl in table.mixtures if cost > 0]
    return [f"# Mixtures of schemes cost this many times what their parts promise: {', '.join(said)}."] if said else []


def _said(a: Candidate) -> str:
    where = f"layers {', '.join(map(str, a.layers))}" if a.kind == "drop" else a.group or "all"
    return f"{where} {a.label} {a.cost:.4f}"
