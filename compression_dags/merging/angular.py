"""Contiguous block by angular distance (Gromov et al. 2024, arXiv 2403.17887)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import StackFacts
from compression_dags.merging.plan import Bench, Evidence, MergePlan, MergeStage, depth_decisions, keep_only
from compression_dags.provenance.decisions import Decision


class Angular(MergeStage):
    """Drop the n contiguous layers l … l+n−1 whose entry and exit states are closest in angle.

    d(l, n) = E_t[arccos cos(h_l,t, h_{l+n},t)] / π. `tokens: last` averages over the last token of each sequence as the
    paper does; the default averages over the sampled tokens of the calibration set. States are taken before the final
    norm, so windows that reach the end compare equal spaces.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[tuple[str, ...]] = ("angular",)
    method: Literal["angular"] = "angular"
    tokens: Literal["sampled", "last"] = Field("sampled", description="tokens that the angle is averaged over")

    def plan(
        self, facts: StackFacts, evidence: Evidence, bench: Bench | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        distance = evidence.angular_last if self.tokens == "last" else evidence.angular
        count, free = self.removed(facts.layers), self.free_layers(facts.layers)
        starts = range(free.start, free.stop - count + 1)
        windows = {s: float(distance[s, s + count]) for s in starts}
        best = min(windows, key=lambda s: (windows[s], s))
        kept = [i for i in range(facts.layers) if not best <= i < best + count]
        plan = keep_only(self.method, facts.layers, kept)
        scores = [windows.get(i) for i in range(facts.layers)]
        note = {"window": count, "chosen_start": best, "tokens": self.tokens}
        return plan, depth_decisions(
            plan, scores, f"angular distance of the {count}-layer window that starts here", note
        )
