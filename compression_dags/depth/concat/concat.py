"""Concatenation of optimally chosen windows, as a start for a closed-form refit: no forward beyond the cached pass."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compression_dags.depth.concat.come import ConcatStage


class Concat(ConcatStage):
    """Merge the windows of adjacent layers of least total angular distance, one layer each; then refit them.

    CoMe's concatenation (arXiv 2510.15304) with everything chosen at once from the cached calibration pass. Windows are
    found by dynamic programming, where CoMe takes pair after pair. By default one ranking of all members' units makes
    the shares an outcome. Units are scored by the error that losing each alone causes. Meant to be followed by
    `recover: least-squares`, which refits the output projection of every merged layer to the base model's state at the
    window's exit.
    """

    version: ClassVar[str] = "1"
    implementation: ClassVar[str] = "compression_dags.depth.concat.planning:plan_windows"
    method: Literal["concat"] = "concat"
    score: Literal["l1", "l2"] = Field(
        "l2", description="sensitivity of a unit: root mean square · L2 norm of its column, or mean |a| · L1 (CoMe)"
    )
    shares: Literal["free", "bi", "equal"] = Field(
        "free", description="free: one ranking of all members' units; bi: by block influence; equal"
    )
    power: float = Field(1.0, ge=0, description="exponent p of block influence in the shares")
