"""File locks that the kernel frees when their holder dies. Who waits for one says for what, and can be interrupted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

logger = logging.getLogger("compression_dags")
_POLL, _FIRST, _THEN = 0.2, 1.0, 60.0  # seconds


@dataclass(frozen=True)
class Holder:
    """Who took a lock, as written into its file.

    Attributes:
        pid: process id, on its machine.
        host, boot: name of the machine, and of its running kernel where that has one.
        since: local time, ISO 8601.
    """

    pid: int
    host: str
    boot: str
    since: str

    @classmethod
    def me(cls) -> Holder:
        return cls(os.getpid(), platform.node(), _boot(), time.strftime("%Y-%m-%dT%H:%M:%S"))

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine: only here does a free lock prove that it is gone."""
        mine = Holder.me()
        return self.host == mine.host or bool(self.boot and self.boot == mine.boot)

    def __str__(self) -> str:
        return f"process {self.pid}{'' if self.is_here else f' on {self.host}'} since {self.since.replace('T', ' ')}"


@contextlib.contextmanager
def held(
    path: Path,
    what: str,
    *,
    shared: bool = False,
    sign: bool = False,
    who: Callable[[], str] | None = None,
) -> Iterator[IO[str]]:
    """Hold the lock file `path`, after waiting for it if need be.

    Args:
        what: what is waited for, in words: "waiting for <what>" is said after a second, then once a minute.
        shared: with others that share it; else alone.
        sign: write this process into the file; who holds it alone always does.
        who: says who holds it; by default what the last lone holder wrote into the file.
    """
    handle = take(path, shared=shared, sign=sign) or _wait(path, what, shared, sign, who or (lambda: _spoken(path)))
    try:
        yield handle
    finally:
        handle.close()


def take(path: Path, *, shared: bool = False, sign: bool = False, create: bool = True) -> IO[str] | None:
    """The lock file, open and locked, or None while somebody else holds it. Closing it gives the lock back.

    Raises:
        FileNotFoundError: there is no such file, and `create` is off.
    """
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = path.open("a+" if create else "r+", encoding="utf-8")
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        except BaseException:
            handle.close()
            raise
        if _is_there(handle, path):  # else its last holder removed it before it let go: this is a lock on nothing
            if create and (sign or not shared):
                _sign(handle)
            return handle
        handle.close()


def holder(path: Path) -> Holder | None:
    """Who last took a lock alone; None where the file does not say."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _wait(path: Path, what: str, shared: bool, sign: bool, who: Callable[[], str]) -> IO[str]:
    start, due = time.monotonic(), _FIRST
    while True:
        time.sleep(_POLL)
        if handle := take(path, shared=shared, sign=sign):
            return handle
        waited = time.monotonic() - start
        if waited >= due:
            names = who()
            held_by = f", held by {names}" if names else ""
            lasting = f" ({waited / 60:.0f} min)" if due > _FIRST else ""
            logger.warning("waiting for %s%s%s", what, held_by, lasting)
            due = waited + _THEN


def _spoken(path: Path) -> str:
    return str(holder(path) or "")


def _is_there(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: IO[str]) -> None:
    handle.seek(0)
    handle.truncate()
    handle.write(json.dumps(asdict(Holder.me())))
    handle.flush()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
