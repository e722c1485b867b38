"""CoMe as its public repository has it (WangFei-2019/CoMe, 7bb695a), scrambled query heads and all, for comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.stage import MergeStage, refuse_experts
from compression_dags.depth.windows import most_removed
from compression_dags.errors import InputError

if TYPE_CHECKING:
    pass


class ComeReleased(MergeStage):
    """CoMe as its released code merges, on whatever model: the published logs' behaviour, not a recommendation.

    Source: the repository WangFei-2019/CoMe of arXiv 2510.15304. The whole model is measured anew after every merge.
    Pairs are chosen by the angle at the last token of each sequence alone (the last layer's state after the final
    norm). Shares come from block influence with cosines clipped to [0, 1] and NaN as 0.5, units by mean |activation| ·
    ‖column‖₁. Norms are plain means, output biases weighted, and the mask over KV heads is tiled over the query heads.
    That attaches most query heads of a grouped-query model to another's keys and values. Nothing is protected and
    merged layers are merged again. Left out: padding is not counted, and layers of different kinds are not merged.
    """

    version: ClassVar[str] = "1"
    measures: ClassVar[bool] = True
    implementation: ClassVar[str] = "compression_dags.depth.concat.come_released_search:plan"
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
        count, most = self.removed(shape.layers), most_removed(shape, self.free_layers(shape.layers), self.most(shape))
        if count > most:
            raise InputError(
                f"merge: come-released is to remove {count} of {shape.layers} layers, but at most {most} can be merged "
                f"away: adjacent unprotected layers of one kind{'' if self.repeat else ', each merged once'}"
            )

    def most(self, shape: ModelShape) -> int:
        return shape.layers if self.repeat else 2
