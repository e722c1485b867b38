"""The store tells the truth: scores that change reach the board, damage is found, equal requests are equal bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner
from home_runs import TEXT, Run

from compression_dags.assets.partitions import Place
from compression_dags.assets.publishing import report
from compression_dags.assets.recipe import register
from compression_dags.assets.selection import selection
from compression_dags.assets.summary import LEADERBOARD, LEDGER
from compression_dags.cli.main import main
from compression_dags.cli.run import admit, resolve
from compression_dags.cli.session import execute
from compression_dags.definitions import Settings, build
from compression_dags.evaluation.tasks import evaluation_book
from compression_dags.paths import PROJECT
from compression_dags.provenance.artifacts import Request, content_digest, describe_files
from compression_dags.recipes import BASELINE, BASELINE_RECIPE, load_recipe
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Session
from compression_dags.step import BASE

CUT = """
name: cut
calibration: {sequences: 8, length: 64, samples: 64}
stages:
  - merge: {method: reverse, ratio: 0.2}
  - quantize: {method: rtn, scheme: W8A16}
"""


def run(home: Path, folder: Path, model: str, tasks=("heldout_stories",)) -> dict[str, dict]:
    """Materialize the baseline and recipe `cut` with stubbed scores; `<recipe>/<asset>` → metadata and data version."""
    (folder / "cut.yaml").write_text(CUT)
    recipes = {BASELINE: BASELINE_RECIPE, "cut": load_recipe(folder / "cut.yaml")}
    settings, wanted = Settings(home, device="cpu"), evaluation_book(PROJECT / "recipes").resolve(list(tasks))
    definitions, store, source = build(wanted, settings), ArtifactStore(home=str(home)), resolve(model, settings, None)
    found = {}
    with dg.DagsterInstance.ephemeral() as instance:

        def said(name: str, asset: str, partition: str) -> None:
            record = instance.get_latest_data_version_record(dg.AssetKey(asset), partition_key=partition)
            event = record.asset_materialization
            version = {"data_version": event.tags["dagster/data_version"]}
            found[name] = {key: value.value for key, value in event.metadata.items()} | version

        report(instance, BASE, {source.slug: admit(source, settings)})
        instance.add_dynamic_partitions("base_model", [source.slug])
        said(BASE, BASE, source.slug)
        register(instance, store, recipes)
        for name, recipe in recipes.items():
            here = Place(source.slug, name)
            assets = selection(recipe, [task.name for task in wanted])
            assert sorted(execute(instance, definitions, here.key, assets, settings)) == sorted(assets)
            for asset in assets:
                said(f"{name}/{asset}", asset, str(here))
        for asset in execute(instance, definitions, source.slug, [LEADERBOARD, LEDGER], settings):
            said(asset, asset, source.slug)
    return found


@pytest.fixture
def stub_scores(monkeypatch):
    """Scores come from this value: the evaluation itself is another test's."""
    value = {"perplexity@512": 10.0}
    monkeypatch.setattr(Session, "score", lambda self, task, directory: dict(value))
    monkeypatch.setattr(Session, "samples", lambda self: ["a", "b", "c"])
    monkeypatch.setattr(Session, "guard", lambda *a: None)
    return value


def test_scores_that_change_reach_scorecard_and_leaderboard(tmp_path, stub_scores):
    text = tmp_path / "own.txt"
    text.write_text("one text")
    first = run(tmp_path / "home", tmp_path, "stories260k", [str(text)])
    text.write_text("another text")
    stub_scores["perplexity@512"] = 20.0
    again = run(tmp_path / "home", tmp_path, "stories260k", [str(text)])
    for key in ("cut/eval_own", "cut/scorecard", "leaderboard"):
        assert again[key]["cache"] == "computed" and again[key]["data_version"] != first[key]["data_version"], key
    card = ArtifactStore(home=str(tmp_path / "home")).recall("scorecard", "stories260k|cut")
    assert json.loads((card.path / "scorecard.json").read_text())["scores"]["own"]["perplexity@512"] == 20.0
    hits = run(tmp_path / "home", tmp_path, "stories260k", [str(text)])
    assert {entry["cache"] for entry in hits.values()} == {"hit"}


