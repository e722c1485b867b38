"""Why `mka` took a candidate, and why a layer is in no merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compression_dags.architectures import ModelShape
from compression_dags.depth.mka.options import MKA
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import apart, counted, layers_said, number

DROPS = {"first": "second", "second": "first"}


def why_won(form: str, pair: tuple[range, range], loss: float, evidence: Mapping[str, Any], score: str) -> str:
    """What becomes of two neighbouring groups, and the losses that decided.

    Args:
        pair: the original layers of both.
        evidence: of the row: `shares`, `candidates`, `loss_before`, and `fit` where the projection was refitted.
    """
    first, second = map(layers_said, pair)
    after, before = apart(loss, evidence["loss_before"])
    if form in DROPS:
        stays, goes = (first, second) if form == "first" else (second, first)
        how = f"dropped {goes} for {stays}{', refitted' if 'fit' in evidence else ''}"
    else:
        verb = "concatenated" if form == "concat" else "merged"
        how = f"{verb} {first} and {second} at shares {' and '.join(map(number, evidence['shares']))}"
    tried = counted(len(evidence["candidates"]), "candidate")
    return f"{how}: the held-out {score} is {after} nats, the least of {tried} ({before} before)"


def why_kept(layer: int, shape: ModelShape, options: MKA, rounds: Sequence[Decision]) -> tuple[str, dict[str, Any]]:
    """Why a layer is in no merge, and what to note of it: how it did in the last round that measured a pair with it."""
    if why := options.protection(layer, shape.layers):
        return why, {}
    for row in reversed(rounds):
        losses: dict[str, float] = row.evidence["candidates"]
        own = {name: loss for name, loss in losses.items() if _holds(name, layer)}
        if own:
            best = min(own, key=lambda name: (own[name], name))
            winner = min(losses, key=lambda name: (losses[name], name))
            lost, won = apart(own[best], losses[winner])
            note = {"round": row.step + 1, "best_candidate": best, "loss": own[best], "winner_loss": losses[winner]}
            reason = (
                f"kept: in round {row.step + 1} its best candidate, {best}, had a held-out {options.score} of {lost} "
                f"nats, and {row.target} won with {won}"
            )
            return reason, note
    beside = [j for j in (layer - 1, layer + 1) if j in options.free_layers(shape.layers)]
    if not any(shape.kind(j) == shape.kind(layer) for j in beside):
        return "kept: no unprotected neighbour of its kind is there to merge it with", {}
    measured = counted(options.shortlist, "pair")
    return f"kept: no pair with it was among the {measured} most alike by {options.similarity} in any round", {}


def _holds(candidate: str, layer: int) -> bool:
    """Whether a candidate named `3-4 concat` is of that layer."""
    first, _, last = candidate.partition(" ")[0].partition("-")
    return int(first) <= layer <= int(last)
