"""CoMe-P's trials: the same pair merged at every ratio, compared on calibration sequences from the cached prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compression_dags.calibration.streaming import Batch
from compression_dags.depth.concat.layers import Choose, StudentLayer, chosen_by_shares
from compression_dags.depth.concat.search import Search
from compression_dags.errors import IntegrityError
from compression_dags.passes.scored_rows import chosen_rows, even_rows
from compression_dags.passes.variant_scoring import Edit, Piece, VariantScorer

if TYPE_CHECKING:
    from compression_dags.depth.concat.come import ComeP

UNITS = {"loss": "next-token loss (nats)", "window": "relative error of the exit state"}


def ratio_trials(search: Search, options: ComeP) -> Choose:
    """A `Choose` that merges a pair at every ratio and keeps the one that measures best (ties: the lowest ratio)."""
    blocks = search.probe.blocks
    probe = VariantScorer(search.student.stream, chosen_rows(blocks, even_rows(blocks, options.rows)))
    grid = [k / options.granularity for k in range(options.granularity + 1)]

    def best(position: int) -> tuple[StudentLayer, dict[str, Any]]:
        known = [search.sensitivity(p) for p in (position, position + 1)]
        layers = []
        for ratio in grid:
            shares = (ratio, 1.0 - ratio)
            layers.append(search.merged(position, chosen_by_shares(known, shares, search.shape), shares))
        before = probe.layer_forwards
        edits = [Edit(position, position + 2, (search.piece(layer, device="cpu"),)) for layer in layers]
        measure = _losses if options.by == "loss" else _window_errors
        found = measure(search, probe, position, edits)
        search.extra_forwards += probe.layer_forwards - before
        least = min(range(len(grid)), key=lambda i: (found[i], i))
        if not found[least] < float("inf"):
            raise IntegrityError(f"come-p: no ratio gives layers {list(layers[0].span)} a finite {UNITS[options.by]}")
        parts = {kind: [len(p.kept[kind]) for p in layers[least].parts] for kind in ("channels", "heads")}
        trials = {f"{r:g}": round(x, 9) if x < float("inf") else None for r, x in zip(grid, found, strict=True)}
        note = {"shares": [grid[least], 1.0 - grid[least]], **parts, "trials": trials, "trials_unit": UNITS[options.by]}
        return layers[least], note

    return best


def _losses(search: Search, probe: VariantScorer, position: int, edits: Sequence[Edit]) -> list[float]:
    return probe.losses(search.pieces, edits)


def _window_errors(search: Search, probe: VariantScorer, position: int, edits: Sequence[Edit]) -> list[float]:
    """Mean over tokens of ‖ŷ − y‖²/‖y‖², y what the pair's original layers make of the student's state at its entry."""
    below = search.pieces[: position + 2]
    span = range(search.layers[position].span.start, search.layers[position + 1].span.stop)
    originals = Edit(position, position + 2, tuple(Piece(i) for i in span))
    goal: list[Tensor] = []

    def keep(states: list[Tensor]) -> float:
        goal.extend(states)
        return 0.0

    probe.measured(below, [originals], keep)
    return probe.measured(below, edits, lambda states: relative_error(probe.batches, states, goal))


def relative_error(batches: Sequence[Batch], states: Sequence[Tensor], goal: Sequence[Tensor]) -> float:
    """Mean over real tokens of ‖s − g‖² / ‖g‖², so that tokens of large norm do not decide alone; ∞ if not finite."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch, ours, theirs in zip(batches, states, goal, strict=True):
        mask = batch.mask.to(ours.device)
        norm = theirs.float().square().sum(-1).clamp_min(1e-12)
        error = (ours.float() - theirs.float()).square().sum(-1) / norm
        total = total + torch.where(mask, error, 0.0).sum(dtype=torch.float64).cpu()
        count += int(mask.sum())
    value = float(total) / count
    return value if value == value else float("inf")