def test_a_card_or_licence_of_the_model_recomputes_nothing_and_its_config_does(tmp_path, stub_scores):
    model = Path(shutil.copytree(PROJECT / "models" / "stories260k", tmp_path / "mine"))
    run(tmp_path / "home", tmp_path, str(model))
    with (model / "README.md").open("a") as card:
        card.write("\nOne more line.\n")
    (model / "NOTICE").write_text("mine")
    (model / "notes.txt").write_text("mine")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"_name_or_path": "/elsewhere", "transformers_version": "9"})
    )
    again = run(tmp_path / "home", tmp_path, str(model))
    computed = {key for key, entry in again.items() if entry["cache"] != "hit"}
    assert computed == set(), computed
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert run(tmp_path / "home", tmp_path, str(model))["cut/merged_weights"]["cache"] == "computed"


def flip(path: Path) -> None:
    """Change one byte in the middle and put the old times back."""
    stat = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    path.chmod(0o444)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_flipped_byte_is_found_before_use_kept_aside_and_built_again(tmp_path, stub_scores):
    first = run(tmp_path / "home", tmp_path, "stories260k")
    places = {
        where: Path(first[where]["path"])
        for where in ("base_model", "cut/quantized_weights", "cut/eval_heldout_stories")
    }
    victims = {where: next(path.rglob("*.safetensors"), path / "metrics.json") for where, path in places.items()}
    good = {where: victim.read_bytes() for where, victim in victims.items()}
    for victim in victims.values():
        flip(victim)
    again = run(tmp_path / "home", tmp_path, "stories260k")
    assert {key for key, entry in again.items() if entry["cache"] != "hit"} == set(places)
    for where, victim in victims.items():
        assert again[where]["cache"] == "rebuilt" and victim.name in again[where]["damage"]
        assert victim.read_bytes() == good[where] and again[where]["data_version"] == first[where]["data_version"]
        (_aside,) = places[where].parent.glob(f"{places[where].name}.damaged-*")
    assert {entry["cache"] for entry in run(tmp_path / "home", tmp_path, "stories260k").values()} == {"hit"}


