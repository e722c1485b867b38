"""Round to nearest: the floor that every calibrated quantizer is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

from compression_dags.quantization.stage import QuantizeStage


class RTN(QuantizeStage):
    """Round every weight to the nearest value of a grid scaled to its group's range; needs no data.

    A group of inputs of one output channel shares a scale s (and a zero point z if asymmetric):
    Ŵ = (clamp(round(W/s + z)) - z)·s. Schemes with 8 bit activations also round a projection's inputs, with scales
    found while the model runs.
    """

    version: ClassVar[str] = "1"
    implementation: ClassVar[str] = "compression_dags.solvers.rounding:round_to_nearest"
    method: Literal["rtn"] = "rtn"
