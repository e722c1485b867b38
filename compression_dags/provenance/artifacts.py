"""What an artifact is: its fingerprint (what made it), its digest (what it is), and the manifest that says both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from compression_dags.provenance.contents import computed_digest, computes
from compression_dags.step import Step

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
DECISIONS = "decisions.parquet"
METRICS = "metrics.json"
SIZE = "size.json"
#: The key of an artifact's metadata in manifests and in `compression.json`: those that are stored have this one.
METADATA = "facts"


@dataclass(frozen=True)
class Artifact:
    """A handle to stored bytes; assets exchange these, never tensors.

    Attributes:
        kind: stage kind, the folder in the store.
        fingerprint: sha256 of everything that determines the result.
        digest: sha256 over every byte that a reader may use. Equal digests compute the same.
        path: where the files lie.
        metadata: small JSON values for display. A later step reads files instead: the digest does not cover them.
        inputs: digest of every input, by role.
        run_id: the Dagster run that computed it.
        seconds, peak_memory_mb, peak_device_memory_mb: what computing it took, in the host's memory and on its device.
        recipe: the recipe as it was run, where a handle of one of its assets led here.
    """

    kind: str
    fingerprint: str
    digest: str
    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    peak_device_memory_mb: float = 0.0
    recipe: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def checkpoint(self) -> Path:
        """The stock checkpoint directory of a weights artifact."""
        return self.path / CHECKPOINT

    @property
    def decisions(self) -> Path | None:
        path = self.path / DECISIONS
        return path if path.is_file() else None

    @property
    def metrics(self) -> dict[str, float]:
        """Scores of an evaluation."""
        return json.loads((self.path / METRICS).read_text())

    @property
    def size(self) -> dict[str, int]:
        """`layers`, `parameters` and `bytes` of a weights artifact; of a base model also its `context` in tokens."""
        return json.loads((self.path / SIZE).read_text())


@dataclass(frozen=True)
class Request:
    """What determines an artifact.

    Attributes:
        kind: stage kind.
        version: code version of the stage, declared beside its implementation.
        config: canonical stage options (JSON), defaults written out, no places on a machine.
        inputs: digest of every input, by role.
        numeric: device type and compute dtype, for results that depend on them.
    """

    kind: str
    version: str
    config: dict[str, Any]
    inputs: dict[str, str]
    numeric: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def request_of(step: Step, digests: Mapping[str, str], numeric: Mapping[str, str]) -> Request:
    """What determines the artifact of a step.

    Args:
        digests: of its inputs, by role.
        numeric: device type and compute dtype, of the accelerator.
    """
    inputs = {**digests, **step.data()}
    return Request(step.kind or step.name, step.version, dict(step.options), inputs, dict(numeric) if step.gpu else {})


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def describe_files(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Relative name → size, sha256, and whether the file is part of the digest, of all but the manifest.

    Args:
        known: relative name → sha256 of files that were hashed while they were written.
    """
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(directory)): _describe(p, directory, known or {}) for p in files}


def _describe(path: Path, directory: Path, known: Mapping[str, str]) -> dict[str, Any]:
    name = str(path.relative_to(directory))
    sha256 = known.get(name) or file_digest(path)
    entry = {"bytes": path.stat().st_size, "sha256": sha256}
    if is_content(name) and (computed := computed_digest(path, sha256)) != sha256:
        entry["computed"] = computed
    return entry


def is_content(name: str) -> bool:
    """Whether a file of an artifact is part of its digest.

    Decision rows explain the bytes. Of a checkpoint only what computes counts, not its card or licence.
    """
    inside = PurePosixPath(name)
    return computes(name) if inside.parts[0] == CHECKPOINT else name != DECISIONS


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of a set of files, described by `describe_files`: what a reader may use of them, and nothing else."""
    named = {name: entry.get("computed", entry["sha256"]) for name, entry in files.items() if is_content(name)}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in a directory, or None if there is none that can be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        whole = all({"bytes", "sha256"} <= entry.keys() for entry in files.values())
        return manifest if whole and {"kind", "inputs"} <= manifest["request"].keys() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def artifact_of(directory: Path, manifest: Mapping[str, Any]) -> Artifact:
    """The handle that a manifest in `directory` describes."""
    request = manifest["request"]
    return Artifact(
        request["kind"],
        manifest["fingerprint"],
        manifest["digest"],
        directory,
        manifest.get(METADATA, {}),
        request["inputs"],
        manifest.get("run_id", ""),
        manifest.get("seconds", 0.0),
        manifest.get("peak_memory_mb", 0.0),
        manifest.get("peak_device_memory_mb", 0.0),
    )


def write_size(directory: Path, size: Mapping[str, int]) -> None:
    """Write what a scorecard reads of a weights artifact: see `Artifact.size`."""
    (directory / SIZE).write_text(json.dumps(dict(size), sort_keys=True) + "\n", encoding="utf-8")


def write_metrics(directory: Path, metrics: Mapping[str, float]) -> None:
    """Write the scores of an evaluation: see `Artifact.metrics`."""
    (directory / METRICS).write_text(json.dumps(dict(metrics), indent=1, sort_keys=True) + "\n", encoding="utf-8")
