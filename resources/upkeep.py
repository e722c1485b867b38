"""Upkeep of a home's artifacts: sizes, a check of every hash, and removal of what nothing names.

Only what carries this project's marks is counted, checked or removed: folders named by a fingerprint, with a manifest
that says the same. Everything else is left alone and named. Links are never followed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import MANIFEST, file_digest
from compression_dags.resources.home import alone, working
from compression_dags.waiting import take

logger = logging.getLogger("compression_dags")
DAY = 86400.0
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_DAMAGED = re.compile(r"[0-9a-f]{64}\.damaged-.+")
_LOCK = re.compile(r"[0-9a-f]{64}\.lock")
_TRASH = re.compile(r"[0-9a-f]{32}")
_UNFINISHED_HANDLE = re.compile(r"\..+\.json\..+|.+\.[0-9]+")
#: Path of an asset, and its partition → whether the handle still counts.
Wanted = Callable[[tuple[str, ...], str], bool]


@dataclass(frozen=True)
class Stored:
    """One folder of the store that is this project's.

    Attributes:
        state: "artifact" is whole; "unreadable" lacks a manifest that fits; "damaged" was set aside; "partial" is a
            build, at work or killed.
    """

    kind: str
    name: str
    path: Path
    state: Literal["artifact", "unreadable", "damaged", "partial"]
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Garbage:
    """What prune may remove: a folder of the store, or the file of a handle."""

    path: Path
    reason: str
    bytes: int


@dataclass
class Pruned:
    """What was found, and after a removal what became of it: paths relative to the home."""

    removed: list[Garbage] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.removed)


@dataclass
class Checked:
    """Outcome of `check`. `damaged`: kind, fingerprint, path, and file → what is wrong with it."""

    artifacts: int = 0
    bytes: int = 0
    damaged: list[dict[str, Any]] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)


def scan(root: Path) -> tuple[list[Stored], list[str]]:
    """This project's folders below `artifacts/` and `partial/`, and the paths of everything else there."""
    ours: list[Stored] = []
    foreign: list[str] = []
    for area in ("artifacts", "partial"):
        for kind in _entries(root / area, foreign):
            if not kind.is_dir(follow_symlinks=False):
                foreign.append(kind.path)
                continue
            for entry in _entries(Path(kind.path), foreign):
                if found := _recognised(area, kind.name, entry):
                    ours.append(found)
                elif not (area == "partial" and _LOCK.fullmatch(entry.name)):
                    foreign.append(entry.path)
    return ours, foreign


def _entries(folder: Path, foreign: list[str]) -> list[os.DirEntry[str]]:
    """Entries of a real folder by name. A link in its place is foreign; one that is gone meanwhile is empty."""
    if folder.is_symlink():
        foreign.append(str(folder))
        return []
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError:
        foreign.append(str(folder))
        return []


def _recognised(area: str, kind: str, entry: os.DirEntry[str]) -> Stored | None:
    if not entry.is_dir(follow_symlinks=False):
        return None
    path = Path(entry.path)
    if _FINGERPRINT.fullmatch(entry.name):
        if area == "partial":
            return Stored(kind, entry.name, path, "partial")
        manifest = _manifest(path)
        fits = manifest.get("fingerprint") == entry.name and isinstance(manifest.get("files"), dict)
        return Stored(kind, entry.name, path, "artifact" if fits else "unreadable", manifest)
    if area == "artifacts" and _DAMAGED.fullmatch(entry.name):
        return Stored(kind, entry.name, path, "damaged")
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if not path.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def sizes(root: Path) -> dict[str, dict[str, int]]:
    """Kind → number of artifacts and their bytes on disk (hard links counted once)."""
    found: dict[str, dict[str, int]] = {}
    seen: set[tuple[int, int]] = set()
    for stored in scan(root)[0]:
        if stored.state != "partial":
            entry = found.setdefault(stored.kind, {"artifacts": 0, "bytes": 0})
            entry["artifacts"] += 1
            entry["bytes"] += _bytes(stored.path, seen)
    return found


