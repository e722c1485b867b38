"""The guard of code versions: which source each versioned stage had when its version was last decided.

`sources.json` maps a stage to its version and the sha256 of the modules that compute it. A changed module with an
unchanged version means that stored results would be reused although the code is another: a test fails then.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("sources.json")
_STREAM = (
    "compression_dags.calibration.streaming",
    "compression_dags.calibration.scored_rows",
    "compression_dags.architectures.decoder",
)
_WALK = (*_STREAM, *(f"compression_dags.calibration.{name}" for name in ("walk", "staged", "inputs")))
_WRITE = ("compression_dags.checkpoints.writer", "compression_dags.architectures.decoder")


def _merging(*names: str) -> tuple[str, ...]:
    return tuple(f"compression_dags.merging.{name}" for name in names)


_CONCAT = (
    *_merging("plan", "windows", "sensitivity", "concatenation", "concat_layers", "concat_search", "concat_walk"),
    *_STREAM,
)


def _sparsity(*names: str) -> tuple[str, ...]:
    return tuple(f"compression_dags.sparsity.{name}" for name in names)


_PRUNE = (
    *_sparsity("stage", "walk", "experts", "results", "pruner", "masks", "allocation", "evidence"),
    "compression_dags.solvers.hessian",
    "compression_dags.solvers.patterns",
    "compression_dags.solvers.sweep",
    *_WALK,
    "compression_dags.checkpoints.writer",
)
_ROUND = (
    *(f"compression_dags.quantization.{name}" for name in ("schemes", "formats", "packing")),
    "compression_dags.solvers.rounding",
    "compression_dags.checkpoints.writer",
)
_ROUND_WALK = (*(f"compression_dags.quantization.{name}" for name in ("walk", "smoothing")), *_WALK)
#: Stage → (module and attribute path of its version, modules that determine its bytes).
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "calibration_tokens": ("compression_dags.calibration.corpora:Calibration.version", ()),
    "calibration_activations": (
        "compression_dags.calibration.statistics:VERSION",
        (
            "compression_dags.calibration.activations",
            "compression_dags.calibration.module_features",
            "compression_dags.calibration.grams",
            *_STREAM,
        ),
    ),
    "similarity_npib": (
        "compression_dags.merging.similarity:VERSION",
        _merging("npib", "diffusion", "ksg", "resampling"),
    ),
    "similarity_cka": (
        "compression_dags.merging.similarity:VERSION",
        _merging("cka", "diffusion", "resampling"),
    ),
    "merged_weights": (
        "compression_dags.merging.apply:VERSION",
        ("compression_dags.merging.concatenation", *_WRITE),
    ),
    "merge: reverse": ("compression_dags.merging.reverse:Reverse.version", _merging("plan")),
    "merge: planned": ("compression_dags.merging.planned:Planned.version", _merging("plan")),
    "alternatives": (
        "compression_dags.planning.bank:VERSION",
        (
            "compression_dags.planning.alternatives",
            *_merging("scoring"),
            "compression_dags.calibration.scored_rows",
            "compression_dags.quantization.formats",
            "compression_dags.solvers.rounding",
            *_STREAM,
        ),
    ),
    "quantization_plan": (
        "compression_dags.planning.mixed:VERSION",
        ("compression_dags.planning.solve", "compression_dags.planning.emit"),
    ),
    "merge: shortgpt": ("compression_dags.merging.shortgpt:ShortGPT.version", _merging("plan")),
    "merge: angular": ("compression_dags.merging.angular:Angular.version", _merging("plan")),
    "merge: weighted-sum": (
        "compression_dags.merging.weighted_sum:WeightedSum.version",
        _merging("plan", "windows"),
    ),
    "merge: sleb": ("compression_dags.merging.sleb:SLEB.version", (*_merging("plan", "scoring"), *_STREAM)),
    "merge: laco": ("compression_dags.merging.laco:LaCo.version", (*_merging("plan", "scoring", "apply"), *_STREAM)),
    "merge: mka": (
        "compression_dags.merging.mka:MKA.version",
        (
            *_merging("plan", "mka_search", "regression_mean", "concatenation", "sensitivity", "ridge", "scoring"),
            *_STREAM,
        ),
    ),
    "merge: mka-paper": (
        "compression_dags.merging.mka_paper:MKAPaper.version",
        _merging("plan", "similarity", "mka_released"),
    ),
    "merge: mka-released": ("compression_dags.merging.mka_released:MKAReleased.version", _merging("plan")),
    "merge: mka-code-fixed-write": (
        "compression_dags.merging.mka_released:MKACodeFixedWrite.version",
        _merging("plan"),
    ),
    "merge: come": ("compression_dags.merging.come:Come.version", _CONCAT),
    "merge: come-p": ("compression_dags.merging.come:ComeP.version", (*_CONCAT, *_merging("concat_trials", "scoring"))),
    "merge: come-released": ("compression_dags.merging.come_released:ComeReleased.version", _CONCAT),
    "merge: concat": ("compression_dags.merging.concat:Concat.version", _CONCAT),
    "recover: least-squares": (
        "compression_dags.merging.least_squares:LeastSquares.version",
        (*_merging("recovery", "ridge", "scoring"), *_STREAM, "compression_dags.checkpoints.writer"),
    ),
    "recover: linear-patch": (
        "compression_dags.merging.linear_patch:LinearPatch.version",
        (*_merging("recovery", "scoring"), *_STREAM, "compression_dags.checkpoints.writer"),
    ),
    "recover: distill-sp": (
        "compression_dags.merging.distillation:DistillSP.version",
        (*_merging("recovery", "distill_run", "distill_model"), "compression_dags.calibration.corpora"),
    ),
    "recover: distill-mp": (
        "compression_dags.merging.distillation:DistillMP.version",
        (*_merging("recovery", "distill_run", "distill_model"), "compression_dags.calibration.corpora"),
    ),
    "similarity_redundancy": (
        "compression_dags.sparsity.redundancy:VERSION",
        ("compression_dags.calibration.grams",),
    ),
    **{
        f"allocation: {name}": (
            f"compression_dags.sparsity.allocate_{name}:{kind}.version",
            _sparsity("allocation", "knapsack", *(["redundancy"] if name == "als" else [])),
        )
        for name, kind in {
            "uniform": "Uniform",
            "als": "ALS",
            "owl": "OWL",
            "dlp": "DLP",
            "alpha": "Alpha",
            "ramp": "Ramp",
        }.items()
    },
    "sparsify: magnitude": ("compression_dags.sparsity.magnitude:Magnitude.version", _PRUNE),
    "sparsify: wanda": ("compression_dags.sparsity.wanda:Wanda.version", _PRUNE),
    "sparsify: sparsegpt": (
        "compression_dags.sparsity.sparsegpt:SparseGPT.version",
        (*_PRUNE, "compression_dags.solvers.factor", "compression_dags.solvers.sweep_triton"),
    ),
    "sparsify: admm": (
        "compression_dags.sparsity.admm:ADMM.version",
        (*_PRUNE, *(f"compression_dags.solvers.{name}" for name in ("admm", "refit", "factor"))),
    ),
    "quantize: rtn": ("compression_dags.quantization.rtn:RTN.version", _ROUND),
    "quantize: awq": (
        "compression_dags.quantization.awq:AWQ.version",
        (*_ROUND, *_ROUND_WALK, "compression_dags.solvers.hessian"),
    ),
    "quantize: smoothquant": (
        "compression_dags.quantization.smoothquant:SmoothQuant.version",
        (
            *_ROUND,
            *_ROUND_WALK,
            "compression_dags.quantization.gptq",
            "compression_dags.quantization.awq",
            *(
                f"compression_dags.solvers.{name}"
                for name in ("round_sweep", "round_triton", "sweep", "factor", "hessian", "refit")
            ),
        ),
    ),
    "quantize: gptq": (
        "compression_dags.quantization.gptq:GPTQ.version",
        (
            *_ROUND,
            *_ROUND_WALK,
            *(
                f"compression_dags.solvers.{name}"
                for name in ("round_sweep", "round_triton", "sweep", "factor", "hessian", "refit")
            ),
        ),
    ),
    "evaluation: perplexity": (
        "compression_dags.evaluation.tasks:PerplexityTask.version",
        ("compression_dags.evaluation.perplexity",),
    ),
    "evaluation: lm-eval": (
        "compression_dags.evaluation.tasks:HarnessTask.version",
        ("compression_dags.evaluation.harness",),
    ),
    "samples": ("compression_dags.evaluation.samples:VERSION", ()),
}


def current() -> dict[str, dict[str, Any]]:
    """Stage → its version and the digest of its sources, as they are now."""
    return {stage: _state(place, modules) for stage, (place, modules) in STAGES.items()}


def changed_without_version() -> list[str]:
    """Stages whose source changed while their version did not."""
    recorded = json.loads(RECORD.read_text())
    return [s for s, now in current().items() if now != recorded.get(s) and now["version"] == _version(recorded.get(s))]


def record() -> None:
    """Write down the present sources, after deciding that no stored result changes (or having raised the version)."""
    RECORD.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n")


def _version(entry: dict[str, Any] | None) -> str | None:
    return entry["version"] if entry else None


def _state(place: str, modules: tuple[str, ...]) -> dict[str, Any]:
    module_name, _, attributes = place.partition(":")
    value: Any = importlib.import_module(module_name)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    digest = hashlib.sha256()
    for name in (module_name, *modules):
        digest.update(_file(name).read_bytes())
    return {"version": value, "sources": digest.hexdigest()}


def _file(module: str) -> Path:
    return Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