def test_stored_files_are_read_only_and_hits_read_no_weights(tmp_path, stub_scores, monkeypatch):
    run(tmp_path / "home", tmp_path, "stories260k")
    files = [p for p in (tmp_path / "home" / "artifacts").rglob("*") if p.is_file()]
    assert files and all(p.stat().st_mode & 0o777 == 0o444 for p in files)

    def refuse(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("compression_dags.resources.integrity.file_digest", refuse)
    assert {entry["cache"] for entry in run(tmp_path / "home", tmp_path, "stories260k").values()} == {"hit"}


def test_a_home_that_was_copied_is_hashed_once_and_used(tmp_path):
    store = ArtifactStore(home=str(tmp_path / "a"))
    request = Request("toy", "1", {}, {})

    def build(work):
        (work.out / "data").write_text("x")
        return {}

    store.produce(request, build)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = ArtifactStore(home=str(tmp_path / "b"))
    assert copy.produce(request, build).hit
    (tmp_path / "b" / "artifacts" / "toy" / request.fingerprint / "manifest.json").chmod(0o644)
    (tmp_path / "b" / "artifacts" / "toy" / request.fingerprint / "manifest.json").write_text("{}")
    rebuilt = copy.produce(request, build)
    assert not rebuilt.hit and "manifest" in rebuilt.damage[0]


def test_the_digest_of_a_checkpoint_is_what_it_computes(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(PROJECT / "models" / "stories260k", checkpoint)

    def digest():
        return content_digest(describe_files(tmp_path))

    plain = digest()
    for name in ("README.md", "LICENSE-MODEL", "USE_POLICY.md", ".gitattributes", "training_log.txt", "eval.json"):
        (checkpoint / name).write_text("anything")
        assert digest() == plain, name
    (tmp_path / "decisions.parquet").write_text("rows")
    assert digest() == plain
    for name in ("chat_template.jinja", "generation_config.json", "vocab.json", "tokenizer.model"):
        (checkpoint / name).write_text('{"do_sample": true}')
        assert digest() != plain, name
        plain = digest()


def test_what_was_run_is_what_is_described(tmp_path, stub_scores, monkeypatch):
    """A recipe that was edited since: export says so and asks, the board marks it, the card says what was run."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    run(tmp_path / "home", folder, "stories260k")
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(folder))
    line = ["export", "-m", "stories260k", "-r", "cut", "--home", str(tmp_path / "home"), "--to"]
    assert CliRunner().invoke(main, [*line, str(tmp_path / "same")]).exit_code == 0
    (folder / "cut.yaml").write_text(CUT.replace("W8A16", "W4A16"))
    refused = CliRunner().invoke(main, [*line, str(tmp_path / "out")])
    assert refused.exit_code == 2 and "scheme was" in refused.stderr and not (tmp_path / "out").exists()
    assert CliRunner().invoke(main, [*line, str(tmp_path / "out"), "--as-run"]).exit_code == 0
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert record["recipe"]["stages"][1]["quantize"]["scheme"] == "W8A16"
    assert "scheme: W8A16" in (tmp_path / "out" / "README.md").read_text()
    assert list(record["lineage"]) == ["base_model", "merge_plan", "merged_weights", "quantized_weights"]
    board = CliRunner().invoke(main, ["leaderboard", "--home", str(tmp_path / "home")]).stdout
    assert "cut was run with another form of its recipe" in board
    victim = next((tmp_path / "home" / "artifacts" / "quantized_weights").rglob("*.safetensors"))
    flip(victim)
    damaged = CliRunner().invoke(main, [*line, str(tmp_path / "bad"), "--as-run"])
    assert damaged.exit_code == 1 and "damaged" in damaged.stderr and not (tmp_path / "bad").exists()


MANY = """
name: many
calibration: {sequences: 24, length: 64, samples: 64}
stages:
  - merge: {method: shortgpt, ratio: 0.2}
  - recover: {method: least-squares}
  - sparsify: {method: sparsegpt, sparsity: 0.5}
  - quantize: {method: gptq, scheme: W8A16, group_size: 32}
"""


@pytest.mark.slow
def test_two_homes_two_paths_two_hash_seeds_equal_bytes(tmp_path):
    """Nothing of the machine is in an artifact: every file has equal bytes, the board and the ledger too.

    One run is a new interpreter with a hash seed of its own, the other a child of a server that hashes at random.
    """
    desks = [tmp_path / "one", tmp_path / "another place"]
    wanted = {}
    for desk in desks:
        (desk / "recipes").mkdir(parents=True)
        (desk / "recipes" / "many.yaml").write_text(MANY)
        (desk / "cat.txt").write_text(TEXT)
        model = shutil.copytree(PROJECT / "models" / "stories260k", desk / "stories")
        wanted[desk] = ("run", "-m", str(model), "-r", "many", "--tasks", str(desk / "cat.txt"))
    here, there = desks
    child = Run(here, "home", *wanted[here])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(there), "COMPRESSION_DAGS_RECIPES": str(there / "recipes")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "compression_dags.cli", *wanted[there], "--home", str(there / "home")],
        capture_output=True, text=True, env=environment, cwd=PROJECT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert child.ends() == 0, child.said()[-2000:]
    found = []
    for desk in desks:
        manifests = (desk / "home" / "artifacts").rglob("manifest.json")
        read = [json.loads(path.read_text()) for path in manifests]
        found.append({(m["request"]["kind"], m["fingerprint"]): (m["digest"], m["files"]) for m in read})
    assert found[0].keys() == found[1].keys()
    assert [key for key in found[0] if found[0][key] != found[1][key]] == []
    assert {kind for kind, _ in found[0]} >= {"recovered_weights", "sparse_weights", "quantized_weights", "leaderboard"}
