"""What an artifact is: its fingerprint (what made it), its digest (what it is), and the manifest that says both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
DECISIONS = "decisions.parquet"


@dataclass(frozen=True)
class Artifact:
    """A handle to stored bytes; assets exchange these, never tensors.

    Attributes:
        kind: stage kind, the folder in the store.
        fingerprint: sha256 of everything that determines the result.
        digest: sha256 over the names and contents of the files. Equal digests are equal bytes.
        path: where the files lie.
        facts: small JSON values about it (layers, parameters, scores, …).
        inputs: digest of every input, by role.
        run_id: the Dagster run that computed it.
        seconds, peak_memory_mb: what computing it took.
    """

    kind: str
    fingerprint: str
    digest: str
    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    seconds: float = 0.0
    peak_memory_mb: float = 0.0

    @property
    def checkpoint(self) -> Path:
        """The stock checkpoint directory of a weights artifact."""
        return self.path / CHECKPOINT

    @property
    def decisions(self) -> Path | None:
        path = self.path / DECISIONS
        return path if path.is_file() else None


@dataclass(frozen=True)
class Request:
    """What determines an artifact.

    Attributes:
        kind: stage kind.
        version: code version of the stage, declared beside its implementation.
        config: canonical stage options (JSON).
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


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Relative name → size and sha256 of every file below a directory, except the manifest."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in files}


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """Digest of a set of files. Decision rows explain the bytes; they are not part of them."""
    named = {name: entry["sha256"] for name, entry in files.items() if name != DECISIONS}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> Artifact | None:
    """The artifact in a directory, or None if it holds no whole one (missing manifest or a file of another size)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            if (directory / name).stat().st_size != entry["bytes"]:
                return None
    except (OSError, ValueError, KeyError):
        return None
    request = manifest["request"]
    return Artifact(
        request["kind"],
        manifest["fingerprint"],
        manifest["digest"],
        directory,
        manifest["facts"],
        request["inputs"],
        manifest["run_id"],
        manifest["seconds"],
        manifest["peak_memory_mb"],
    )
