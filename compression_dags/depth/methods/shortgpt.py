"""ShortGPT (Men et al. 2024, arXiv 2403.03853): drop the layers of lowest block influence."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from compression_dags.architectures import ModelShape
from compression_dags.depth.plan import MergePlan, depth_decisions, keep_only
from compression_dags.depth.reasons import by_score
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.provenance.decisions import Decision
from compression_dags.similarity.evidence import Evidence


class ShortGPT(MergeStage):
    """Drop the layers of lowest block influence BI_l = 1 − E_t[cos(h_l,t, h_{l+1},t)].

    Unlike the released code: cosines in float32 and sums in float64, all real tokens and no padding. The last layer
    is scored before the final norm. Nothing is done to the weights that stay.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[tuple[str, ...]] = ("block_influence",)
    method: Literal["shortgpt"] = "shortgpt"

    def plan(
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        scores = evidence.block_influence
        free = np.asarray(self.free_layers(shape.layers))
        # stable: of equal scores the earlier layer goes first
        gone = set(free[np.argsort(scores[free], kind="stable")[: self.removed(shape.layers)]].tolist())
        plan = keep_only(self.method, shape.layers, [i for i in range(shape.layers) if i not in gone])
        reasons = by_score(self, shape.layers, gone, scores, "block influence")
        return plan, depth_decisions(plan, scores, "block influence", {}, reasons)
