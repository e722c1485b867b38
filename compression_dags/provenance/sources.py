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
_STREAM = ("compression_dags.calibration.streaming", "compression_dags.architectures.decoder")
_WRITE = ("compression_dags.checkpoints.writer", "compression_dags.architectures.decoder")
#: Stage → (module and attribute path of its version, modules that determine its bytes).
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "calibration_tokens": ("compression_dags.calibration.corpora:Calibration.version", ()),
    "calibration_activations": (
        "compression_dags.calibration.statistics:VERSION",
        (
            "compression_dags.calibration.activations",
            *_STREAM,
        ),
    ),
    "merged_weights": ("compression_dags.merging.apply:VERSION", _WRITE),
    "merge: reverse": ("compression_dags.merging.reverse:Reverse.version", ("compression_dags.merging.plan",)),
    "merge: shortgpt": ("compression_dags.merging.shortgpt:ShortGPT.version", ("compression_dags.merging.plan",)),
    "merge: angular": ("compression_dags.merging.angular:Angular.version", ("compression_dags.merging.plan",)),
    "merge: weighted-sum": (
        "compression_dags.merging.weighted_sum:WeightedSum.version",
        ("compression_dags.merging.plan",),
    ),
    "recover: least-squares": (
        "compression_dags.merging.least_squares:LeastSquares.version",
        (*_STREAM, "compression_dags.checkpoints.writer"),
    ),
    "quantize: rtn": (
        "compression_dags.quantization.rtn:RTN.version",
        (
            "compression_dags.quantization.schemes",
            "compression_dags.quantization.rounding",
            "compression_dags.checkpoints.writer",
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
