"""Dagster's instance of a home, as the command line opens it: whole, without pools, and rid of dead runs."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from dagster._core.events import DagsterEventType
from dagster._core.instance.config import ConcurrencyConfig, PoolConfig, PoolGranularity
from dagster._core.storage.dagster_run import RunRecord

from compression_dags.resources.home import is_alive, run_lock
from compression_dags.waiting import held, holder, take

logger = logging.getLogger("compression_dags")
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]  # queued runs are the daemon's: it starts them whenever it comes back
_PID = re.compile(r"in process \(pid: (\d+)\)")
_STORAGE = ("history", "schedules", "storage")
_GONE = "its process ended before the run did; the same command continues"
#: A run without a process id is taken for dead after this many seconds: it takes moments to get one.
_NAMELESS = 3600.0


@contextlib.contextmanager
def opened(home: Path, partitions: str = "", slug: str = "") -> Iterator[dg.DagsterInstance]:
    """The instance at `DAGSTER_HOME`, with `slug` among its dynamic `partitions` and dead runs marked as failed.

    Its runs claim no slot of a pool: who computes on which device is the lease's affair, and a slot would outlive its
    holder. Of several processes one at a time sets the storage up.
    """
    with contextlib.ExitStack() as stack:
        with held(home / "locks" / "dagster.lock", f"the set-up of {home / 'dagster'}"), _whole(home / "dagster"):
            instance = stack.enter_context(dg.DagsterInstance.get())
            if partitions:
                instance.add_dynamic_partitions(partitions, [slug])
            reap(instance, home)
        instance.get_concurrency_config = functools.partial(_without_slots, instance.get_concurrency_config())
        # Dagster asks SQLite for this some 500 times a run, a fresh connection each; here the answer cannot change
        instance.has_dynamic_partition = functools.cache(instance.has_dynamic_partition)
        yield instance


@contextlib.contextmanager
def closed(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """A run that is left by an exception is marked as failed at once."""
    try:
        yield
    except BaseException as error:
        run = instance.get_run_by_id(run_id)
        if run is not None and run.status in _UNFINISHED:
            instance.report_run_failed(run, f"ended by {type(error).__name__}: {error}")
        raise


def _without_slots(config: ConcurrencyConfig) -> ConcurrencyConfig:
    """The same, with pools that count whole runs in the daemon's queue; the executor then claims nothing."""
    pools = PoolConfig(pool_granularity=PoolGranularity.RUN, default_pool_limit=None, op_granularity_run_buffer=None)
    return ConcurrencyConfig(pool_config=pools, run_queue_config=config.run_queue_config)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """First set-up of the storage: what a killed one left is removed, as it can hold no run yet."""
    marker, storage = folder / ".setting-up", [folder / name for name in _STORAGE]
    if marker.exists() and not _holds_runs(folder):
        for path in storage:
            shutil.rmtree(path, ignore_errors=True)
    if any(path.exists() for path in storage):
        yield
        marker.unlink(missing_ok=True)
        return
    marker.touch()
    yield
    marker.unlink()


def _holds_runs(folder: Path) -> bool:
    """Whether somebody has used a storage that was not set up to the end."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{folder / 'history' / 'runs.db'}?mode=ro", uri=True)
        ) as database:
            return database.execute("select count(*) from runs").fetchone()[0] > 0
    except sqlite3.Error:
        return False


def reap(instance: dg.DagsterInstance, home: Path) -> list[str]:
    """Mark runs whose process is gone as failed and free their slots; returns their ids.

    A run of the daemon is touched only where its own lock proves that its process was killed.
    """
    found = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED)):
        try:
            if _reaped(instance, home, record):
                found.append(record.dagster_run.run_id)
        except Exception as error:  # one run's damaged event log must not keep the others from running
            logger.warning("run %s cannot be looked at: %s", record.dagster_run.run_id[:8], error)
    _sweep(instance, home)
    return found


def _reaped(instance: dg.DagsterInstance, home: Path, record: RunRecord) -> bool:
    run_id = record.dagster_run.run_id
    try:
        lock = take(run_lock(home, run_id), create=False)
    except FileNotFoundError:
        daemons = record.dagster_run.remote_job_origin is not None
        return not daemons and _process_is_gone(instance, record) and _end(instance, run_id)
    if lock is None:
        return False
    with lock:
        owner = holder(Path(lock.name))
        if owner is not None and not owner.is_here:
            return False  # of another machine, whose locks may not show here
        return _end(instance, run_id)


def _end(instance: dg.DagsterInstance, run_id: str) -> bool:
    """False if the run has ended by itself meanwhile."""
    run = instance.get_run_by_id(run_id)
    if run is None or run.status not in _UNFINISHED:
        return False
    if run.status == dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, _GONE)
    else:
        instance.report_run_failed(run, _GONE)
    if instance.event_log_storage.supports_global_concurrency_limits:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    logger.info("run %s is marked as failed: its process ended before it did", run_id[:8])
    return True


def _process_is_gone(instance: dg.DagsterInstance, record: RunRecord) -> bool:
    """Of a run in a process of its own that left no lock: by the process id that it logged, on this machine."""
    run_id = record.dagster_run.run_id
    for entry in instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT):
        said = entry.dagster_event.message if entry.dagster_event else None
        if match := _PID.search(said or ""):
            return not is_alive(int(match[1]), entry.timestamp)
    return time.time() - record.create_timestamp.timestamp() > _NAMELESS


def _sweep(instance: dg.DagsterInstance, home: Path) -> None:
    """Remove the lock files that killed processes left, of runs that have ended."""
    for path in run_lock(home, "x").parent.glob("*.lock"):
        with contextlib.suppress(OSError):
            if lock := take(path, create=False):
                with lock:
                    run = instance.get_run_by_id(path.stem)
                    if run is None or run.status not in _UNFINISHED:
                        path.unlink()