def _bytes(folder: Path, seen: set[tuple[int, int]]) -> int:
    total = 0
    for path in _files(folder):
        with contextlib.suppress(OSError):
            info = path.lstat()
            if stat.S_ISREG(info.st_mode) and (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                total += info.st_size
    return total


def _files(folder: Path) -> Iterator[Path]:
    """Every file and link below a folder; links are not followed, what vanishes meanwhile is passed over."""
    for parent, folders, names in os.walk(folder):
        for name in (*names, *(f for f in folders if os.path.islink(os.path.join(parent, f)))):
            yield Path(parent, name)


# -- check ------------------------------------------------------------------------------------------------------------


def check(root: Path) -> Checked:
    """Hash every file of every artifact and compare it with its manifest."""
    with working(root):
        ours, foreign = scan(root)
        result = Checked(left_alone=[_name(root, path) for path in foreign])
        known: dict[tuple[int, int], str] = {}
        said = time.monotonic()
        for index, stored in enumerate(ours):
            if stored.state not in {"artifact", "unreadable"}:
                continue
            if time.monotonic() - said > 60:
                said = time.monotonic()
                logger.info("checked %d of %d folders, %.1f GB", index, len(ours), result.bytes / 1e9)
            problems = _problems(root, stored, known, result)
            result.artifacts += 1
            if problems:
                path = _name(root, stored.path)
                entry = {"kind": stored.kind, "fingerprint": stored.name, "path": path, "files": problems}
                result.damaged.append(entry)
    return result


def _problems(root: Path, stored: Stored, known: dict[tuple[int, int], str], result: Checked) -> dict[str, str]:
    if stored.state == "unreadable":
        return {MANIFEST: "missing, unreadable, or of another artifact"}
    found: dict[str, str] = {}
    for name, said in stored.manifest["files"].items():
        path = stored.path / name
        try:
            info = path.lstat()
            if not stat.S_ISREG(info.st_mode) or not path.resolve().is_relative_to(stored.path.resolve()):
                found[name] = "not a file of this artifact"
            elif info.st_size != said["bytes"]:
                found[name] = f"{info.st_size} bytes instead of {said['bytes']}"
            else:
                file = (info.st_dev, info.st_ino)  # artifacts share files by hard links
                result.bytes += 0 if file in known else info.st_size
                known[file] = known.get(file) or file_digest(path)
                if known[file] != said["sha256"]:
                    found[name] = "other content than was stored"
        except FileNotFoundError:
            found[name] = "missing"
        except (OSError, LookupError, TypeError) as error:
            found[name] = f"cannot be checked: {error}"
    listed = {stored.path / name for name in (*stored.manifest["files"], MANIFEST)}
    result.left_alone += [_name(root, path) for path in _files(stored.path) if path not in listed]
    return found


# -- prune ------------------------------------------------------------------------------------------------------------


def survey(root: Path, *, older_than: float = DAY, wanted: Wanted = lambda *_: True) -> Pruned:
    """What a removal would take: nothing that a handle names, that is younger than `older_than` seconds, or foreign.

    Args:
        wanted: whether a handle counts. Those that do not are garbage themselves.

    Raises:
        InputError: a handle cannot be read, so that nobody knows what it names.
    """
    ours, foreign = scan(root)
    result, now = Pruned(left_alone=[_name(root, path) for path in foreign]), time.time()
    whole = not (root / "artifacts").is_symlink() and (root / "artifacts").is_dir()
    named: set[tuple[str, str]] = set()
    for path, key, target in _handles(root, result):
        age = now - _mtime(path)
        if path.is_symlink():
            named.add(target)
        elif not wanted(key, path.name.removesuffix(".json")):
            result.removed.append(Garbage(path, "handle of a recipe that is gone", 0))
        elif whole and age > older_than and not os.path.lexists(root.joinpath("artifacts", *target)):
            result.removed.append(Garbage(path, "handle of an artifact that is gone", 0))
        else:
            named.add(target)
    seen: set[tuple[int, int]] = set()
    for stored in ours:
        if (reason := _dead(stored, named)) and now - _made(stored) > older_than:
            result.removed.append(Garbage(stored.path, reason, _bytes(stored.path, seen)))
        elif stored.state == "unreadable":
            result.left_alone.append(_name(root, stored.path))
    return result


def _dead(stored: Stored, named: set[tuple[str, str]]) -> str | None:
    """Why a folder is garbage, but for its age."""
    if stored.state == "artifact":
        return None if (stored.kind, stored.name) in named else "no asset names it"
    if stored.state == "damaged":
        return "set aside as damaged"
    if stored.state == "partial" and not _is_held(stored.path.with_name(f"{stored.name}.lock")):
        return "a build that nobody continues"
    return None


def _is_held(lock: Path) -> bool:
    try:
        handle = take(lock, create=False)
    except FileNotFoundError:
        return False
    if handle is None:
        return True
    handle.close()
    return False


def _made(stored: Stored) -> float:
    """When it was last worked at, seconds since the epoch: the latest of what is known."""
    times = [_mtime(stored.path)]
    if stored.state == "partial":
        times += [_mtime(path) for path in _files(stored.path)]
    elif stored.state == "artifact":
        times.append(_mtime(stored.path / MANIFEST))
        with contextlib.suppress(ValueError, TypeError, KeyError):
            times.append(datetime.fromisoformat(stored.manifest["created"]).timestamp())
    elif digits := re.search(r"\.damaged-(\d+)", stored.name):
        aside = float(digits[1])  # seconds, or nanoseconds
        times.append(aside / 1e9 if aside > 1e15 else aside)
    return max(times)


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _handles(root: Path, result: Pruned) -> Iterator[tuple[Path, tuple[str, ...], tuple[str, str]]]:
    """File, asset path and (kind, fingerprint) of every handle."""
    folder = root / "handles"
    for path in sorted(_files(folder)):
        if _UNFINISHED_HANDLE.fullmatch(path.name):
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            target = (str(said["kind"]), str(said["fingerprint"]))
        except (ValueError, LookupError, TypeError, RecursionError, FileNotFoundError):
            result.left_alone.append(_name(root, path))  # nothing can be recalled through it
            continue
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): what it names is not known") from None
        yield path, path.parent.relative_to(folder).parts, target


