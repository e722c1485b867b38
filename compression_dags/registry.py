"""Method name → implementation. A new method is one file and one line here."""

from __future__ import annotations

from compression_dags.merging.angular import Angular
from compression_dags.merging.least_squares import LeastSquares
from compression_dags.merging.reverse import Reverse
from compression_dags.merging.shortgpt import ShortGPT
from compression_dags.merging.weighted_sum import WeightedSum
from compression_dags.quantization.rtn import RTN
from compression_dags.stages import Stage

METHODS: dict[str, dict[str, type[Stage]]] = {
    "merge": {"reverse": Reverse, "shortgpt": ShortGPT, "angular": Angular, "weighted-sum": WeightedSum},
    "recover": {"least-squares": LeastSquares},
    "quantize": {"rtn": RTN},
}
