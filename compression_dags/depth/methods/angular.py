"""Contiguous block by angular distance (Gromov et al. 2024, arXiv 2403.17887)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.depth.plan import MergePlan, depth_decisions, keep_only
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import apart, counted, layers_said, number
from compression_dags.similarity.evidence import Evidence


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
        self, shape: ModelShape, evidence: Evidence, probe: ProbeContext | None = None
    ) -> tuple[MergePlan, list[Decision]]:
        distance = evidence.angular_last if self.tokens == "last" else evidence.angular
        count, free = self.removed(shape.layers), self.free_layers(shape.layers)
        starts = range(free.start, free.stop - count + 1)
        windows = {s: float(distance[s, s + count]) for s in starts}
        best = min(windows, key=lambda s: (windows[s], s))
        kept = [i for i in range(shape.layers) if not best <= i < best + count]
        plan = keep_only(self.method, shape.layers, kept)
        scores = [windows.get(i) for i in range(shape.layers)]
        note = {"window": count, "chosen_start": best, "chosen_distance": windows[best], "tokens": self.tokens}
        unit = f"angular distance of the {count}-layer window that starts here"
        reasons = [self._reason(i, shape.layers, count, windows, best) for i in range(shape.layers)]
        return plan, depth_decisions(plan, scores, unit, note, reasons)

    def _reason(self, index: int, total: int, count: int, windows: dict[int, float], best: int) -> str:
        """Why a layer stays or goes, by the distances of the windows by their first layer."""
        chosen, one = layers_said(range(best, best + count)), count == 1
        if why := self.protection(index, total):
            return why
        if best <= index < best + count:
            among = counted(len(windows), "unprotected layer" if one else f"unprotected {count}-layer window")
            return (
                f"dropped: {chosen}, {number(windows[best])} apart in angle from entry to exit, "
                f"{'is' if one else 'are'} the closest of {among}"
            )
        nearest = min((s for s in windows if s <= index < s + count), key=lambda s: (windows[s], s))
        with_it, without = apart(windows[nearest], windows[best])
        window = f"the closest {count}-layer window that holds it, {layers_said(range(nearest, nearest + count))},"
        own = "from entry to exit it" if one else window
        return f"kept: {own} is {with_it} apart in angle, and {chosen}, at {without}, went"
