"""The store: whole artifacts or none, one winner, resume after kill, damage set aside, nothing stored is harmed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import Request
from compression_dags.resources.artifact_store import ArtifactStore

REQUEST = Request("toy", "1", {"a": 1}, {"base": "x"}, {"device": "cpu", "dtype": "float32"})


def writes(text, count=None):
    def build(work):
        if count is not None:
            count.append(1)
        (work.out / "sub").mkdir()
        (work.out / "sub" / "data.txt").write_text(text)
        return {"length": len(text)}

    return build


def test_miss_then_hit(tmp_path):
    store, built = ArtifactStore(home=str(tmp_path)), []
    first = store.produce(REQUEST, writes("hello", built), run_id="run-1")
    again = store.produce(REQUEST, writes("other", built), run_id="run-2")
    assert (first.hit, again.hit, len(built)) == (False, True, 1)
    assert again.artifact == first.artifact and again.artifact.run_id == "run-1"
    assert again.artifact.metadata == {"length": 5} and (again.artifact.path / "sub/data.txt").read_text() == "hello"
    assert not list((tmp_path / "partial").rglob("data.txt"))


@pytest.mark.parametrize(
    "change", [{"version": "2"}, {"config": {"a": 2}}, {"inputs": {"base": "y"}}, {"numeric": {"device": "cuda"}}]
)
def test_everything_that_determines_the_result_is_in_the_fingerprint(change):
    from dataclasses import replace

    assert replace(REQUEST, **change).fingerprint != REQUEST.fingerprint


def test_equal_bytes_equal_digest(tmp_path):
    from dataclasses import replace

    store = ArtifactStore(home=str(tmp_path))
    a = store.produce(REQUEST, writes("same")).artifact
    b = store.produce(replace(REQUEST, version="2"), writes("same")).artifact
    c = store.produce(replace(REQUEST, version="3"), writes("else")).artifact
    assert a.fingerprint != b.fingerprint and a.digest == b.digest != c.digest


def test_failed_build_publishes_nothing(tmp_path):
    store = ArtifactStore(home=str(tmp_path))

    def fails(work):
        (work.out / "half.txt").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.produce(REQUEST, fails)
    assert store.find("toy", REQUEST.fingerprint) is None and not (tmp_path / "artifacts").exists()
    assert not store.produce(REQUEST, writes("fine")).hit


def test_damaged_artifact_is_set_aside_and_made_again(tmp_path):
    store = ArtifactStore(home=str(tmp_path))
    path = store.produce(REQUEST, writes("hello")).artifact.path
    (path / "sub/data.txt").write_text("truncat")
    assert not store.produce(REQUEST, writes("hello")).hit
    assert len(list(path.parent.glob("*.damaged-*"))) == 1


def _race(home, queue):
    def slow(work):
        time.sleep(0.5)
        (work.out / "by.txt").write_text("one")
        return {"pid": os.getpid()}

    produced = ArtifactStore(home=home).produce(REQUEST, slow)
    queue.put((produced.hit, produced.artifact.metadata["pid"]))


def test_two_writers_one_result(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), queue)) for _ in range(2)]
    for racer in racers:
        racer.start()
    results = [queue.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(hit for hit, _ in results) == [False, True]
    assert len({pid for _, pid in results}) == 1


KILLED = """
import sys, time
from pathlib import Path
from compression_dags.provenance.artifacts import Request
from compression_dags.resources.artifact_store import ArtifactStore
def build(work):
    work.scratch.mkdir(parents=True, exist_ok=True)
    done = work.scratch / "done"
    start = int(done.read_text()) if done.exists() else 0
    (work.out / "log").write_text(f"from {start}")
    for step in range(start, 4):
        done.write_text(str(step))
        if step == 2 and start == 0:
            print("ready", flush=True)
            time.sleep(60)
    return {"start": start}
made = ArtifactStore(home=sys.argv[1]).produce(Request("toy", "1", {}, {}), build)
print(made.artifact.metadata["start"])
"""


def test_kill_9_leaves_nothing_visible_and_the_next_run_resumes(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "artifacts").exists()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout.strip() == "2"
    assert not any(p.is_dir() for p in (tmp_path / "partial" / "toy").iterdir())


def test_unwritable_and_full_home(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="not writable"):
        ArtifactStore(home=str(blocked / "home")).ensure_writable()
    with pytest.raises(InputError, match="needs about"):
        ArtifactStore(home=str(tmp_path)).ensure_writable(need_bytes=10**18)


def test_full_disk_during_a_build(tmp_path):
    store = ArtifactStore(home=str(tmp_path))
    kept = store.produce(REQUEST, writes("kept")).artifact

    def full(work):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="is full"):
        store.produce(Request("toy", "9", {}, {}), full)
    assert store.find("toy", kept.fingerprint) == kept


def test_manifest_says_what_made_it(tmp_path):
    path = ArtifactStore(home=str(tmp_path)).produce(REQUEST, writes("x"), run_id="r").artifact.path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["request"]["config"] == {"a": 1} and manifest["run_id"] == "r"
    assert manifest["files"]["sub/data.txt"]["bytes"] == 1 and manifest["environment"]["torch"]
