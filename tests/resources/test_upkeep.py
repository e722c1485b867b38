"""Upkeep: sizes, check and prune count, find and remove this project's own things and nothing else."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import Request
from compression_dags.resources import upkeep
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.home import working
from compression_dags.waiting import held

REQUEST = Request("toy", "1", {"a": 1}, {"base": "x"}, {"device": "cpu", "dtype": "float32"})


def writes(text):
    def build(work):
        (work.out / "sub").mkdir()
        (work.out / "sub" / "data.txt").write_text(text)
        return {}

    return build


def stored(home: Path, version: str, *, named: bool = False, days: float = 2) -> Path:
    """An artifact that was made `days` ago."""
    store = ArtifactStore(home=str(home))
    artifact = store.produce(replace(REQUEST, version=version), writes(version)).artifact
    if named:
        store.remember(dg.AssetKey(["family", f"thing_{version}"]), "m", artifact)
    manifest = artifact.path / "manifest.json"
    manifest.chmod(0o644)
    then = time.time() - days * upkeep.DAY
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(then))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"created": made}))
    aged(artifact.path, days)
    return artifact.path


def aged(path: Path, days: float = 2) -> Path:
    then = time.time() - days * upkeep.DAY
    for each in (*path.rglob("*"), path):
        os.utime(each, (then, then), follow_symlinks=False)
    return path


def removable(home: Path, **options) -> dict[str, str]:
    return {str(item.path.relative_to(home)): item.reason for item in upkeep.survey(home, **options).removed}


def test_prune_takes_old_things_that_nothing_names(tmp_path):
    named, fresh = stored(tmp_path, "1", named=True), stored(tmp_path, "2", days=0.5)
    garbage, damaged = stored(tmp_path, "3"), stored(tmp_path, "4")
    damaged = damaged.rename(damaged.with_name(f"{damaged.name}.damaged-{time.time_ns() - int(2e14)}"))
    killed, building = (aged_partial(tmp_path, digit) for digit in "ab")
    young = tmp_path / "partial" / "toy" / ("c" * 64)
    young.mkdir()
    with held(building.with_name(f"{building.name}.lock"), "a build of an older version"):
        found = upkeep.prune(tmp_path)
    assert {item.path: item.reason for item in found.removed} == {
        garbage: "no asset names it",
        damaged: "set aside as damaged",
        killed: "a build that nobody continues",
    }
    assert found.left_alone == found.failed == [] and found.bytes > 0
    assert not any(path.exists() for path in (garbage, damaged, killed, tmp_path / "trash"))
    assert all(path.exists() for path in (named, fresh, building, young))
    assert list(removable(tmp_path)) == [str(building.relative_to(tmp_path))]
    assert [item.path for item in upkeep.survey(tmp_path, older_than=0).removed] == [fresh, building, young]


def aged_partial(home: Path, digit: str) -> Path:
    work = home / "partial" / "toy" / (digit * 64)
    (work / "scratch").mkdir(parents=True)
    (work / "scratch" / "state").write_text("x")
    return aged(work)


def test_what_is_not_ours_is_left_alone_and_said(tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    garbage, other = stored(home, "1"), stored(elsewhere, "2")
    kind = home / "artifacts" / "toy"
    (kind / ".DS_Store").write_text("x")
    (home / "artifacts" / ".DS_Store").write_text("x")
    (kind / "my notes").mkdir()
    (kind / ("d" * 64)).mkdir()
    (kind / ("e" * 64)).symlink_to(other)
    (home / "artifacts" / "linked").symlink_to(other.parent)
    (kind / ("f" * 64)).symlink_to(tmp_path / "nowhere")
    (garbage / "link").symlink_to(other)
    (garbage / "dangling").symlink_to(tmp_path / "nowhere")
    aged(home, 9)
    assert upkeep.sizes(home)["toy"]["artifacts"] == 2
    found = upkeep.prune(home)
    assert [item.path for item in found.removed] == [garbage]
    names = {".DS_Store", "linked", *(f"toy/{n}" for n in (".DS_Store", "my notes", "d" * 64, "e" * 64, "f" * 64))}
    assert set(found.left_alone) == {f"artifacts/{name}" for name in names}
    assert (other / "sub" / "data.txt").read_text() == "2" and (kind / ("e" * 64)).is_symlink()


def test_a_linked_artifacts_folder_is_not_entered(tmp_path):
    real = stored(tmp_path / "disk", "1", named=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "artifacts").symlink_to(tmp_path / "disk" / "artifacts")
    (tmp_path / "disk" / "handles").rename(home / "handles")
    found = upkeep.prune(home, older_than=0)
    assert found.removed == [] and found.left_alone == ["artifacts"] and real.exists()
    assert upkeep.sizes(home) == {} and upkeep.sizes(tmp_path / "none") == {}


def test_read_only_files_and_folders_can_be_removed(tmp_path):
    garbage = stored(tmp_path, "1")
    for path in (garbage / "sub" / "data.txt", garbage / "manifest.json", garbage / "sub", garbage):
        path.chmod(0o444 if path.is_file() else 0o555)
    assert [item.path for item in upkeep.prune(tmp_path).removed] == [garbage]
    assert not garbage.exists() and not (tmp_path / "trash").exists()


def test_handles_of_what_is_gone_go_and_damaged_ones_stay(tmp_path):
    path = stored(tmp_path, "1", named=True)
    (handle,) = (tmp_path / "handles").rglob("*.json")
    (handle.parent / "m2.json").write_text("{")
    (handle.parent / "m.1234").write_text("{")
    upkeep._delete(path, upkeep.Pruned())
    assert removable(tmp_path) == {}
    aged(tmp_path / "handles")
    assert removable(tmp_path) == {"handles/family/thing_1/m.json": "handle of an artifact that is gone"}
    assert upkeep.prune(tmp_path).left_alone == ["handles/family/thing_1/m2.json"] and not handle.exists()


def test_handles_of_unwanted_assets_go_with_their_artifacts(tmp_path):
    kept, gone = stored(tmp_path, "1", named=True), stored(tmp_path, "2", named=True)
    assert removable(tmp_path) == {}
    removed = upkeep.prune(tmp_path, wanted=lambda key: key == ("family", "thing_1")).removed
    assert [item.reason for item in removed] == ["handle of a recipe that is gone", "no asset names it"]
    assert kept.exists() and not gone.exists() and not (tmp_path / "handles" / "family" / "thing_2").exists()


def test_nothing_goes_while_a_run_works_and_a_run_waits_for_the_end(tmp_path, monkeypatch):
    """A run that starts between the listing and the removal begins after it, and what it makes is not touched."""
    garbage, began, deleting, made = stored(tmp_path, "1"), threading.Event(), threading.Event(), []
    with working(tmp_path), pytest.raises(InputError, match="is in use by"):
        upkeep.prune(tmp_path)
    assert garbage.exists()
    real = upkeep._delete

    def slow(*arguments):
        deleting.set()
        assert not began.wait(0.5)
        real(*arguments)

    def run():
        with working(tmp_path):
            began.set()
            made.append(ArtifactStore(home=str(tmp_path)).produce(replace(REQUEST, version="1"), writes("1")))

    monkeypatch.setattr(upkeep, "_delete", slow)
    thread = threading.Thread(target=lambda: deleting.wait(30) and run())
    thread.start()
    upkeep.prune(tmp_path)
    thread.join()
    assert not made[0].hit and made[0].artifact.path.exists()


def test_a_removal_that_was_killed_is_finished_by_the_next(tmp_path, monkeypatch):
    garbage = stored(tmp_path, "1")
    monkeypatch.setattr(upkeep, "_delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        upkeep.prune(tmp_path)
    monkeypatch.undo()
    (tmp_path / "trash" / "mine.txt").write_text("x")
    assert not garbage.exists() and len(list((tmp_path / "trash").iterdir())) == 2
    assert upkeep.prune(tmp_path).removed == []
    assert [p.name for p in (tmp_path / "trash").iterdir()] == ["mine.txt"]


def test_check_finds_every_kind_of_damage(tmp_path):
    paths = {v: stored(tmp_path, v, named=True) for v in ("whole", "flipped", "cut", "missing", "linked", "headless")}
    for name, path in paths.items():
        data = path / "sub" / "data.txt"
        data.chmod(0o644)
        match name:
            case "flipped":
                data.write_text("flopped")
            case "cut":
                data.write_text("c")
            case "missing":
                data.unlink()
            case "linked":
                data.unlink()
                data.symlink_to("/etc/hostname")
            case "headless":
                (path / "manifest.json").unlink()
    (paths["whole"] / ".DS_Store").write_text("x")
    found = upkeep.check(tmp_path)
    said = {entry["fingerprint"]: entry["files"] for entry in found.damaged}
    assert said.pop(paths["headless"].name) == {"manifest.json": "missing, unreadable, or of another artifact"}
    assert said == {
        paths["flipped"].name: {"sub/data.txt": "other content than was stored"},
        paths["cut"].name: {"sub/data.txt": "1 bytes instead of 3"},
        paths["missing"].name: {"sub/data.txt": "missing"},
        paths["linked"].name: {"sub/data.txt": "not a file of this artifact"},
    }
    assert found.artifacts == 6
    assert found.left_alone == [str((paths["whole"] / ".DS_Store").relative_to(tmp_path))]
