"""CoMe (Wang et al. 2025, arXiv 2510.15304): adjacent layers become one by concatenating channels and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.stage import MergeStage, refuse_experts
from compression_dags.depth.windows import (
    most_removed,
)
from compression_dags.errors import InputError

if TYPE_CHECKING:
    pass

#: Most original layers in one, where a recipe does not say: every one should be able to give a KV group.
LARGEST_GROUP = 4


class ConcatStage(MergeStage):
    """What the methods that concatenate have in common."""

    needs: ClassVar[tuple[str, ...]] = ("block_influence", "angular")
    reads_statistics: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    method: str
    score: Literal["l1", "l2"] = Field(
        "l1",
        description="sensitivity of a unit: mean |a| · L1 norm of its column (the paper), or root mean square · L2",
    )
    largest_group: int | None = Field(
        None,
        ge=2,
        description=f"most original layers in one; default {LARGEST_GROUP}, fewer where there are fewer KV heads",
    )

    def largest(self, shape: ModelShape) -> int:
        return self.largest_group or min(LARGEST_GROUP, shape.kv_heads)

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        name = f"merge: {self.method}"
        refuse_experts(shape, name)
        members = max(2, self.largest_group or 2)
        if shape.kv_heads < members:
            raise InputError(
                f"{name} would make one of up to {members} layers, but a layer has {shape.kv_heads} KV head(s) to "
                "share among them: lower largest_group, or drop layers instead (shortgpt, sleb)"
            )
        count, largest = self.removed(shape.layers), self.largest(shape)
        most = most_removed(shape, self.free_layers(shape.layers), largest)
        if count > most:
            raise InputError(
                f"{name} is to remove {count} of {shape.layers} layers, but at most {most} can be merged away: groups "
                f"of at most {largest} adjacent unprotected layers of one kind (protect_first {self.protect_first}, "
                f"protect_last {self.protect_last})"
            )


class Come(ConcatStage):
    """Merge adjacent layers into one of the stock shape that keeps the most sensitive channels and heads of each.

    CoMe (Wang et al. 2025, arXiv 2510.15304). Each step takes the two neighbours whose entry and exit are closest in
    angle (SBI). It gives each member a share of the channels and KV groups (BI^p / Σ BI^p), keeps the units of largest
    mean |activation| · ‖column‖₁ and measures again. Unlike the released code: SBI over all tokens instead of the last
    of each sequence and before the final norm, cosines in float32, and each member's norm folded into its rows. Query
    heads stay with their own KV head, biases are added, ends are protected, layers are of one kind. `one-shot` chooses
    everything from the cached calibration pass, without running the model.
    """

    version: ClassVar[str] = "1"
    implementation: ClassVar[str] = "compression_dags.depth.concat.planning:plan"
    method: Literal["come"] = "come"
    mode: Literal["progressive", "one-shot"] = Field(
        "progressive", description="progressive: measure again after every merge; one-shot: from the cached pass alone"
    )
    windows: Literal["optimal", "greedy"] = Field(
        "optimal", description="one-shot: groups of least total distance, or pair by pair"
    )
    shares: Literal["bi", "equal", "free"] = Field(
        "bi", description="bi: by block influence; equal; free: one ranking of all members' units"
    )
    power: float = Field(1.0, ge=0, description="exponent p of block influence in the shares")


class ComeP(ConcatStage):
    """CoMe with the share of each pair found by trial: r = 0, 1/G, …, 1 of the first layer, the best one is kept.

    CoMe-P, the posterior variant of arXiv 2510.15304 (its released code stops with an error before the first merge).
    Pairs are chosen as in `come`. `loss` compares the next-token loss of the whole student, from the cached states
    below the pair. `window` measures the error of the pair's exit state against that of the original layers on the same
    entry state. r = 0 and r = 1 are plain drops of a layer, bit for bit. So the search contains its own baseline.
    """

    version: ClassVar[str] = "1"
    implementation: ClassVar[str] = "compression_dags.depth.concat.planning:plan_by_trial"
    method: Literal["come-p"] = "come-p"
    by: Literal["loss", "window"] = Field("loss", description="what the ratios are compared by")
    granularity: int = Field(20, ge=1, description="G: ratios 0, 1/G, …, 1 are tried")
    rows: int = Field(16, ge=1, description="calibration sequences on which ratios are compared, taken evenly")
