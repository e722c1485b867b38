"""The artifact store: content-addressed folders that readers see whole or not at all."""

import contextlib
import errno
import functools
import glob
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dagster as dg

from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import (
    MANIFEST,
    METADATA,
    Artifact,
    Request,
    artifact_of,
    content_digest,
    describe_files,
    read_manifest,
)
from compression_dags.provenance.resume import ResumePoint
from compression_dags.resources.home import running, working
from compression_dags.resources.integrity import Integrity, protect, sync_tree
from compression_dags.resources.memory import PeakMemory, peak_memory
from compression_dags.statefile import replace_json, sync
from compression_dags.waiting import held

logger = logging.getLogger("compression_dags")
#: The asset whose partitions are recipes alone.
RECIPE = "recipe"
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Workplace:
    """Where a build writes: `out` is published whole, `scratch` survives a kill and is gone after success.

    `hashed`: a build that hashes a file while writing it may note the sha256 here, by path relative to `out`.
    """

    out: Path
    scratch: Path
    request: Request
    hashed: dict[str, str] = field(default_factory=dict)

    def resume(self) -> ResumePoint:
        return ResumePoint(self.scratch, asdict(self.request))


@dataclass(frozen=True)
class Produced:
    """An artifact, and how it came.

    Attributes:
        hit: it was stored already.
        seconds: what finding or computing it took now.
        damage: what was wrong with a stored one, which was kept aside and computed again.
    """

    artifact: Artifact
    hit: bool
    seconds: float
    damage: tuple[str, ...] = ()


#: Writes an artifact into its workplace and returns metadata for display.
Build = Callable[[Workplace], dict[str, Any]]


