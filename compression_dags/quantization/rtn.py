"""Round to nearest: the floor that every calibrated quantizer is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.schemes import QuantizeStage

if TYPE_CHECKING:
    from compression_dags.solvers.rounding import Rounded


class RTN(QuantizeStage):
    """Round every weight to the nearest value of a grid scaled to its group's range; needs no data.

    A group of inputs of one output channel shares a scale s (and a zero point z if asymmetric):
    Ŵ = (clamp(round(W/s + z)) - z)·s. Schemes with 8 bit activations also round a projection's inputs, with scales
    found while the model runs.
    """

    version: ClassVar[str] = "1"
    method: Literal["rtn"] = "rtn"

    def round_weight(self, source: Checkpoint, name: str, device: str, choice: Choice) -> Rounded:
        from compression_dags.solvers.rounding import round_to_nearest

        return round_to_nearest(source.tensor(name).to(device), choice.grid(), name)