def prune(root: Path, *, older_than: float = DAY, wanted: Wanted = lambda *_: True, wait: bool = False) -> Pruned:
    """Remove what `survey` finds while no run is at work; see there.

    Each folder leaves its place in one rename, so that a kill leaves it whole or in `<home>/trash`, which the next
    call empties.

    Raises:
        InputError: runs are at work and `wait` is off; or the trash is a link.
    """
    with alone(root, wait=wait):
        result, trash = survey(root, older_than=older_than, wanted=wanted), root / "trash"
        if trash.is_symlink():
            raise InputError(f"{trash} is a link; remove it first")
        for entry in _entries(trash, []):
            if _TRASH.fullmatch(entry.name):
                _delete(Path(entry.path), result)
        removed = []
        for item in result.removed:  # handles come first: none may name what is gone
            try:
                if item.path.is_dir():
                    trash.mkdir(exist_ok=True)
                    item.path.chmod(stat.S_IMODE(item.path.lstat().st_mode) | stat.S_IRWXU)
                    grave = item.path.rename(trash / uuid.uuid4().hex)
                    note = root / "verified" / item.path.parent.name / f"{item.path.name}.json"
                    note.unlink(missing_ok=True)  # what is known of its files
                    _delete(grave, result)
                else:
                    item.path.unlink()
                removed.append(item)
            except OSError as error:
                result.failed.append(f"{_name(root, item.path)}: {error.strerror}")
        result.removed = removed
        for empty in (trash, *_parents(root, removed)):
            with contextlib.suppress(OSError):
                empty.rmdir()
    return result


def _parents(root: Path, removed: list[Garbage]) -> list[Path]:
    """Folders of removed handles, which may be empty now."""
    return sorted({i.path.parent for i in removed if i.path.is_relative_to(root / "handles")} - {root / "handles"})


def _delete(folder: Path, result: Pruned) -> None:
    """Remove a folder of ours whole, read-only ones too; links in it go, what they mean stays."""
    try:
        for parent, folders, names in os.walk(folder):
            os.chmod(parent, 0o700)
            for name in (*names, *folders):
                path = os.path.join(parent, name)
                if name in names or os.path.islink(path):
                    os.unlink(path)
        for parent, _, _ in os.walk(folder, topdown=False):
            os.rmdir(parent)
    except OSError as error:
        result.failed.append(f"{error.filename}: {error.strerror}")


def _name(root: Path, path: str | Path) -> str:
    return os.path.relpath(path, root)