class ArtifactStore(dg.ConfigurableResource):
    """Stage results under `<home>/artifacts/<kind>/<fingerprint>/`.

    A build happens in `<home>/partial/<kind>/<fingerprint>/`, under a file lock that the kernel frees when the process
    dies. It is moved into place in one rename after its files are on disk. So of two writers of one fingerprint the
    second waits and gets the first one's result. A killed build leaves nothing visible and resumes from its scratch.

    Published files are read-only. Whatever `find` returns was checked against its manifest (see `integrity.py`).
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

    def directory(self, kind: str, fingerprint: str) -> Path:
        return self.root / "artifacts" / kind / fingerprint

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """The stored artifact, if it is whole and its bytes are the published ones."""
        artifact, damage = self.inspect(kind, fingerprint)
        return None if damage else artifact

    def inspect(self, kind: str, fingerprint: str, *, thorough: bool = False) -> tuple[Artifact | None, list[str]]:
        """The stored artifact and what is wrong with it; (None, []) if nothing is stored under this fingerprint.

        Args:
            thorough: hash every file, also those that were hashed before.
        """
        directory = self.directory(kind, fingerprint)
        manifest = read_manifest(directory)
        if manifest is None:
            return None, [f"{MANIFEST} is missing or cannot be read"] if directory.is_dir() else []
        return artifact_of(directory, manifest), Integrity(self.root).damage(directory, manifest, thorough=thorough)

    def manifest_of(self, kind: str, fingerprint: str) -> Artifact | None:
        """The artifact that is stored by its manifest alone; whether its bytes are whole is not looked at."""
        directory = self.directory(kind, fingerprint)
        manifest = read_manifest(directory)
        return artifact_of(directory, manifest) if manifest else None

    def run_of(self, fingerprint: str) -> str:
        """The Dagster run that computed an artifact; empty if it is not stored."""
        found = map(read_manifest, (self.root / "artifacts").glob(f"*/{fingerprint}"))
        return next((manifest.get("run_id", "") for manifest in found if manifest), "")

    def produce(self, request: Request, build: Build, run_id: str = "") -> Produced:
        """The artifact of `request`: the stored one, or what `build` makes. `build` returns its metadata.

        A stored one that is damaged is kept aside as `<fingerprint>.damaged-<time>` and built again.

        Raises:
            InputError: the home is full; whatever was stored before is untouched.
        """
        start = time.monotonic()
        fingerprint = request.fingerprint
        if found := self.find(request.kind, fingerprint):
            return Produced(found, True, time.monotonic() - start)
        try:
            with self._building(request, fingerprint) as work:
                found, damage = self.inspect(request.kind, fingerprint)
                if found and not damage:  # another writer finished while we waited
                    return Produced(found, True, time.monotonic() - start)
                for line in damage:
                    logger.warning("%s %s is damaged and built again: %s", request.kind, fingerprint[:12], line)
                with peak_memory() as peak:
                    metadata = build(work)
                artifact = self._publish(work, metadata, run_id, time.monotonic() - start, peak)
        except Exception as error:
            if _is_full(error):
                raise InputError(f"home {self.root} is full; free space (`compression-dags store --prune`)") from error
            raise
        return Produced(artifact, False, time.monotonic() - start, tuple(damage))

    @contextlib.contextmanager
    def _building(self, request: Request, fingerprint: str) -> Iterator[Workplace]:
        folder = self.root / "partial" / request.kind
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder / f"{fingerprint}.lock", f"{request.kind}, which another process builds") as lock:
            work = Workplace(folder / fingerprint / "out", folder / fingerprint / "scratch", request)
            shutil.rmtree(work.out, ignore_errors=True)
            work.out.mkdir(parents=True)
            yield work
            shutil.rmtree(folder / fingerprint, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)

    def _publish(
        self, work: Workplace, metadata: dict[str, Any], run_id: str, seconds: float, peak: PeakMemory
    ) -> Artifact:
        request, out = work.request, work.out
        files = describe_files(out, work.hashed)
        manifest = {
            "fingerprint": request.fingerprint,
            "digest": content_digest(files),
            "request": asdict(request),
            "files": files,
            METADATA: metadata,
            "environment": environment(),
            "run_id": run_id,
            "seconds": round(seconds, 3),
            "peak_memory_mb": round(peak.host_mb, 1),
            "peak_device_memory_mb": round(peak.device_mb, 1),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        protect(out)
        sync(out / MANIFEST)
        sync_tree(out)
        final = self.directory(request.kind, request.fingerprint)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # damaged, as find() said: kept aside, never deleted
            final.rename(final.with_name(f"{final.name}.damaged-{time.time_ns()}"))
        os.replace(out, final)
        sync(final.parent)
        if read_manifest(final) is None:
            raise OSError(f"{final} was written but cannot be read back")
        Integrity(self.root).remember(final, manifest)
        return artifact_of(final, manifest)

    @contextlib.contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["ArtifactStore"]:
        """A run, whoever started it, shares the home for as long as it lasts, and its lock says that it is alive."""
        with working(self.root), running(self.root, context.run_id):
            yield self

    # -- handles: which artifact an asset partition is ----------------------------------------------------------------

    def _handle_file(self, asset: str, partition: str) -> Path:
        return self.root / "handles" / asset / f"{partition}.json"

    def remember(self, asset: str, partition: str, artifact: Artifact) -> None:
        """Note that an asset partition is `artifact` now, and the recipe as it was run.

        Args:
            partition: `<base model>|<recipe>` of an asset on the grid, else the base model or the recipe.
        """
        handle: dict[str, Any] = {"kind": artifact.kind, "fingerprint": artifact.fingerprint}
        if artifact.recipe:
            handle["recipe"] = json.loads(json.dumps(artifact.recipe))
        path = self._handle_file(asset, partition)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text()) == handle:
                return  # as it is: a home of many recipes is looked at often
        replace_json(path, handle)

    def recall(self, asset: str, partition: str) -> Artifact | None:
        """The artifact that an asset partition last was, if it is still stored whole."""
        try:
            handle = json.loads(self._handle_file(asset, partition).read_text())
            kind, fingerprint, recipe = handle["kind"], handle["fingerprint"], handle.get("recipe")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        found = self.find(kind, fingerprint)
        return replace(found, recipe=recipe) if found else None

    def recipes_of(self, base_model: str, asset: str) -> list[str]:
        """Recipes of which a grid asset was made for a base model, sorted."""
        names = self._names(asset, f"{base_model}|")
        return sorted(name.partition("|")[2] for name in names)

    def assets_of(self, base_model: str) -> list[tuple[str, str]]:
        """(asset, partition) of every handle of a base model: of it alone, then of its pairs with recipes."""
        assets = sorted(p.name for p in (self.root / "handles").glob("*") if p.is_dir() and p.name != RECIPE)
        alone = [(asset, base_model) for asset in assets if self._handle_file(asset, base_model).is_file()]
        return alone + [(asset, name) for asset in assets for name in sorted(self._names(asset, f"{base_model}|"))]

    def _names(self, asset: str, prefix: str) -> list[str]:
        try:
            names = os.listdir(self.root / "handles" / asset)
        except OSError:
            return []
        return [n.removesuffix(".json") for n in names if n.startswith(prefix) and n.endswith(".json")]

    def forget(self, base_model: str) -> None:
        """Remove the handles of a base model; its artifacts stay until they are pruned."""
        for asset, partition in self.assets_of(base_model):
            self._handle_file(asset, partition).unlink(missing_ok=True)
        for path in (self.root / "handles").glob(f"*/*/{glob.escape(base_model)}.json"):  # of homes before the grid
            path.unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """What is recorded, not hashed: interpreter, machine class, versions of the libraries that compute."""
    return {"python": platform.python_version(), "machine": platform.machine(), **_libraries()}


@functools.cache
def _libraries() -> dict[str, str]:
    """Versions of those that are installed, read once: a home's first start stores an artifact for each recipe."""
    found = {}
    for name in ("torch", "transformers", "compressed-tensors", "scipy", "lm-eval", "dagster"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: safetensors and others wrap the system's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(sign in str(error) for sign in ("No space left on device", "os error 28", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False
