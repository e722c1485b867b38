"""Runs that are killed, stopped or doubled: the same command then ends well, with the same bytes."""

import os
import signal
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import DagsterEventType
from forked import server_process
from home_runs import CHAIN, TEXT, Run, hang_in_pool, run_pooled

from compression_dags.provenance.artifacts import describe_files
from compression_dags.resources.home import run_lock


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "chain.yaml").write_text(CHAIN)
    (folder / "cat.txt").write_text(TEXT)
    return folder


def start(desk: Path, home: str = "home") -> Run:
    return Run(desk, home, "run", "-m", "stories260k", "-r", "chain", "--tasks", str(desk / "cat.txt"))


def stored(home: Path) -> dict[str, dict]:
    """Kind/fingerprint → files of every artifact, without the tables and reports that name runs."""
    kinds = ("leaderboard", "decision_ledger")
    folders = [p for p in (home / "artifacts").glob("*/*") if p.parent.name not in kinds]
    return {f"{p.parent.name}/{p.name}": describe_files(p) for p in folders}


def runs_of(home: Path) -> list[dg.DagsterRun]:
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        for pool in instance.event_log_storage.get_concurrency_keys():
            assert not instance.event_log_storage.get_concurrency_info(pool).claimed_slots
        return list(reversed(instance.get_runs()))


@pytest.fixture(scope="module")
def reference(desk):
    """The home of a run that nothing stopped."""
    run = start(desk, "reference")
    assert run.ends() == 0, run.said()
    return desk / "reference"


@pytest.mark.slow
def test_two_first_runs_at_once_end_well(desk, reference):
    """Both set up the home, its database and its registry; one builds what the other waits for and uses.

    Each is three runs of Dagster: the baseline, the recipe, the summary.
    """
    pair = [start(desk, "twins") for _ in range(2)]
    assert [run.ends() for run in pair] == [0, 0], [run.said() for run in pair]
    assert [run.status.value for run in runs_of(desk / "twins")] == ["SUCCESS"] * 6
    assert not any(p.is_dir() for p in (desk / "twins" / "partial").glob("*/*"))
    for line in ("eval_cat stories260k|baseline", "quantized_weights stories260k|chain"):
        assert sorted(run.said().split(f" {line} ")[0].split()[-1] for run in pair) == ["computed", "hit"]
    assert stored(desk / "twins") == stored(reference)


@pytest.mark.slow
def test_killed_and_stopped_runs_continue_to_the_same_bytes(desk, reference):
    home = desk / "home"

    def building(kind: str):
        return lambda: any(p.is_dir() for p in (home / "partial" / kind).glob("*"))

    assert start(desk).until(building("evaluation")).signal(signal.SIGKILL).ends() == -signal.SIGKILL
    (killed,) = (home / "locks" / "runs").glob("*.lock")

    stopped = start(desk).until(building("sparse_weights")).signal(signal.SIGINT)
    assert stopped.ends() == 130 and stopped.said().endswith("stopped; the same command continues\n")
    assert f"run {killed.stem[:8]} is marked as failed" in stopped.said() and not killed.exists()

    assert start(desk).until(building("quantized_weights")).signal(signal.SIGKILL).ends() == -signal.SIGKILL
    ended = start(desk).until(building("samples")).signal(signal.SIGTERM)
    assert ended.ends() == 130, ended.said()
    last = start(desk)
    assert last.ends() == 0, last.said()

    # the first was killed in the baseline's run; the second did that, the others ended in the recipe's run at once
    ended_so = [run.status.value for run in runs_of(home)]
    assert ended_so == ["FAILURE", "SUCCESS", *["FAILURE"] * 3, "SUCCESS", "SUCCESS"]
    assert stored(home) == stored(reference)
    assert not list((home / "locks" / "runs").iterdir())


def killed_in_a_pool(tmp_path: Path, old: bool) -> str:
    """Id of a run whose process was killed inside a pooled asset.

    Args:
        old: as before: with a slot in the pool, and no lock left.
    """
    marker = tmp_path / "inside"
    process = server_process(hang_in_pool, tmp_path / "home", marker, old)
    end = time.monotonic() + 300
    while not marker.exists():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with dg.DagsterInstance.from_config(str(tmp_path / "home" / "dagster")) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.STARTED
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == int(old)
    lock = run_lock(tmp_path / "home", run.run_id)
    assert lock.exists()  # also of a run that this project did not start: the store's resource takes it
    if old:
        lock.unlink()
    return run.run_id


@pytest.mark.parametrize("old", [True, False])
def test_a_run_killed_inside_a_pooled_asset_holds_nothing_up(tmp_path, old):
    home = tmp_path / "home"
    dead = killed_in_a_pool(tmp_path, old)
    run_pooled(home)
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        statuses = {run.run_id: run.status.value for run in instance.get_runs()}
        assert statuses.pop(dead) == "FAILURE" and list(statuses.values()) == ["SUCCESS"]
        said = [entry.dagster_event.message for entry in instance.all_logs(dead, of_type=DagsterEventType.RUN_FAILURE)]
        assert len(said) == 1 and "its process ended before the run did" in str(said[0])
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 0
    assert not list((home / "locks" / "runs").iterdir())
