"""Upkeep: sizes, check and prune count, find and remove this project's own things and nothing else."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from compression_dags.cli.store import prune_store
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
        store.remember(f"thing_{version}", "m|r", artifact)
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
    (handle.parent / "m2|r.json").write_text("{")
    (handle.parent / "m|r.1234").write_text("{")
    upkeep._delete(path, upkeep.Pruned())
    assert removable(tmp_path) == {}
    aged(tmp_path / "handles")
    assert removable(tmp_path) == {"handles/thing_1/m|r.json": "handle of an artifact that is gone"}
    assert upkeep.prune(tmp_path).left_alone == ["handles/thing_1/m2|r.json"] and not handle.exists()


def test_handles_of_unwanted_assets_go_with_their_artifacts(tmp_path):
    kept, gone = stored(tmp_path, "1", named=True), stored(tmp_path, "2", named=True)
    assert removable(tmp_path) == {}
    removed = upkeep.prune(tmp_path, wanted=lambda key, partition: (key, partition) == (("thing_1",), "m|r")).removed
    assert [item.reason for item in removed] == ["handle of a recipe that is gone", "no asset names it"]
    assert kept.exists() and not gone.exists() and not (tmp_path / "handles" / "thing_2").exists()


def old_handle(home: Path, family: str, asset: str, model: str, artifact: Path) -> Path:
    """A handle as a home of before the grid has it: a recipe, or a calibration set, comes first."""
    path = home / "handles" / family / asset / f"{model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": artifact.parent.name, "fingerprint": artifact.name}))
    return path


OWN = "name: cut-it\ncalibration: {sequences: 8, length: 64}\nstages: [merge: {method: shortgpt, ratio: 0.2}]\n"


def test_handles_of_both_forms_keep_their_artifacts_while_their_recipe_is_there(tmp_path, monkeypatch):
    home, folder = tmp_path / "home", tmp_path / "recipes"
    folder.mkdir()
    (folder / "cut-it.yaml").write_text(OWN)
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(folder))
    store = ArtifactStore(home=str(home))
    present, gone = {}, {}
    for name, partition, kept in (
        ("merge_plan", "m|cut-it", True),
        ("merge_plan", "m|cut-it@4x64", True),
        ("merge_plan", "m|baseline", True),
        ("recipe", "cut-it", True),
        ("leaderboard", "m", True),
        ("alternatives.calibration_tokens", "m|c4_sample_4x64-12ab", True),
        ("merge_plan", "cut-it|lost", False),
        ("recipe", "lost", False),
    ):
        path = stored(home, f"{name} {partition}")
        store.remember(name, partition, store.manifest_of("toy", path.name))
        (present if kept else gone)[f"{name} {partition}"] = path
    for family, kept in (
        ("cut_it", True), ("baseline", True), ("c4_sample_8x64", True), ("c4_sample_4x64", True), ("lost", False),
        ("c4_sample_9x64", False),
    ):  # fmt: skip
        path = stored(home, f"old {family}")
        old_handle(home, family, "alternatives" if family == "c4_sample_4x64" else "thing", "m", path)
        (present if kept else gone)[f"old {family}"] = path
    assert prune_store(home, delete=False, days=1, recipes_gone=False, wait=False).removed == []
    prune_store(home, delete=True, days=1, recipes_gone=True, wait=False)
    assert [name for name, path in present.items() if not path.exists()] == []
    assert [name for name, path in gone.items() if path.exists()] == []


def test_a_forgotten_model_takes_its_own_handles_along(tmp_path):
    """Not those of a recipe of its name, nor of models whose names begin alike; old handles too."""
    store, artifact = ArtifactStore(home=str(tmp_path)), stored(tmp_path, "1")
    found = store.manifest_of("toy", artifact.name)
    for asset, partition in (
        ("base_model", "m"), ("base_model", "m.x"), ("leaderboard", "m"), ("recipe", "m"), ("merge_plan", "m|m"),
        ("merge_plan", "m|r"), ("merge_plan", "m.x|m"), ("merge_plan", "mm|m"), ("alternatives.tokens", "m|c4"),
    ):  # fmt: skip
        store.remember(asset, partition, found)
    for model in ("m", "m.x", "mm"):
        old_handle(tmp_path, "m", "merge_plan", model, artifact)
    store.forget("m")
    handles = tmp_path / "handles"
    assert sorted(str(p.relative_to(handles))[: -len(".json")] for p in handles.rglob("*.json")) == [
        "base_model/m.x", "m/merge_plan/m.x", "m/merge_plan/mm", "merge_plan/m.x|m", "merge_plan/mm|m", "recipe/m",
    ]  # fmt: skip
    store.forget("[m]*")  # a name is no pattern
    assert len(list(handles.rglob("*.json"))) == 6


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
