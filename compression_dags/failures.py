"""How a failure is told: its exit code and one line with the cause, the file where there is one, and the remedy.

Exit codes: 2, something given cannot be used (a full or unreadable disk is the user's to mend); 1, work failed; 130,
interrupted.
"""

from __future__ import annotations

import errno
import json
import lzma
import os
import re
import sqlite3
import sys
import traceback
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

from compression_dags.errors import InputError, IntegrityError

DEBUG = "COMPRESSION_DAGS_DEBUG"
STOPPED = "stopped; the same command continues"
_FULL = {errno.ENOSPC, errno.EDQUOT}
#: How the libraries in use say ENOSPC and EDQUOT, with or without the number.
_FULL_TEXT = re.compile(
    r"no space left on device|disk quota exceeded|os error (28|122)\b|database or disk is full", re.IGNORECASE
)
_INTERRUPTED = {"KeyboardInterrupt", "DagsterExecutionInterruptedError"}
_OUT_OF_MEMORY = {"MemoryError", "OutOfMemoryError", "ArrowMemoryError"}
_OURS = {"InputError", "IntegrityError", "WorkFailed", "Failure"}
_HINT = f"(--debug or {DEBUG}=1 shows where)"


class WorkFailed(RuntimeError):
    """A run started and did not finish."""


@dataclass(frozen=True)
class Failure:
    """What the command line says and returns: `line` on standard error, without its `error: ` or `failed: `."""

    exit_code: int
    line: str

    def spoken(self) -> str:
        """The line as it is printed."""
        return self.line if self.exit_code == 130 else f"{'error' if self.exit_code == 2 else 'failed'}: {self.line}"


def debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


def explain(error: BaseException) -> Failure:
    """The failure that an exception is."""
    if type(error).__name__ in _INTERRUPTED:
        return Failure(130, STOPPED)
    if isinstance(error, InputError):
        return Failure(2, _one_line(str(error)))
    if isinstance(error, (WorkFailed, IntegrityError)):
        return Failure(1, _one_line(str(error)))
    if is_full(error):
        return Failure(2, full_disk(_file_of(error)))
    if isinstance(error, MemoryError) or type(error).__name__ in _OUT_OF_MEMORY:
        return Failure(1, f"out of memory: {_one_line(str(error)) or 'the host has none left'} {_HINT}")
    if isinstance(error, RecursionError):
        return Failure(2, f"something given is nested too deeply to be read {_HINT}")
    if isinstance(error, sqlite3.Error):
        return Failure(1, f"Dagster's database in {_home()}: {_one_line(str(error))} {_HINT}")
    if isinstance(error, OSError):
        return Failure(2, _os_error(error))
    said = f"{type(error).__name__}: {_one_line(str(error))}"
    if isinstance(error, (UnicodeError, json.JSONDecodeError, lzma.LZMAError, zipfile.BadZipFile, EOFError)):
        return Failure(2, f"a file cannot be read: {said} {_HINT}")
    return Failure(1, f"{said} {_HINT}")


def explain_step(step: str, chain: Sequence[tuple[str, str]], run_id: str) -> BaseException:
    """The exception that stands for one raised inside an asset, of which only names and texts are left.

    Args:
        chain: class and text of the exception and of what caused it, outermost first; texts may have the class in front
            and a stack behind.
    """
    named = [(kind, _one_line(message.split("\n\nStack")[0])) for kind, message in chain] or [("", "unknown failure")]
    if any(kind in _INTERRUPTED for kind, _ in named):
        return KeyboardInterrupt()
    if any(_FULL_TEXT.search(text) for kind, text in named if kind not in _OURS):
        return InputError(full_disk(None))
    kind, text = next((pair for pair in named if pair[0] in _OURS), named[-1])
    text = text.removeprefix(f"compression_dags.errors.{kind}: ").removeprefix(f"{kind}: ")
    if kind == "InputError":
        return InputError(text)
    if kind in _OUT_OF_MEMORY:
        text = f"out of memory: {text or 'the host has none left'}"
    elif kind and kind not in _OURS:
        text = f"{kind}: {text}"
    return WorkFailed(f"{step}: {text}  (run {run_id})")


def is_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that a disk or quota is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if not isinstance(error, (InputError, WorkFailed, IntegrityError)) and _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(place: str | None) -> str:
    home = _home()
    where = f"the disk of {place} is full" if place and not place.startswith(home) else f"home {home} is full"
    return f"{where}; nothing stored is lost: free space (`compression-dags store --prune`) and give the command again"


def show_traceback(error: BaseException) -> None:
    """Print the whole story on standard error, if `--debug` asked for it."""
    if debugging():
        traceback.print_exception(error, file=sys.stderr)


def _os_error(error: OSError) -> str:
    reason = error.strerror or _one_line(str(error)) or type(error).__name__
    names = [str(n) for n in (error.filename, error.filename2) if n is not None]
    return f"{' → '.join(names)}: {reason}" if names else f"{reason} {_HINT}"


def _file_of(error: BaseException) -> str | None:
    return str(error.filename) if isinstance(error, OSError) and error.filename is not None else None


def _home() -> str:
    return os.environ.get("COMPRESSION_DAGS_HOME") or ".compression_dags"


def _one_line(text: str) -> str:
    return " ".join(text.split())
