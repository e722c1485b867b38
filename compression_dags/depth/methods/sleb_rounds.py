"""The rounds of `sleb`: the loss without each layer that is left, from the states that all candidates share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from compression_dags.architectures import ModelShape
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.depth.methods.sleb import SLEB
from compression_dags.depth.plan import MergePlan, depth_decisions, keep_only
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import IntegrityError
from compression_dags.passes.scored_rows import chosen_rows, even_rows
from compression_dags.passes.variant_scoring import Edit, VariantScorer, as_is
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import as_note, from_note
from compression_dags.provenance.wording import apart, counted, ranked
from compression_dags.similarity.evidence import Evidence


def plan(options: SLEB, shape: ModelShape, evidence: Evidence, probe: ProbeContext) -> tuple[MergePlan, list[Decision]]:
    rounds = _rounds(options, shape, probe)
    gone = {r.dropped: number for number, r in enumerate(rounds, 1)}
    last = rounds[-1].losses
    scores = [rounds[gone[i] - 1].losses[i] if i in gone else last.get(i) for i in range(shape.layers)]
    plan = keep_only(options.method, shape.layers, [i for i in range(shape.layers) if i not in gone])
    cost = {
        "rows": min(options.rows, len(probe.blocks.lengths)),
        "layer_forwards": sum(r.layer_forwards for r in rounds),
        "layer_forwards_of_full_evaluations": sum(len(r.losses) * (shape.layers - n) for n, r in enumerate(rounds, 1)),
    }
    reasons = [_reason(options, i, shape.layers, rounds, gone.get(i)) for i in range(shape.layers)]
    decisions = depth_decisions(plan, scores, "next-token loss without it (nats)", cost, reasons)
    why = [_why(rounds, gone.get(i)) for i in range(shape.layers)]
    return plan, [replace(d, evidence={**d.evidence, **w}) for d, w in zip(decisions, why, strict=True)]


def _reason(options: SLEB, index: int, total: int, rounds: list[Round], number: int | None) -> str:
    """Why a layer went in round `number`, or stayed (None)."""
    if why := options.protection(index, total):
        return why
    this = rounds[(number or len(rounds)) - 1]
    if number:
        without, before = apart(this.losses[index], this.before)
        return (
            f"dropped in round {number}: without it the next-token loss is {without} nats, the least of "
            f"{counted(len(this.losses), 'candidate')} (it was {before} before)"
        )
    place = sorted(this.losses, key=lambda i: (this.losses[i], i)).index(index) + 1
    own, least = apart(this.losses[index], this.losses[this.dropped])
    return (
        f"kept: without it the next-token loss would be {own} nats, {ranked(place, 'least')} of "
        f"{counted(len(this.losses), 'candidate')} in the last round; without layer {this.dropped} it is {least}"
    )


def _rounds(options: SLEB, shape: ModelShape, probe: ProbeContext) -> list[Round]:

    stream = DecoderStream(probe.source, device=probe.device, dtype=probe.dtype)
    scored = VariantScorer(stream, chosen_rows(probe.blocks, even_rows(probe.blocks, options.rows)))
    saved = probe.resume.load() if probe.resume else None
    rounds = [Round.from_json(r) for r in from_note(saved[1]["note"])] if saved else []
    free = options.free_layers(shape.layers)
    for _ in probe.progress(range(len(rounds), options.removed(shape.layers)), "sleb (layers dropped)"):
        gone = {r.dropped for r in rounds}
        pieces = [p for p in as_is(shape.layers) if p.slot not in gone]
        places = [i for i, p in enumerate(pieces) if p.slot in free]
        none = [] if rounds else [Edit(len(pieces), len(pieces))]
        begin = scored.layer_forwards
        found = scored.losses(pieces, [Edit(i, i + 1) for i in places] + none)
        before = rounds[-1].losses[rounds[-1].dropped] if rounds else found.pop()
        losses = {pieces[i].slot: loss for i, loss in zip(places, found, strict=True)}
        rounds.append(Round(_least(losses, before), before, losses, scored.layer_forwards - begin))
        if probe.resume:
            probe.resume.save_if_due(len(rounds), lambda: {"note": as_note([asdict(r) for r in rounds])})
    stream.close()
    return rounds


@dataclass(frozen=True)
class Round:
    """One removal: the layer, the loss before, the loss without each candidate, and what it took to find out."""

    dropped: int
    before: float
    losses: dict[int, float]
    layer_forwards: int

    @classmethod
    def from_json(cls, raw: dict) -> Round:
        return cls(**{**raw, "losses": {int(k): v for k, v in raw["losses"].items()}})


def _least(losses: dict[int, float], before: float) -> int:
    """The layer without which the loss is least; of equal ones the lowest.

    Raises:
        IntegrityError: no loss is finite.
    """
    if not math.isfinite(before):
        raise IntegrityError("sleb: the loss on the calibration tokens is not finite even before this removal")
    best = min(losses, key=lambda i: (losses[i], i))
    if not math.isfinite(losses[best]):
        raise IntegrityError(
            "sleb: without any one of its layers the model's loss on the calibration tokens is infinite"
        )
    return best


def _why(rounds: list[Round], number: int | None) -> dict:
    """What the ledger says of a layer dropped in round `number`, or of one that stayed (None)."""
    this = rounds[(number or len(rounds)) - 1]
    why = {"round": number or len(rounds), "loss_before": round(this.before, 6)}
    if number is None:
        return why
    candidates = {str(i): round(x, 6) if math.isfinite(x) else None for i, x in sorted(this.losses.items())}
    return {**why, "candidates": candidates}
