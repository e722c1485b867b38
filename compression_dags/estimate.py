"""What a run will take: seconds, memory and disk, from shapes and from what past runs in this home took.

Without past runs the rates below are used; docs/log/estimate-2026-11.md says where they come from. They are meant to be
right within a factor of two on two idle CPU cores, or on one H100. Reads manifests only; imports neither torch nor
Dagster.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression_dags.heartbeat import spoken
from compression_dags.provenance.artifacts import METADATA
from compression_dags.registry import stage_kinds

#: Multiply-adds a second of a pass over tokens, and seconds before anything is computed (imports, the graph).
SPEED = {"cpu": 6e10, "cuda": 3e14}
START = {"cpu": 12.0, "cuda": 15.0}
#: What a layer costs a token beside its weights (attention, norms, launches of kernels), in multiply-adds.
BESIDE = {"cpu": 150_000, "cuda": 5_000_000}
#: Bytes a second of reading, hashing and writing weights.
COPIED = 200e6
#: Step, or step:method → (seconds, seconds a layer, passes over the tokens that it amounts to).
RATES: dict[str, tuple[float, float, float]] = {
    "base_model": (4.0, 0.0, 0.0),
    "calibration_tokens": (1.0, 0.0, 0.0),
    "calibration_activations": (1.0, 0.6, 3.0),
    "similarity_npib": (5.0, 0.5, 0.0),
    "similarity_cka": (5.0, 0.3, 0.0),
    "similarity": (1.0, 0.05, 0.0),
    "merge_plan": (0.2, 0.0, 0.0),
    "merge_plan:sleb": (1.0, 0.0, 40.0),
    "merge_plan:laco": (1.0, 0.0, 20.0),
    "merge_plan:mka": (5.0, 1.0, 40.0),
    "merge_plan:come": (1.0, 0.2, 9.0),
    "merge_plan:come-p": (2.0, 0.2, 40.0),
    "merge_plan:come-released": (2.0, 0.2, 10.0),
    "merge_plan:concat": (1.0, 0.2, 1.0),
    "merged_weights": (1.0, 0.0, 0.0),
    "recovered_weights": (1.0, 0.6, 3.5),
    "recovered_weights:distill-sp": (5.0, 0.0, 120.0),
    "recovered_weights:distill-mp": (5.0, 0.0, 120.0),
    "sparsity_plan": (0.3, 0.0, 3.0),
    "sparse_weights": (1.0, 0.6, 2.5),
    "sparse_weights:magnitude": (1.0, 0.05, 0.0),
    "sparse_weights:admm": (1.0, 2.0, 4.0),
    "quantization_plan": (10.0, 3.0, 25.0),
    "quantized_weights": (1.0, 1.0, 5.0),
    "quantized_weights:rtn": (1.0, 0.05, 0.0),
    "quantized_weights:awq": (1.0, 1.0, 6.0),
    "alternatives": (15.0, 3.5, 30.0),
    "evaluation": (1.5, 0.05, 1.5),
    "samples": (1.0, 0.1, 0.0),
    "other": (0.2, 0.0, 0.0),
}
WEIGHTS = tuple(kind.name for kinds in stage_kinds().values() for kind in kinds if kind.weights)
#: Resident memory without a model: Python, torch, transformers, Dagster.
BARE_BYTES = 850e6
#: Past runs that are read, the latest of a kind.
PAST = 12


@dataclass(frozen=True)
class Model:
    """What the cost of a step hangs on."""

    parameters: int
    layers: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """One asset of a run.

    Attributes:
        kind: the store's kind: `merge_plan`, `evaluation`, …
        method: of the stage, if it has one.
        tokens: that it runs the model on, once.
        stored: nothing is computed.
    """

    name: str
    kind: str
    method: str = ""
    tokens: int = 0
    stored: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a run will take. `known` says whether past runs of this home had a part in it."""

    seconds: float
    memory: float
    disk: float
    steps: int
    missing: int
    known: bool = False

    def line(self) -> str:
        if not self.missing:
            return f"all {self.steps} assets are stored"
        stored = f" ({self.steps - self.missing} stored)" if self.missing < self.steps else ""
        source = "by past runs" if self.known else "by built-in rates"
        return (
            f"about {spoken(self.seconds)} ({source}): {self.missing} of {self.steps} assets to compute{stored}; "
            f"{_size(self.memory)} memory, {_size(self.disk)} disk"
        )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{max(1, round(count / 1e6))} MB"


