"""Copies of stored checkpoints for the world outside: whole and verified, or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compression_dags.errors import InputError, IntegrityError
from compression_dags.paths import what_is
from compression_dags.provenance.artifacts import CHECKPOINT, MANIFEST, Artifact
from compression_dags.statefile import sync

_PREFIX = ".export-"
_CHUNK = 1 << 22


@contextlib.contextmanager
def new_directory(target: Path, *, outside: Path) -> Iterator[Path]:
    """A private folder that becomes `target` in one rename when the block ends well, and is gone when it does not.

    Where `target` is an empty folder that cannot be replaced (a mount), the files move into it one by one at the end.

    Args:
        target: new, or an empty folder.
        outside: the home, where nothing may be exported to.

    Raises:
        InputError: `target` is neither, lies in `outside`, or cannot be written, with the system's reason.
    """
    real = target.resolve()
    if os.path.lexists(real) and not real.is_dir():
        raise InputError(f"--to {target} {what_is(real)}; it must be a new or empty directory")
    if real.is_relative_to(outside.resolve()):
        raise InputError(f"--to {target} lies in the home {outside}; give a directory outside")
    try:
        if real.is_dir() and any(real.iterdir()):
            raise InputError(f"--to {target} must be a new or empty directory")
        replace = not (real.is_dir() and (os.path.ismount(real) or not os.access(real.parent, os.W_OK)))
        parent = real.parent if replace else real
        missing = [p for p in (parent, *parent.parents) if not p.exists()]
        above = next(p for p in (parent, *parent.parents) if p.exists())
        if not above.is_dir():
            raise InputError(f"--to {target} cannot be written: {above} is no directory")
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise InputError(f"--to {target} cannot be written: {_reason(error)}") from error
    try:
        yield work
        _settle(work)
        if replace:
            os.rename(work, real)  # takes the place of an empty folder
        else:
            _move_into(work, real)
        sync(real.parent)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"--to {target} cannot be written: {_reason(error)}; nothing was left there") from error
        raise


def copy_checkpoint(weights: Artifact, directory: Path) -> None:
    """Copy the files of a stored checkpoint, as the manifest names them, and compare what was read with its hashes.

    They are real copies: what a user does to an export must not reach the store.

    Raises:
        IntegrityError: a stored file is missing or differs.
        OSError: `directory` cannot be written.
    """
    files = json.loads((weights.path / MANIFEST).read_text(encoding="utf-8"))["files"]
    names = [name for name in files if Path(name).parts[0] == CHECKPOINT]
    if not names:
        raise IntegrityError(f"{weights.path} holds no checkpoint; run the recipe again")
    for name in names:
        copy = directory / Path(name).relative_to(CHECKPOINT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if _copy(weights.path / name, copy) != files[name]["sha256"]:
            raise IntegrityError(
                f"the stored file {weights.path / name} is damaged: it is not what was computed; nothing was exported, "
                "run the recipe again"
            )


def _copy(source: Path, copy: Path) -> str:
    """Copy a file; the sha256 of what was read."""
    digest = hashlib.sha256()
    try:
        reading = source.open("rb")
    except OSError as error:
        raise IntegrityError(f"the stored file {source} cannot be read: {_reason(error)}") from error
    with reading, copy.open("wb") as writing:
        while chunk := reading.read(_CHUNK):
            digest.update(chunk)
            writing.write(chunk)
    return digest.hexdigest()


def _settle(work: Path) -> None:
    """Modes that everybody can read, and every byte on disk."""
    for path in [*work.rglob("*"), work]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        sync(path)


def _move_into(work: Path, target: Path) -> None:
    moved: list[Path] = []
    try:
        for path in sorted(work.iterdir()):
            os.rename(path, target / path.name)
            moved.append(target / path.name)
        work.rmdir()
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
