"""Method name → implementation. A new method is one file and one line here."""

from __future__ import annotations

from compression_dags.depth.concat.come import Come, ComeP
from compression_dags.depth.concat.come_released import ComeReleased
from compression_dags.depth.concat.concat import Concat
from compression_dags.depth.methods.angular import Angular
from compression_dags.depth.methods.laco import LaCo
from compression_dags.depth.methods.planned import Planned
from compression_dags.depth.methods.reverse import Reverse
from compression_dags.depth.methods.shortgpt import ShortGPT
from compression_dags.depth.methods.sleb import SLEB
from compression_dags.depth.methods.weighted_sum import WeightedSum
from compression_dags.depth.mka.options import MKA
from compression_dags.depth.mka.paper import MKAPaper
from compression_dags.depth.mka.released import MKACodeFixedWrite, MKAReleased
from compression_dags.quantization.awq import AWQ
from compression_dags.quantization.gptq import GPTQ
from compression_dags.quantization.rtn import RTN
from compression_dags.quantization.smoothquant import SmoothQuant
from compression_dags.recovery.distillation.options import DistillMP, DistillSP
from compression_dags.recovery.least_squares import LeastSquares
from compression_dags.recovery.linear_patch import LinearPatch
from compression_dags.sparsity.pruners.admm import ADMM
from compression_dags.sparsity.pruners.magnitude import Magnitude
from compression_dags.sparsity.pruners.sparsegpt import SparseGPT
from compression_dags.sparsity.pruners.wanda import Wanda
from compression_dags.stage import Stage
from compression_dags.step import Kind

#: Stage → its methods; the order is that of a recipe's stages.
METHODS: dict[str, dict[str, type[Stage]]] = {
    "merge": {
        "reverse": Reverse,
        "shortgpt": ShortGPT,
        "angular": Angular,
        "weighted-sum": WeightedSum,
        "sleb": SLEB,
        "laco": LaCo,
        "mka": MKA,
        "mka-paper": MKAPaper,
        "mka-released": MKAReleased,
        "mka-code-fixed-write": MKACodeFixedWrite,
        "come": Come,
        "come-p": ComeP,
        "come-released": ComeReleased,
        "concat": Concat,
        "planned": Planned,
    },
    "recover": {
        "least-squares": LeastSquares,
        "linear-patch": LinearPatch,
        "distill-sp": DistillSP,
        "distill-mp": DistillMP,
    },
    "sparsify": {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "admm": ADMM},
    "quantize": {"rtn": RTN, "gptq": GPTQ, "awq": AWQ, "smoothquant": SmoothQuant},
}


def stage_kinds() -> dict[str, tuple[Kind, ...]]:
    """Stage → the kinds of artifacts that it makes, in the order of a recipe's stages."""
    return {stage: next(iter(methods.values())).kinds for stage, methods in METHODS.items()}
