"""The search of `come-released`: shares and cosines as the published code has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compression_dags.architectures import ModelShape
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.concat.come_released import ComeReleased
from compression_dags.depth.concat.layers import StudentLayer, chosen_by_shares, ledger
from compression_dags.depth.concat.search import Limits, Search
from compression_dags.depth.concat.student_pass import AsReleased
from compression_dags.depth.plan import MergePlan
from compression_dags.depth.stage import ProbeContext
from compression_dags.depth.windows import influence_shares
from compression_dags.provenance.decisions import Decision
from compression_dags.similarity.evidence import Evidence

UNIT = "angular distance at the last tokens from the entry to the exit of the pair (SBI)"


def plan(
    options: ComeReleased, shape: ModelShape, evidence: Evidence, probe: ProbeContext
) -> tuple[MergePlan, list[Decision]]:
    """The plan of `come-released`, and why, layer by layer."""

    options.check(shape)
    limits = Limits(
        options.free_layers(shape.layers), options.most(shape), shape.layers - options.removed(shape.layers)
    )
    rule = AsReleased(_stored_dtype(probe.source)) if options.half else AsReleased()
    search = Search(shape, probe, limits, form="concat-released", score="l1", rule=rule)

    def both(position: int) -> tuple[StudentLayer, dict[str, Any]]:
        pair = (position, position + 1)
        leaves = sum(len(search.layers[p].span) for p in pair)
        shares = released_shares([search.influence[p] for p in pair], options.power, options.min_max, leaves)
        chosen = chosen_by_shares([search.sensitivity(p) for p in pair], shares, shape)
        note: dict[str, Any] = {kind: [len(c[kind]) for c in chosen] for kind in ("channels", "heads")}
        layer = search.merged(position, chosen, shares)
        note["query_heads_on_their_kv_head"] = on_their_kv_head(layer, shape)
        return layer, {"shares": list(shares), **note}

    search.run(both, "come-released (merges)")
    plan = search.plan(options.method)
    note = {
        "mode": "progressive",
        "score": "l1",
        "cosines": str(rule.dtype).removeprefix("torch."),
        "last_tokens": len(probe.blocks.lengths),
        "tokens": probe.blocks.tokens,
        "layer_forwards": search.layer_forwards,
    }

    def alone(index: int) -> str:
        return options.protection(index, shape.layers) or search.alone(index)

    return plan, ledger(plan, search.layers, search.steps, UNIT, note, alone)


def released_shares(influence: Sequence[float], power: float, min_max: float, leaves: int) -> tuple[float, ...]:
    """`block_ratio` of the released code: BI^p / Σ BI^p, the largest share raised to min_max^(1/(leaves − 1)).

    Args:
        leaves: original layers under the pair.
    """
    shares = influence_shares(influence, power)
    largest = max(range(len(shares)), key=lambda i: (shares[i], -i))
    floor = min_max ** (1 / (leaves - 1))
    if shares[largest] >= floor:
        return shares
    rest = 1.0 - shares[largest]
    return tuple(floor if i == largest else (1.0 - floor) * s / rest for i, s in enumerate(shares))


def on_their_kv_head(layer: StudentLayer, shape: ModelShape) -> float:
    """Share of a merged layer's query heads that read the KV head which they read in their original layer.

    1 without grouped queries; what the tiled mask costs otherwise.
    """
    group = shape.heads // shape.kv_heads
    pairs = [(p.source, int(h)) for p in layer.parts for h in p.kept["heads"]]
    wanted = [(p.source, int(q) // group) for p in layer.parts for q in p.kept["queries"]]
    return sum(pairs[at // group] == pair for at, pair in enumerate(wanted)) / len(wanted)


def _stored_dtype(source: Checkpoint) -> torch.dtype:
    """Of the first layer's first projection."""
    projection = source.architecture.projections()[0]
    return source.tensor(source.layer(0)[f"{projection}.weight"]).dtype
