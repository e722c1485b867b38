"""MKA as we mean it: adjacent layers merged pair by pair, the pair and the way to merge chosen by measurement."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.architectures.uniformity import refuse_unlike
from compression_dags.depth.stage import MergeStage
from compression_dags.depth.windows import refuse_more
from compression_dags.errors import InputError
from compression_dags.options import TOKENS_PER_UNKNOWN, Ridge

Form = Literal["first", "second", "concat", "mean"]


class MKA(MergeStage):
    """Merge adjacent layers until the wanted number is gone; every merge is the one that hurts the loss least.

    Each round a similarity (of layer outputs, or the angle between a pair's entry and exit) short-lists pairs of
    adjacent layers. For every pair each form of one layer in their place is built: `first` or `second` alone, `concat`
    (the most sensitive half of the channels and heads of each), or `mean`. (`mean` is channels and heads aligned
    jointly, then the closed-form activation-weighted mean.) Each is compensated: its output projection is refitted in
    closed form. Then the layer maps the student's state at the pair's entry to the base model's state at its exit. The
    candidate with the least next-token loss on held-out calibration sequences is written into the plan. `mean` never
    won a round on the measured model (docs/methods/mka.md), so it is left out unless asked for.

    MKA (Liu et al. 2024, arXiv 2406.16330) merges by similarity alone with one scalar λ; its released code stores no
    merged weight (`mka-released`). Dropping is among the forms here, so merging happens only where it is better.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[tuple[str, ...]] = ("block_influence", "angular", "npib", "cka")
    measures: ClassVar[bool] = True
    implementation: ClassVar[str] = "compression_dags.depth.mka.search:plan"
    method: Literal["mka"] = "mka"
    forms: tuple[Form, ...] = Field(("first", "second", "concat"), min_length=1, description="ways to merge")
    shortlist: int = Field(6, ge=1, description="pairs measured in a round")
    similarity: Literal["angular", "npib", "cka"] = Field("angular", description="what ranks the pairs of a round")
    score: Literal["loss", "divergence"] = Field(
        "loss", description="next-token loss, or KL divergence from the base model's predictions (nats)"
    )
    fit_tokens: int = Field(65_536, ge=1024, description="calibration tokens that the closed forms are fitted on")
    score_tokens: int = Field(8_192, ge=256, description="held-out calibration tokens that candidates are scored on")
    alphas: tuple[Ridge, ...] = Field((1e-3, 1e-2, 1e-1), min_length=1, description="ridge grid α")
    sink_positions: int = Field(4, ge=0, description="first positions of a sequence, where attention sinks sit")
    sink_weight: float = Field(32.0, ge=0, description="weight of a sink position against another token's")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if shape.architecture.has_experts:
            raise InputError(
                f"merge: mka cannot merge experts ({shape.architecture.model_type}); use sleb, shortgpt or angular"
            )
        refuse_unlike(shape, "merge: mka", "use sleb, shortgpt or angular")
        refuse_more(self, shape, shape.layers)

    def check_tokens(self, shape: ModelShape, sequences: int, length: int) -> None:
        """Refuse closed forms with fewer than 10 tokens an unknown.

        Raises:
            InputError: with the count, the need and the remedy.
        """
        fit, _ = self.rows(sequences, length)
        need, tokens = TOKENS_PER_UNKNOWN * shape.hidden, len(fit) * length
        if tokens < need and shape.architecture.residual_writer is not None:
            raise InputError(
                f"merge: mka has {tokens:,} fitting tokens and needs {need:,} ({TOKENS_PER_UNKNOWN} for each of the "
                f"{shape.hidden} hidden channels): raise calibration.sequences (now {sequences}) or fit_tokens (now "
                f"{self.fit_tokens})"
            )

    def rows(self, sequences: int, length: int) -> tuple[list[int], list[int]]:
        """Calibration sequences for fitting and for scoring; the last ones score, at most a quarter of all."""
        held = max(1, min(-(-self.score_tokens // length), sequences // 4))
        if sequences - held < 1:
            raise InputError(f"merge: mka needs at least 2 calibration sequences, not {sequences}")
        fit = max(1, min(-(-self.fit_tokens // length), sequences - held))
        return list(range(fit)), list(range(sequences - held, sequences))
