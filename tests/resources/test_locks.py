"""Locks and dead runs: waiting is said and stops at once, and nothing of a killed process holds the next one up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from home_runs import pooled, run_pooled

from compression_dags.cli.session import reap_runs
from compression_dags.errors import InputError
from compression_dags.paths import PROJECT
from compression_dags.resources.home import alone, is_alive, prepare_instance, run_lock, running, runs_at_work, working
from compression_dags.statefile import locked
from compression_dags.waiting import Holder, held, take

RUN = "01234567-89ab-cdef-0123-456789abcdef"
WAITS = """
import logging, signal, sys
from pathlib import Path
from compression_dags.waiting import held
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
logging.basicConfig(format="%(message)s")
with held(Path(sys.argv[1]), "the cake"):
    print("mine", flush=True)
"""


def waiter(path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WAITS, str(path)], stderr=subprocess.PIPE, text=True, cwd=PROJECT)


def test_waiting_says_for_what_and_whose_and_ctrl_c_ends_it(tmp_path):
    with held(tmp_path / "lock", "the cake"):
        process = waiter(tmp_path / "lock")
        said = process.stderr.readline()
        assert said.startswith(f"waiting for the cake, held by process {os.getpid()} since 2")
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]


def test_a_lock_file_removed_by_its_holder_is_no_lock(tmp_path):
    """Who waited on the removed file takes the new one, so that two never hold one name."""
    path, got, done = tmp_path / "lock", threading.Event(), threading.Event()

    def second():
        with held(path, "it"):
            got.set()
            done.wait(30)

    with held(path, "it"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        path.unlink()
    assert got.wait(30) and take(path) is None
    done.set()
    thread.join()
    with pytest.raises(FileNotFoundError):
        take(tmp_path / "none", create=False)


def test_small_state_files_wait_for_each_other(tmp_path):
    with locked(tmp_path / "state.json"):
        assert take(tmp_path / ".state.json.lock") is None


def test_upkeep_is_alone_or_says_who_works(tmp_path):
    with working(tmp_path), working(tmp_path), running(tmp_path, RUN):
        says = rf"in use by run 01234567 \(process {os.getpid()} since"
        with pytest.raises(InputError, match=says), alone(tmp_path, wait=False):
            pass
        with running(tmp_path, RUN):  # the same run, further in
            pass
        assert len(runs_at_work(tmp_path)) == 1
    assert not run_lock(tmp_path, RUN).exists() and runs_at_work(tmp_path) == []
    with alone(tmp_path, wait=False):
        assert take(tmp_path / "locks" / "home.lock", shared=True) is None


def test_upkeep_that_waits_begins_when_the_run_has_ended(tmp_path):
    run, began = working(tmp_path), threading.Event()

    def upkeep():
        with alone(tmp_path, wait=True):
            began.set()

    thread = threading.Thread(target=upkeep)
    with run:
        thread.start()
        assert not began.wait(0.5)
    assert began.wait(30)
    thread.join()


def test_a_process_is_known_by_its_start(tmp_path):
    assert is_alive(os.getpid(), time.time()) and not is_alive(os.getpid(), 1000.0)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not is_alive(child.pid, time.time())


# -- runs -------------------------------------------------------------------------------------------------------------


def test_only_provably_dead_runs_are_reaped(tmp_path, monkeypatch):
    """A run at work stays, one that another machine holds, and one of the daemon that no lock proves dead."""
    home = tmp_path / "home"
    monkeypatch.setenv("DAGSTER_HOME", str(prepare_instance(home)))
    at_work, elsewhere, launched, queued, crashed, fresh = (RUN[:-1] + end for end in "012345")
    place = GrpcServerCodeLocationOrigin(host="localhost", port=1, location_name="compression_dags")
    origin = RemoteJobOrigin(RemoteRepositoryOrigin(place, "__repository__"), "job")
    with dg.DagsterInstance.get() as instance:
        job = pooled(home).resolve_implicit_global_asset_job_def()
        for run_id in (at_work, elsewhere, launched, queued, crashed, fresh):
            daemons = origin if run_id in {launched, queued, crashed} else None
            instance.create_run_for_job(job, run_id=run_id, remote_job_origin=daemons)
            if run_id != fresh:
                event = "PIPELINE_ENQUEUED" if run_id == queued else "PIPELINE_START"
                instance.report_dagster_event(dg.DagsterEvent(event, job.name), run_id)
        there = Holder(1, "elsewhere", "x", "2026-01-01T00:00:00")
        for run_id, owner in ((elsewhere, there), (crashed, Holder.me())):
            run_lock(home, run_id).parent.mkdir(parents=True, exist_ok=True)
            run_lock(home, run_id).write_text(json.dumps(asdict(owner)))
        with running(home, at_work):
            reap_runs(home)
        left = {run.run_id: run.status.value for run in instance.get_runs()}
    assert left.pop(crashed) == "FAILURE" and left.pop(queued) == "QUEUED" and left.pop(fresh) == "NOT_STARTED"
    assert left == dict.fromkeys((at_work, elsewhere, launched), "STARTED")
    assert not run_lock(home, crashed).exists() and run_lock(home, elsewhere).exists()


def test_a_storage_whose_set_up_was_killed_is_set_up_again(tmp_path):
    home = tmp_path / "home"
    folder = home / "dagster"
    (folder / "history").mkdir(parents=True)
    (folder / ".setting-up").touch()
    (folder / "history" / "runs.db").write_bytes(b"SQLite format 3\0 and no more")
    (folder / "dagster.yaml").write_text((PROJECT / "dagster.yaml").read_text()[:60])
    (folder / "dagster.yaml.tmp").write_text("half")
    run_pooled(home)
    assert (folder / "dagster.yaml").read_text() == (PROJECT / "dagster.yaml").read_text()
    assert not (folder / ".setting-up").exists()


def test_the_user_s_own_dagster_yaml_stays_and_its_limits_hold_no_run_up(tmp_path):
    home = tmp_path / "home"
    own = "telemetry: {enabled: false}\nconcurrency: {default_op_concurrency_limit: 0}\n"
    (home / "dagster").mkdir(parents=True)
    (home / "dagster" / "dagster.yaml").write_text(own)
    run_pooled(home)
    assert (home / "dagster" / "dagster.yaml").read_text() == own
