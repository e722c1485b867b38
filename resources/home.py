"""A home: its Dagster folder, a lock that runs share and upkeep takes alone, one lock a run that says it is alive."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from compression_dags.errors import InputError
from compression_dags.paths import PROJECT
from compression_dags.statefile import replace_text
from compression_dags.waiting import held, holder, take

_RUN_ID = re.compile(r"[0-9a-f-]{36}")
_HELD: set[str] = set()
_PATIENCE = 1.0  # seconds in which a run that is just ending may let go
#: Where the template of `dagster.yaml` finds its database, if it has one.
POSTGRES_URL = "DAGSTER_POSTGRES_URL"


def prepare_instance(home: Path) -> Path:
    """The Dagster home below `home`, with the template of `dagster.yaml` (telemetry and pop-ups off).

    A URL of a Postgres database gets the driver that dagster-postgres is written for: SQLAlchemy 2.1 takes another.
    """
    file, template = home / "dagster" / "dagster.yaml", (PROJECT / "dagster.yaml").read_text(encoding="utf-8")
    held = file.read_text(encoding="utf-8") if file.is_file() else ""
    if held != template and template.startswith(held):  # none yet, or a copy that was cut off
        replace_text(file, template)
    if url := os.environ.get(POSTGRES_URL):
        os.environ[POSTGRES_URL] = re.sub("^postgres(ql)?://", "postgresql+psycopg2://", url)
    return file.parent


def working(home: Path) -> contextlib.AbstractContextManager[object]:
    """Share the home with other runs: nothing is pruned meanwhile."""
    return held(home / "locks" / "home.lock", f"the upkeep of {home}", shared=True)


@contextlib.contextmanager
def alone(home: Path, *, wait: bool) -> Iterator[None]:
    """Keep runs out of the home: they wait until this ends.

    Args:
        wait: for the runs at work; else they are a refusal.

    Raises:
        InputError: runs are at work, named.
    """
    path = home / "locks" / "home.lock"
    if wait:
        with held(path, f"runs in {home}", who=lambda: ", ".join(runs_at_work(home))):
            yield
        return
    deadline = time.monotonic() + _PATIENCE
    while (lock := take(path)) is None:
        if time.monotonic() > deadline:
            names = ", ".join(runs_at_work(home)) or "another process"
            raise InputError(f"{home} is in use by {names}; try again when it has ended, or add --wait")
        time.sleep(0.1)
    with lock:
        yield


@contextlib.contextmanager
def running(home: Path, run_id: str | None) -> Iterator[None]:
    """Hold the lock of a run until it has ended in order.

    The file is gone after an orderly end. So one that is there and free was left by a process that was killed.
    Processes of one run share it; within one process the outermost call holds it.
    """
    if not run_id or not _RUN_ID.fullmatch(run_id) or run_id in _HELD:
        yield
        return
    with held(run_lock(home, run_id), f"run {run_id}", shared=True, sign=True) as lock:
        _HELD.add(run_id)
        try:
            yield
        finally:
            _HELD.discard(run_id)
            Path(lock.name).unlink(missing_ok=True)


def run_lock(home: Path, run_id: str) -> Path:
    return home / "locks" / "runs" / f"{run_id}.lock"


def runs_at_work(home: Path) -> list[str]:
    """Every run whose lock is held, in words."""
    found = []
    for path in sorted(run_lock(home, "x").parent.glob("*.lock")):
        try:
            lock = take(path, create=False)
        except OSError:
            continue
        if lock is None:
            found.append(f"run {path.stem[:8]} ({holder(path) or 'process unknown'})")
        else:
            lock.close()
    return found


def is_alive(pid: int, since: float) -> bool:
    """Whether this machine has a process `pid` that started before `since` (seconds since the epoch).

    A younger one has only inherited the number. Where its start cannot be known it counts as alive.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (OSError, ValueError, IndexError, StopIteration):
        return True
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK") <= since + 2.0
