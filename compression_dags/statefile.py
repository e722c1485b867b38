"""Small JSON files that a home keeps between runs: written whole or not at all, read entry by entry.

Callers check a value before they save it. An entry that no longer parses is skipped and said, never fatal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from compression_dags.waiting import held

T = TypeVar("T")
logger = logging.getLogger("compression_dags")


def replace_text(path: Path, text: str) -> None:
    """Put `text` at `path` in one rename, after it is on disk.

    Raises:
        OSError: nothing was changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_entries(path: Path, parse: Callable[[str, Any], T]) -> dict[str, T]:
    """Name → parsed value of every entry of a JSON object.

    An absent file has none. A file that is no JSON object, or an entry for which `parse` raises ValueError, TypeError
    or LookupError, is skipped with one warning.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): it is left out", path, " ".join(str(error).split())[:200])
        return {}
    if not isinstance(raw, dict):
        logger.warning("%s holds no JSON object: it is left out", path)
        return {}
    found: dict[str, T] = {}
    for name, value in raw.items():
        try:
            found[name] = parse(name, value)
        except (ValueError, TypeError, LookupError) as error:
            logger.warning("%s: entry %r is left out: %s", path, name, " ".join(str(error).split())[:200])
    return found


def write_entries(path: Path, entries: Mapping[str, Any]) -> None:
    """Replace the file by `entries`; an unreadable one that stood there is kept beside it as `<name>.damaged`."""
    try:
        readable = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except FileNotFoundError:
        readable = True
    except (OSError, ValueError, RecursionError):
        readable = False
    if not readable:
        with contextlib.suppress(OSError):
            path.replace(path.with_name(f"{path.name}.damaged"))
    replace_json(path, dict(sorted(entries.items())))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time between reading and writing `path`; the kernel frees the lock when its holder dies."""
    with held(path.with_name(f".{path.name}.lock"), f"writing {path}"):
        yield
