"""Turning a source into an artifact: what identifies it, what was imported before, and reading each byte once."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compression_dags.checkpoints.headers import is_file
from compression_dags.checkpoints.importing import ImportedModel, check_headers, import_checkpoint, stamps_of
from compression_dags.checkpoints.model_files import check_entries
from compression_dags.errors import InputError
from compression_dags.resources.model_hub import ModelHub, ModelSource
from compression_dags.stage import Progress, silent
from compression_dags.statefile import locked, read_entries, write_entries

logger = logging.getLogger("compression_dags")
REMEMBERED = "digests.json"


@dataclass(frozen=True)
class Remembered:
    """A directory as it was last imported: stamps of its files, and what identifies the import."""

    stamps: dict[str, list[int]]
    identity: dict[str, str]


@dataclass
class Opened:
    """A source whose identity is known. `staged` is its checked copy, where identifying it took reading it.

    `refused` tells after a failure whether the model itself was the cause, and not a download.
    """

    hub: ModelHub
    source: ModelSource
    identity: dict[str, str]
    staged: ImportedModel | None = None
    refused: bool = False

    def place(self, directory: Path, scratch: Path, progress: Progress = silent) -> ImportedModel:
        """The checked copy, in `directory`.

        Raises:
            InputError: the source is gone, refused, cannot be downloaded, or changed since it was identified.
        """
        if self.staged is not None:
            directory.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.staged.path, directory)
            return replace(self.staged, path=directory)
        imported = _import(self, self.hub.fetch(self.source, scratch), directory, progress)
        if is_local(self.source):
            if imported.identity != self.identity:
                forget(self.hub, self.source)
                shutil.rmtree(directory)
                raise InputError(f"{self.source.location} changed while it was read; run the same command again")
            remember(self.hub, self.source, imported)
        return imported


@contextlib.contextmanager
def opened(hub: ModelHub, source: ModelSource, progress: Progress = silent) -> Iterator[Opened]:
    """Identify a source. Files that are known by their stamps are not read; others are imported into a private folder.

    Raises:
        InputError: the source is gone and was never imported, or is refused.
    """
    known = known_identity(hub, source)
    if known is not None:
        yield Opened(hub, source, known)
        return
    with _staging(Path(hub.home), source.slug) as folder:
        found = Opened(hub, source, {})
        try:
            start = time.monotonic()
            found.staged = _import(found, hub.fetch(source, folder), folder / "checkpoint", progress)
            found.staged.metadata["import_seconds"] = round(time.monotonic() - start, 1)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"home {hub.home} is full; free space (`compression-dags store --prune`)") from error
            raise InputError(f"home {hub.home} cannot be written: {error}; choose another --home") from error
        found.identity = found.staged.identity
        remember(hub, source, found.staged)
        yield found


def identity(hub: ModelHub, source: ModelSource) -> dict[str, str]:
    """What enters the fingerprint of the base model: sha256 of the files that computing depends on, or a pin.

    Raises:
        InputError: as `opened`.
    """
    with opened(hub, source) as found:
        return found.identity


def known_identity(hub: ModelHub, source: ModelSource) -> dict[str, str] | None:
    """The identity, where it is known without reading the weights; a source that is gone is what it last was.

    Raises:
        InputError: it is gone, and was never imported.
    """
    if not is_local(source):
        return hub.pin(source)
    held = remembered(hub).get(source.location)
    if is_gone(source):
        if held is None:
            raise InputError(f"model {source.slug!r} was registered from {source.location}, which is gone")
        _warn_gone(source.slug, source.location)
        return held.identity
    check_entries(Path(source.location))
    return held.identity if held and held.stamps == stamps_of(Path(source.location)) else None


def check(hub: ModelHub, source: ModelSource) -> None:
    """Whatever can be known of a source without reading a tensor, a download or writing anything.

    Raises:
        InputError: the name is taken, or the model is refused by its small files and headers.
    """
    hub.check_name(source)
    if is_local(source) and known_identity(hub, source) is None:
        check_headers(Path(source.location))


def is_local(source: ModelSource) -> bool:
    return source.kind in {"embedded", "directory"}


def is_gone(source: ModelSource) -> bool:
    """Whether nothing is left where a local model was: no folder, or one without its config (an empty mount point)."""
    return is_local(source) and not is_file(Path(source.location) / "config.json")


def stamp_of(source: ModelSource) -> str:
    """A short text that changes when the files of a source do."""
    stated: Any = stamps_of(Path(source.location)) if is_local(source) else source.revision
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]


def remembered(hub: ModelHub) -> dict[str, Remembered]:
    """Location → what was imported from it last."""
    found = read_entries(hub.folder / REMEMBERED, _parse)
    return {location: entry for location, entry in found.items() if entry is not None}


def _parse(_: str, entry: Any) -> Remembered | None:
    if isinstance(entry, list):
        return None  # of version 1: one entry a file
    stamps = {str(name): [int(n) for n in stamp] for name, stamp in entry["stamps"].items()}
    return Remembered(stamps, {str(name): str(digest) for name, digest in entry["identity"].items()})


def remember(hub: ModelHub, source: ModelSource, imported: ImportedModel) -> None:
    _update(hub, source.location, {"stamps": imported.stamps, "identity": imported.identity})


def forget(hub: ModelHub, source: ModelSource) -> None:
    _update(hub, source.location, None)


def _update(hub: ModelHub, location: str, entry: dict[str, Any] | None) -> None:
    path = hub.folder / REMEMBERED
    with hub.writable(), locked(path):
        entries: dict[str, Any] = {key: vars(held) for key, held in remembered(hub).items()}
        if entry is None:
            entries.pop(location, None)
        else:
            entries[location] = entry
        write_entries(path, entries)


def _import(found: Opened, folder: Path, directory: Path, progress: Progress) -> ImportedModel:
    source = found.source
    try:
        return import_checkpoint(folder, directory, revision=source.revision, origin=source.origin, progress=progress)
    except InputError:
        found.refused = True
        raise


@functools.cache  # once a process
def _warn_gone(slug: str, location: str) -> None:
    logger.warning("model %r: %s is gone; the copy imported from it is used", slug, location)


@contextlib.contextmanager
def _staging(home: Path, slug: str) -> Iterator[Path]:
    """A private folder in the store's file system, removed at the end; those of dead processes are removed first."""
    parent = home / "partial" / "incoming"
    parent.mkdir(parents=True, exist_ok=True)
    for lock in parent.glob("*.lock"):
        with lock.open("w") as handle, contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    folder = parent / f"{slug}-{os.getpid()}"
    lock = parent / f"{folder.name}.lock"
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
