"""SLEB (Song et al. 2024, arXiv 2402.09025): drop, one at a time, the layer whose removal costs the least loss."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compression_dags.depth.stage import MergeStage


class SLEB(MergeStage):
    """Drop one layer a round: the one without which the next-token loss on calibration tokens is least.

    Greedy, as in the paper; of equal losses the lower layer goes. The released code runs the whole model for every
    candidate of every round, on 128 sequences of WikiText-2. Here all candidates of a round share the states of the
    layers below them, and `rows` calibration sequences are scored. Nothing is done to the weights that stay.
    """

    version: ClassVar[str] = "1"
    measures: ClassVar[bool] = True
    implementation: ClassVar[str] = "compression_dags.depth.methods.sleb_rounds:plan"
    method: Literal["sleb"] = "sleb"
    rows: int = Field(16, ge=1, description="calibration sequences scored, taken evenly from the set")
