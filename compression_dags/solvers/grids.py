"""The values that a rounded weight may take, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Q_MAX = {"fp8": 448.0, "fp4": 6.0}


@dataclass(frozen=True)
class Grid:
    """Which values a weight may take.

    Attributes:
        kind: int (two's complement), fp8 (E4M3), or fp4 (E2M1).
        group_size: inputs that share a scale; None is one scale for each output channel.
        block_rows: output channels that share it too.
        scaling: how scales are kept. `stored`: in the dtype of the weight; `nvfp4`: in FP8, with a float32 scale of
            the whole matrix; `mx`: as powers of two (E8M0).
    """

    kind: Literal["int", "fp8", "fp4"]
    bits: int
    group_size: int | None
    symmetric: bool = True
    block_rows: int = 1
    scaling: Literal["stored", "nvfp4", "mx"] = "stored"

    @property
    def range(self) -> tuple[float, float]:
        if self.kind == "int":
            return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        return -Q_MAX[self.kind], Q_MAX[self.kind]
