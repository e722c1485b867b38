"""Measures the candidate table: KL(base ‖ changed) of every candidate on calibration text.

Candidates of one pass share the states of the layers below them (`passes/variant_scoring.py`), so a change at layer
i costs the layers from i on. All run on a few sequences first; those that another one beats on bytes and, beyond both
standard errors, on cost go no further. Matrices are rounded by GPTQ or to nearest (`planning/rounded_layers.py`); what
many changes cost together is measured as the recipe will make them (`planning/joint_costs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.errors import InputError
from compression_dags.passes.scored_rows import chosen_rows, even_rows, kl_by_row
from compression_dags.passes.variant_scoring import Edit, Piece, VariantScorer, as_is
from compression_dags.planning.budget_solver import mixture_sizes, solve
from compression_dags.planning.candidates import Candidate, CandidateTable, candidates, empty_table, measured, removable
from compression_dags.planning.joint_costs import counts_of, cut_pieces, cut_sets, quantized, recovery_for
from compression_dags.planning.options import CandidateOptions, quantizer_stage
from compression_dags.planning.reasons import why
from compression_dags.planning.recipe_writer import quantize_stage
from compression_dags.planning.rounded_layers import RoundedLayers
from compression_dags.provenance.decisions import Decision
from compression_dags.registry import METHODS
from compression_dags.solvers.patterns import Pattern
from compression_dags.sparsity.masks import mask_of_rows
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.calibration.streaming import DecoderStream
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.planning.joint_costs import FittedRecovery
    from compression_dags.planning.rounded_layers import RoundedLayers

#: Standard errors by which a cost must be worse before a candidate is given up.
SURE = 2.0


def measure_bank(
    source: Checkpoint,
    blocks: TokenBlocks,
    options: CandidateOptions,
    *,
    statistics: Mapping[str, np.ndarray] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
) -> CandidateTable:
    """The candidates of a dense model, measured on `blocks` (cut to `options.length` tokens).

    Args:
        statistics: of the calibration pass; needed for sparsities.

    Raises:
        InputError: no sequence has two tokens; sparsities without statistics; a quantizer or a recovery stage that
            does not fit the model, or has too few tokens. All before anything is measured.
    """
    if options.sparsities and statistics is None:
        raise InputError(f"sparsities {list(options.sparsities)} need the statistics of the calibration pass")
    for choice in options.choices():
        quantizer_stage(options.quantizer, choice).check(source.shape)
    rows = even_rows(blocks, options.rows)
    unseen = _unseen(blocks, rows)
    recovery = recovery_for(source, options, unseen) if options.depth else None
    norms = statistics or {}
    stream = DecoderStream(source, device=device, dtype=dtype)
    first = rows[:: max(1, len(rows) // options.first_rows)][: options.first_rows]
    rest = [r for r in rows if r not in first]
    table = empty_table(source, candidates(source, options))
    rounded = RoundedLayers(stream, chosen_rows(unseen, even_rows(unseen, options.rows)), options.rounding)
    on: dict[str, Any] = {"device": device, "dtype": dtype}
    start = _Meter(stream, _cut(chosen_rows(blocks, first), options.length), norms, rounded)
    costs = dict(enumerate(start.costs(table.alternatives, progress, "alternatives, first sequences")))
    table = _with(table, costs, range(len(costs)))
    alive, meters = survivors(table), [start]
    if rest:
        more = _Meter(stream, _cut(chosen_rows(blocks, rest), options.length), norms, rounded)
        meters.append(more)
        found = more.costs([table.alternatives[i] for i in alive], progress, "alternatives, all sequences")
        costs |= {i: costs[i] + c for i, c in zip(alive, found, strict=True)}
        table = _with(table, costs, alive)
    table = _merged_schemes(table, options)
    table = _with_cuts(table, options, source, meters, recovery, on, progress)
    together = {}
    for label, same in table.uniform().items():
        choice, pieces = same[0].choice, lambda same=same: start.all_of(same)
        if choice is not None:
            pieces = quantized(
                source, quantizer_stage(options.quantizer, choice), options, unseen, **on, progress=progress
            )
        joint = _kl_of(meters, pieces)
        together[label] = (sum(joint) / len(joint), sum(a.cost for a in same))
    table = replace(table, together=together, tokens=len(rows) * options.length, quantizer=options.quantizer)
    table = _with_mixtures(table, options, source, meters, unseen, on, progress)
    stream.close()
    return table


def _kl_of(meters: list[_Meter], pieces: Callable[[], Iterable[Piece]]) -> list[float]:
    """KL by sequence of a whole student, over all measured sequences."""
    return [kl for meter in meters for kl in meter.student(pieces())]


def _with_cuts(
    table: CandidateTable,
    options: CandidateOptions,
    source: Checkpoint,
    meters: list[_Meter],
    recovery: FittedRecovery | None,
    on: dict[str, Any],
    progress: Progress,
) -> CandidateTable:
    """Several layers dropped at once, as whole candidates. After recovery a single layer is one of them, and what it
    cost without is no candidate any more."""
    drops = sorted((a for a in table.alternatives if a.kind == "drop"), key=lambda a: a.cost)
    if not drops:
        return table
    most = removable(options, table.layers)
    counts = counts_of(most, recovery is not None)
    sets = cut_sets(table.layers, [a.layer for a in drops], counts, meters[0].blocks_of)
    found = []
    for gone in progress([s for s in sets if recovery or len(s) > 1], "layers dropped together"):
        pieces = cut_pieces(source, gone, recovery, **on)
        costs = _kl_of(meters, lambda pieces=pieces: pieces)
        found.append(measured(Candidate("drop", gone[0], None, None, 0, 0, layers=gone), costs))
    kept = [replace(a, alive=a.alive and not (recovery and a.kind == "drop")) for a in table.alternatives]
    return replace(table, alternatives=(*kept, *found), recovered=recovery.options if recovery else None)


def _with_mixtures(
    table: CandidateTable,
    options: CandidateOptions,
    source: Checkpoint,
    meters: list[_Meter],
    unseen: TokenBlocks,
    on: dict[str, Any],
    progress: Progress,
) -> CandidateTable:
    """The table with the best mixtures at the sizes of the schemes and between, measured with the recipe's quantizer.

    A mixture promises more than it keeps: it is what seemed cheapest, and a quantizer that lets later layers make up
    for earlier ones helps one scheme everywhere as much.
    """
    found = []
    for bits in mixture_sizes(table):
        solution = solve(table, "bits", bits)
        asked = quantize_stage(solution, table, source.architecture)
        if asked is None or len(solution.labels) < 2:
            continue
        stage: Any = METHODS["quantize"][asked["method"]].model_validate(asked)
        costs = _kl_of(meters, quantized(source, stage, options, unseen, **on, progress=progress))
        if all(map(math.isfinite, costs)):
            found.append((solution.bits, solution.cost, sum(costs) / len(costs)))
    return replace(table, mixtures=tuple(found))


def _unseen(blocks: TokenBlocks, rows: list[int]) -> TokenBlocks:
    """Sequences that fit what is then measured on `rows`: the others, so that no fit to the very text counts as a gain;
    all of them where the others are fewer."""
    others = sorted(set(range(len(blocks.lengths))) - set(rows))
    return chosen_rows(blocks, others) if len(others) >= len(rows) else blocks


def _cut(blocks: TokenBlocks, length: int) -> TokenBlocks:
    return TokenBlocks(blocks.ids[:, :length], blocks.lengths.clip(max=length), blocks.documents)


def _with(table: CandidateTable, costs: dict[int, list[float]], alive: Iterable[int]) -> CandidateTable:
    keep = set(alive)
    found = [replace(measured(a, costs[i]), alive=i in keep) for i, a in enumerate(table.alternatives)]
    return replace(table, alternatives=tuple(found))


def survivors(table: CandidateTable) -> list[int]:
    """Indices of candidates that some plan could still want.

    Within what it covers, a scheme dies when another is no larger and surely cheaper. A removal dies when it is surely
    worse than as many others as may be removed at all; a merge also when dropping either of its layers is surely no
    worse: both leave one layer of two.
    """
    drops = {a.layer: a for a in table.alternatives if a.kind == "drop"}

    def dies(a: Candidate) -> bool:
        if not math.isfinite(a.cost):
            return True
        if a.kind == "merge":
            return any(_sure(drops[i], a) for i in (a.layer, a.layer + 1) if i in drops)
        if a.kind == "drop":
            return sum(_sure(other, a) for other in drops.values()) > table.layers // 2
        rivals = (b for b in table.alternatives if (b.kind, b.layer, b.group) == (a.kind, a.layer, a.group))
        return any(b.bytes <= a.bytes and b.parameters <= a.parameters and _sure(b, a) for b in rivals)

    return [i for i, a in enumerate(table.alternatives) if not dies(a)]


def _sure(better: Candidate, worse: Candidate) -> bool:
    return better.cost + SURE * better.error < worse.cost - SURE * worse.error


def _merged_schemes(table: CandidateTable, options: CandidateOptions) -> CandidateTable:
    """A merged layer at a scheme: what merging costs, and what the scheme costs where the first layer was."""
    base = {a.layer: a for a in table.alternatives if a.kind == "merge" and a.choice is None}

    def of(a: Candidate) -> Candidate:
        if a.kind != "merge" or a.choice is None:
            return a
        own = [q for q in table.alternatives if (q.kind, q.layer, q.choice) == ("quantize", a.layer, a.choice)]
        merged = base[a.layer]
        cost, alive = merged.cost + sum(q.cost for q in own), merged.alive and all(q.alive for q in own)
        return replace(a, cost=cost, error=merged.error, rows=merged.rows, alive=alive)

    return replace(table, alternatives=tuple(of(a) for a in table.alternatives))


class _Meter:
    """KL of changed models on some sequences."""

    def __init__(
        self, stream: DecoderStream, blocks: TokenBlocks, norms: Mapping[str, np.ndarray], rounded: RoundedLayers
    ):
        self.stream, self.probe, self.norms, self.rounded = stream, VariantScorer(stream, blocks), norms, rounded
        self.dense = self.probe.states(as_is(stream.num_layers))

    def costs(self, alternatives: Iterable[Candidate], progress: Progress, says: str) -> list[list[float]]:
        """KL by sequence of each; those that change nothing, and merged layers at a scheme, are not run."""
        wanted = list(alternatives)
        edits = {i: self._edit(a) for i, a in enumerate(wanted) if self._runs(a)}
        by_layer: dict[int, list[int]] = {}
        for i in edits:
            by_layer.setdefault(wanted[i].layer, []).append(i)
        found = {i: [0.0] * len(self.bench_rows) for i in range(len(wanted))}
        for layer in progress(sorted(by_layer), says):
            chosen = by_layer[layer]
            student = as_is(self.stream.num_layers)
            values = self.probe.measured(student, [edits[i] for i in chosen], self._kl)
            found |= dict(zip(chosen, values, strict=True))
        return [found[i] for i in range(len(wanted))]

    def student(self, pieces: Iterable[Piece]) -> list[float]:
        """KL by sequence of a whole student, its pieces made as they are needed."""
        return self._kl(self.probe.states(pieces))

    def blocks_of(self, count: int) -> list[float]:
        """Mean KL without the `count` layers from 0, from 1, … on."""
        layers = self.stream.num_layers
        edits = [Edit(first, first + count) for first in range(layers - count + 1)]
        values = self.probe.measured(as_is(layers), edits, self._kl)
        return [sum(own) / len(own) if all(map(math.isfinite, own)) else math.inf for own in values]

    def all_of(self, alternatives: Iterable[Candidate]) -> Iterator[Piece]:
        """Every layer with all of its candidates at once."""
        chosen: dict[int, list[Candidate]] = {}
        for a in alternatives:
            chosen.setdefault(a.layer, []).append(a)
        for layer in sorted(chosen):
            yield Piece(layer, {k: t for a in chosen[layer] for k, t in self._made(a).items()})

    @property
    def bench_rows(self) -> list[int]:
        return [row for batch in self.probe.batches for row in batch.rows]

    @staticmethod
    def _runs(a: Candidate) -> bool:
        return a.kind in {"drop", "sparsify"} or (a.kind == "merge") == (a.choice is None)

    def _kl(self, states: list[Tensor]) -> list[float]:
        pairs = zip(self.probe.batches, self.dense, states, strict=True)
        return [kl for batch, dense, state in pairs for kl in kl_by_row(self.stream, batch, dense, state)]

    def _edit(self, a: Candidate) -> Edit:
        if a.kind == "drop":
            return Edit(a.layer, a.layer + 1)
        if a.kind == "merge":
            return Edit(a.layer, a.layer + 2, _Made(lambda: Piece(a.layer, self._mean(a.layer))))
        return Edit(a.layer, a.layer + 1, _Made(lambda: Piece(a.layer, self._made(a))))

    def _made(self, a: Candidate) -> dict[str, Tensor]:
        if a.kind == "sparsify":
            return self._pruned(a.layer, a.share)
        assert a.choice is not None
        return self.rounded.group(a.layer, a.group, a.choice)

    def _pruned(self, layer: int, share: float) -> dict[str, Tensor]:
        """Wanda's mask, by the norms of the inputs in the base model."""
        source, found = self.stream.checkpoint, {}
        for group in source.architecture.groups:
            norms = torch.from_numpy(np.sqrt(self.norms[f"norms.layers.{layer}.{group.name}.mean_square"])).float()
            for projection in group.projections:
                weight = source.tensor(source.layer(layer)[f"{projection}.weight"]).to(self.stream.device)
                score = weight.float().abs() * norms.to(weight.device)
                found[f"{projection}.weight"] = weight * mask_of_rows(score, Pattern.unstructured(share))
        return found

    def _mean(self, layer: int) -> dict[str, Tensor]:
        source = self.stream.checkpoint
        first, second = source.layer(layer), source.layer(layer + 1)
        return {k: (source.tensor(first[k]).float() + source.tensor(second[k]).float()) / 2 for k in first}


class _Made:
    """Pieces made when they are asked for, and not kept."""

    def __init__(self, make: Callable[[], Piece]):
        self.make = make

    def __iter__(self) -> Iterator[Piece]:
        yield self.make()


def bank_decisions(table: CandidateTable) -> list[Decision]:
    """A row for every candidate: kept for the planner, or given up in the race."""
    rows, unit = [], "KL (nats a token)"
    for a in table.alternatives:
        action = "keep" if a.alive else "reject"
        facts = {"what": a.label, "bytes": a.bytes, "parameters": a.parameters, "rows": a.rows}
        facts["standard_error"] = a.error if math.isfinite(a.error) else None
        layers = [a.layer, a.layer + 1] if a.kind == "merge" else list(a.layers) or [a.layer]
        target = f"layer {a.layer} {a.group or 'all'}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
        cost = a.cost if math.isfinite(a.cost) else None
        rows.append(
            Decision("plan", "alternatives", len(rows), target, action, layers, cost, unit, why(table, a), facts)
        )
    return rows
