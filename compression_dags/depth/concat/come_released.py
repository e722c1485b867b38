"""CoMe as its public repository has it (WangFei-2019/CoMe, 7bb695a), scrambled query heads and all, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.concat.merge import refuse_experts
from compression_dags.depth.plan import Evidence, MergePlan, MergeStage, ProbeContext
from compression_dags.depth.windows import influence_shares, most_removed
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision

if TYPE_CHECKING:
    import torch

    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.depth.concat.layers import StudentLayer

UNIT = "angular distance at the last tokens from the entry to the exit of the pair (SBI)"


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


class ComeReleased(MergeStage):
    """CoMe as its released code merges, on whatever model: the published logs' behaviour, not a recommendation.

    Source: the repository WangFei-2019/CoMe of arXiv 2510.15304. The whole model is measured anew after every merge:
    pairs by the angle at the last token of each sequence alone (the last layer's state after the final norm), shares
    by block influence with cosines clipped to [0, 1] and NaN as 0.5, units by mean |activation| · ‖column‖₁. Norms are
    plain means, output biases weighted, and the mask over KV heads is tiled over the query heads, which attaches most
    query heads of a grouped-query model to another's keys and values. Nothing is protected and merged layers are merged
    again. Left out: padding is not counted, and layers of different kinds are not merged.
    """

    version: ClassVar[str] = "1"
    measures: ClassVar[bool] = True
    method: Literal["come-released"] = "come-released"
    protect_first: int = Field(0, ge=0, description="first layers never touched (the released code protects none)")
    protect_last: int = Field(0, ge=0, description="last layers never touched (the released code protects none)")
    power: float = Field(1.0, ge=0, description="`--psu`: exponent p of block influence in the shares")
    min_max: float = Field(0.0, ge=0, lt=1, description="`--min-max`: sets the least share of the larger member")
    half: bool = Field(False, description="cosines in the checkpoint's dtype, as released; else in float32")
    repeat: bool = Field(True, description="merge merged layers again; false is `--wo-repeat`")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        refuse_experts(shape, "merge: come-released")
        if shape.kv_heads < 2:
            raise InputError(
                "merge: come-released would merge 2 layers, but a layer has 1 KV head to share among them: drop layers "
                "instead (shortgpt, sleb)"
            )
        count, most = self.removed(shape.layers), most_removed(shape, self.free_layers(shape.layers), self._most(shape))
        if count > most:
            raise InputError(
                f"merge: come-released is to remove {count} of {shape.layers} layers, but at most {most} can be merged "
                f"away: adjacent unprotected layers of one kind{'' if self.repeat else ', each merged once'}"
            )

    def _most(self, shape: ModelShape) -> int:
        return shape.layers if self.repeat else 2

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        from compression_dags.depth.concat.layers import chosen_by_shares, ledger
        from compression_dags.depth.concat.search import Limits, Search
        from compression_dags.depth.concat.student_pass import AsReleased

        assert probe is not None  # `measures`
        self.check(shape)
        limits = Limits(self.free_layers(shape.layers), self._most(shape), shape.layers - self.removed(shape.layers))
        rule = AsReleased(_stored_dtype(probe.source)) if self.half else AsReleased()
        search = Search(shape, probe, limits, form="concat-released", score="l1", rule=rule)

        def both(position: int) -> tuple[StudentLayer, dict[str, Any]]:
            pair = (position, position + 1)
            leaves = sum(len(search.layers[p].span) for p in pair)
            shares = released_shares([search.influence[p] for p in pair], self.power, self.min_max, leaves)
            chosen = chosen_by_shares([search.sensitivity(p) for p in pair], shares, shape)
            note: dict[str, Any] = {kind: [len(c[kind]) for c in chosen] for kind in ("channels", "heads")}
            layer = search.merged(position, chosen, shares)
            note["query_heads_on_their_kv_head"] = on_their_kv_head(layer, shape)
            return layer, {"shares": list(shares), **note}

        search.run(both, "come-released (merges)")
        plan = search.plan(self.method)
        note = {
            "mode": "progressive",
            "score": "l1",
            "cosines": str(rule.dtype).removeprefix("torch."),
            "last_tokens": len(probe.blocks.lengths),
            "tokens": probe.blocks.tokens,
            "layer_forwards": search.layer_forwards,
        }

        def alone(index: int) -> str:
            return self.protection(index, shape.layers) or search.alone(index)

        return plan, ledger(plan, search.layers, search.steps, UNIT, note, alone)


def _stored_dtype(source: Checkpoint) -> torch.dtype:
    """Of the first layer's first projection."""
    projection = source.architecture.projections()[0]
    return source.tensor(source.layer(0)[f"{projection}.weight"]).dtype