@dataclass(frozen=True)
class Past:
    """What past runs took over what the built-in rates say, by kind; and the largest memory."""

    factors: dict[str, float] = field(default_factory=dict)
    memory: float = 0.0


def estimate(model: Model, steps: Iterable[Work], device: str, past: Past | None = None) -> Estimate:
    """The sum over the steps that are not stored."""
    listed, past = list(steps), past or Past()
    missing = [s for s in listed if not s.stored]
    seconds = sum(predicted(s.kind, s.method, s.tokens, model, device) * past.factors.get(s.kind, 1.0) for s in missing)
    memory = max(past.memory, BARE_BYTES + 5.0 * model.parameters)
    disk = sum(_disk(s, model) for s in missing)
    known = any(s.kind in past.factors for s in missing)
    return Estimate(seconds + START[device] * bool(missing), memory, disk, len(listed), len(missing), known)


def predicted(kind: str, method: str, tokens: int, model: Model, device: str) -> float:
    """Seconds of one step by the built-in rates."""
    family = kind.split("_")[0]
    fixed, a_layer, passes = next(RATES[k] for k in (f"{kind}:{method}", kind, family, "other") if k in RATES)
    moved = model.bytes / COPIED if kind == "base_model" or kind in WEIGHTS else 0.0
    work = tokens * (model.parameters + BESIDE[device] * model.layers)
    return fixed + a_layer * model.layers + moved + passes * work / SPEED[device]


def _disk(step: Work, model: Model) -> float:
    """Bytes that a step leaves: a checkpoint, or the states of some thousand tokens; others are small."""
    if step.kind in (*WEIGHTS, "base_model"):
        return model.bytes
    return 2048 * 4.0 * (model.parameters / max(1, model.layers) / 12) ** 0.5 * model.layers if step.tokens else 2e5


def read_past(home: Path, kinds: Iterable[str], device: str, largest: int) -> Past:
    """What the latest runs of these kinds took on such a device; memory, of models of at most `largest` parameters."""
    sizes, factors, memory = _models(home), dict[str, float](), 0.0
    for kind in dict.fromkeys(kinds):
        ratios = []
        for manifest in _latest(home, kind):
            request = manifest["request"]
            if request["numeric"].get("device", device) != device:
                continue
            model = next((sizes[d] for d in request["inputs"].values() if d in sizes), None)
            tokens = manifest[METADATA].get("tokens") or _tokens(home, request["inputs"])
            if model is None:
                continue
            method = request["config"].get("method", "")
            ratios.append(manifest["seconds"] / predicted(kind, str(method), int(tokens or 0), model, device))
            if model.parameters <= largest:
                memory = max(memory, 2**20 * float(manifest["peak_memory_mb"]))
        if ratios:
            factors[kind] = statistics.median(ratios)
    return Past(factors, memory)


def _models(home: Path) -> dict[str, Model]:
    """Digest of stored weights → their size."""
    found: dict[str, Model] = {}
    for kind in ("base_model", *WEIGHTS):
        for manifest in _latest(home, kind):
            size = manifest[METADATA]
            if {"parameters", "layers", "bytes"} <= size.keys():
                found[manifest["digest"]] = Model(size["parameters"], size["layers"], size["bytes"])
    return found


def _tokens(home: Path, inputs: dict[str, str]) -> int:
    """Calibration tokens among the inputs of a past run."""
    wanted = inputs.get("calibration_tokens")
    found = (m[METADATA].get("tokens", 0) for m in _latest(home, "calibration_tokens") if m["digest"] == wanted)
    return int(next(found, 0)) if wanted else 0


def _latest(home: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Manifests of the artifacts of a kind that were made last; damaged ones are passed over."""
    folder = home / "artifacts" / kind
    try:
        with os.scandir(folder) as entries:
            names = sorted(((e.stat().st_mtime, e.name) for e in entries if e.is_dir()), reverse=True)[:PAST]
    except OSError:
        return
    for _, name in names:
        try:
            found = json.loads((folder / name / "manifest.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and {"request", METADATA, "digest", "seconds", "peak_memory_mb"} <= found.keys():
            yield found
