"""The artifact store: content-addressed folders that readers see whole or not at all."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dagster as dg

from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import (
    MANIFEST,
    Artifact,
    Request,
    content_digest,
    describe_files,
    read_manifest,
)
from compression_dags.provenance.progress import Progress

logger = logging.getLogger("compression_dags")
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Workplace:
    """Where a build writes: `out` is published whole, `scratch` survives a kill and is gone after success."""

    out: Path
    scratch: Path
    request: Request

    def progress(self) -> Progress:
        return Progress(self.scratch, asdict(self.request))


@dataclass(frozen=True)
class Produced:
    """An artifact, and whether it was there already (`hit`) or computed now, in `seconds`."""

    artifact: Artifact
    hit: bool
    seconds: float


class ArtifactStore(dg.ConfigurableResource):
    """Stage results under `<home>/artifacts/<kind>/<fingerprint>/`.

    A build happens in `<home>/partial/<kind>/<fingerprint>/`, under a file lock that the kernel frees when the process
    dies, and is moved into place in one rename after its files are on disk. So of two writers of one fingerprint the
    second waits and gets the first one's result; a killed build leaves nothing visible and resumes from its scratch.
    """

    home: str

    @property
    def root(self) -> Path:
        return Path(self.home)

    def ensure_writable(self, need_bytes: int = 0) -> None:
        """Refuse an unwritable or full home before anything is computed.

        Raises:
            InputError: naming the home, and the bytes free and needed.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}"
            probe.write_bytes(b"\0")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"home {self.root} is not writable ({error.strerror}); choose another with --home"
            ) from None
        free = shutil.disk_usage(self.root).free
        if free < need_bytes:
            raise InputError(
                f"home {self.root} has {free / 1e9:.1f} GB free; this run needs about {need_bytes / 1e9:.1f} GB"
            )

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        return read_manifest(self.root / "artifacts" / kind / fingerprint)

    def produce(self, request: Request, build: Callable[[Workplace], dict[str, Any]], run_id: str = "") -> Produced:
        """The artifact of `request`: the stored one, or what `build` makes. `build` returns its facts.

        Raises:
            InputError: the home is full; whatever was stored before is untouched.
        """
        start = time.monotonic()
        fingerprint = request.fingerprint
        if found := self.find(request.kind, fingerprint):
            return Produced(found, True, time.monotonic() - start)
        try:
            with self._building(request, fingerprint) as work:
                if found := self.find(request.kind, fingerprint):  # another writer finished while we waited
                    return Produced(found, True, time.monotonic() - start)
                facts = build(work)
                artifact = self._publish(request, work.out, facts, run_id, time.monotonic() - start)
        except OSError as error:
            if error.errno in _FULL:
                raise InputError(f"home {self.root} is full; free space (`compression-dags store --prune`)") from error
            raise
        return Produced(artifact, False, time.monotonic() - start)

    @contextlib.contextmanager
    def _building(self, request: Request, fingerprint: str) -> Iterator[Workplace]:
        folder = self.root / "partial" / request.kind
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{fingerprint}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            work = Workplace(folder / fingerprint / "out", folder / fingerprint / "scratch", request)
            shutil.rmtree(work.out, ignore_errors=True)
            work.out.mkdir(parents=True)
            yield work
            shutil.rmtree(folder / fingerprint, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)

    def _publish(self, request: Request, out: Path, facts: dict[str, Any], run_id: str, seconds: float) -> Artifact:
        files = describe_files(out)
        manifest = {
            "fingerprint": request.fingerprint,
            "digest": content_digest(files),
            "request": asdict(request),
            "files": files,
            "facts": facts,
            "environment": environment(),
            "run_id": run_id,
            "seconds": round(seconds, 3),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        for name in files:
            _sync(out / name)
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        _sync(out / MANIFEST)
        final = self.root / "artifacts" / request.kind / request.fingerprint
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # a damaged artifact (find() refused it): keep it aside, never delete it
            final.rename(final.with_name(f"{final.name}.damaged-{int(time.time())}"))
        os.replace(out, final)
        _sync(final.parent)
        artifact = read_manifest(final)
        if artifact is None:
            raise OSError(f"{final} was written but cannot be read back")
        return artifact

    # -- handles: which artifact an asset partition is ----------------------------------------------------------------

    def _handle_file(self, key: dg.AssetKey, partition: str) -> Path:
        return self.root.joinpath("handles", *key.path, f"{partition}.json")

    def remember(self, key: dg.AssetKey, partition: str, artifact: Artifact) -> None:
        path = self._handle_file(key, partition)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"kind": artifact.kind, "fingerprint": artifact.fingerprint}))
        os.replace(partial, path)

    def recall(self, key: dg.AssetKey, partition: str) -> Artifact | None:
        """The artifact that an asset partition last was, if it is still stored."""
        try:
            handle = json.loads(self._handle_file(key, partition).read_text())
        except (OSError, ValueError):
            return None
        return self.find(handle["kind"], handle["fingerprint"])

    def forget(self, partition: str) -> None:
        """Remove the handles of a partition; its artifacts stay until they are pruned."""
        for path in (self.root / "handles").rglob("*.json"):
            if path.name == f"{partition}.json":
                path.unlink(missing_ok=True)

    # -- upkeep -------------------------------------------------------------------------------------------------------

    def sizes(self) -> dict[str, dict[str, int]]:
        """Kind → number of artifacts and their bytes on disk (hard links counted once)."""
        found: dict[str, dict[str, int]] = {}
        seen: set[int] = set()
        for directory in sorted((self.root / "artifacts").glob("*/*")):
            entry = found.setdefault(directory.parent.name, {"artifacts": 0, "bytes": 0})
            entry["artifacts"] += 1
            for path in directory.rglob("*"):
                stat = path.stat()
                if path.is_file() and stat.st_ino not in seen:
                    seen.add(stat.st_ino)
                    entry["bytes"] += stat.st_size
        return found

    def unreachable(self, live_keys: set[tuple[str, ...]]) -> list[Path]:
        """Artifacts that no handle of a live asset names, and builds that no process holds."""
        live: set[tuple[str, str]] = set()
        handles = self.root / "handles"
        for path in handles.rglob("*.json"):
            if path.parent.relative_to(handles).parts in live_keys:
                handle = json.loads(path.read_text())
                live.add((handle["kind"], handle["fingerprint"]))
        stored = (self.root / "artifacts").glob("*/*")
        dead = [p for p in stored if (p.parent.name, p.name) not in live]
        return sorted(dead) + sorted(p for p in (self.root / "partial").glob("*/*") if p.is_dir() and not _locked(p))


class HandleIO(dg.ConfigurableIOManager):
    """Passes `Artifact` handles between assets; the bytes stay in the store."""

    store: dg.ResourceDependency[ArtifactStore]

    def handle_output(self, context: dg.OutputContext, obj: Artifact) -> None:
        self.store.remember(context.asset_key, context.partition_key, obj)

    def load_input(self, context: dg.InputContext) -> Artifact:
        found = self.store.recall(context.asset_key, context.partition_key)
        if found is None:
            raise InputError(
                f"{context.asset_key.to_user_string()} of {context.partition_key} is not in the store; "
                "materialize it first"
            )
        return found


def environment() -> dict[str, str]:
    """What is recorded, not hashed: interpreter, machine class, versions of the libraries that compute."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("torch", "transformers", "compressed-tensors", "scipy", "lm-eval", "dagster"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_memory_mb() -> float:
    """Peak resident memory of this process, and of the GPU if torch used one, in MB."""
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return max(host, torch.cuda.max_memory_allocated() / 2**20)
    return host


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(work: Path) -> bool:
    lock = work.with_name(f"{work.name}.lock")
    if not lock.exists():
        return False
    with lock.open("r") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
