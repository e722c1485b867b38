"""The command line as a stranger uses it: subprocesses, exit codes, one clear line, JSON with stable keys."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from forked import command_line

from compression_dags.paths import PROJECT

SMALL = """name: {name}
calibration: {{sequences: 24, length: 128}}
stages:
{stages}
"""
STAGES = {
    "cut-20": "  - merge: {method: shortgpt, ratio: 0.20}",
    "cut-20-ls": "  - merge: {method: shortgpt, ratio: 0.20}\n  - recover: {method: least-squares}",
    "cut-20-ls-w8": "  - merge: {method: shortgpt, ratio: 0.20}\n  - recover: {method: least-squares}\n"
    "  - quantize: {method: rtn, scheme: W8A16}",
}

LOADS_ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"compression_dags", "assets", "resources"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ids = AutoTokenizer.from_pretrained(path)("Once upon a time", return_tensors="pt").input_ids
    with torch.inference_mode():
        print(float(model(ids).logits.double().sum()))
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A home and a recipes folder."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "recipes").mkdir()
    for name, stages in STAGES.items():
        (folder / "recipes" / f"{name}.yaml").write_text(SMALL.format(name=name, stages=stages))
    return folder


def cli(desk, *arguments, check=None, home="home", code=""):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(desk), "COMPRESSION_DAGS_RECIPES": str(desk / "recipes")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = command_line(*arguments, "--home", str(desk / home), environment=environment, code=code)
    if check is not None:
        assert done.returncode == check, (done.returncode, done.stdout[-800:], done.stderr[-3000:])
    return done


@pytest.fixture(scope="module")
def ran(desk):
    recipes = [x for name in STAGES for x in ("-r", name)]
    return json.loads(cli(desk, "run", "-m", "stories260k", *recipes, "--json", check=0).stdout)


def test_run_json_has_the_promised_keys(ran):
    assert ran["base_model"].keys() == {"name", "slug", "params", "bytes", "layers"}
    assert ran["baseline"]["scores"]["heldout_stories"]["perplexity@512"] == pytest.approx(4.9, abs=0.2)
    assert ran["recipes"].keys() == STAGES.keys()
    for entry in ran["recipes"].values():
        assert entry.keys() == {"checkpoint", "layers", "params", "bytes", "scores", "assets"}
        assert entry["layers"] == 4 and entry["scores"]["heldout_stories"]["perplexity@512"] > 4.9
        assert all(a.keys() == {"cache", "seconds", "fingerprint"} for a in entry["assets"].values())
    shared = {"base_model", "calibration_tokens", "calibration_activations", "similarity_block_influence"}
    own = {"merge_plan", "merged_weights", "compressed_model", "eval_heldout_stories", "samples", "scorecard"}
    assert ran["recipes"]["cut-20"]["assets"].keys() == {*shared, "similarity_angular", *own}
    scores = {n: e["scores"]["heldout_stories"]["perplexity@512"] for n, e in ran["recipes"].items()}
    assert scores["cut-20-ls"] < scores["cut-20"]
    assert "recovered_weights" in ran["recipes"]["cut-20-ls"]["assets"]
    assert ran["recipes"]["cut-20-ls-w8"]["bytes"] < ran["recipes"]["cut-20-ls"]["bytes"] / 2


def test_second_run_is_all_hits_without_the_dagster_folder(desk, ran):
    shutil.rmtree(desk / "home" / "dagster")
    again = json.loads(cli(desk, "run", "-m", "stories260k", "-r", "cut-20-ls", "--json", check=0).stdout)
    assets = again["recipes"]["cut-20-ls"]["assets"]
    assert {a["cache"] for a in assets.values()} == {"hit"}
    assert assets == {
        k: {**v, "cache": "hit", "seconds": assets[k]["seconds"]}
        for k, v in ran["recipes"]["cut-20-ls"]["assets"].items()
    }


def test_human_output_has_table_report_and_ui_line(desk, ran):
    out = cli(desk, "run", "-m", "stories260k", "-r", "cut-20", check=0).stdout
    assert "cut-20" in out and "cache hits" in out and "open the UI:" in out
    report = next(line.split(": ")[1] for line in out.splitlines() if line.startswith("report:"))
    html = Path(report).read_text()
    assert "cut-20" in html and "data:image/png" in html
    assert "<h2>What they write</h2>" in html and "The capital of France is" in html


def test_exports_load_where_this_project_cannot_be_imported(desk, ran, tmp_path):
    for recipe in ("cut-20-ls", "cut-20-ls-w8"):
        cli(desk, "export", "-m", "stories260k", "-r", recipe, "--to", str(tmp_path / recipe), check=0)
        described(desk, tmp_path / recipe, recipe)
    paths = [p for r in ("cut-20-ls", "cut-20-ls-w8") for p in (str(tmp_path / r), ran["recipes"][r]["checkpoint"])]
    command = [sys.executable, "-c", LOADS_ALONE, *paths]
    alone = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert alone.returncode == 0, alone.stderr[-2000:]
    exported, stored, exported_w8, stored_w8 = alone.stdout.split()
    assert exported == stored and exported_w8 == stored_w8 and exported != exported_w8


def described(desk, target, recipe):
    """The export says what it is, names no path, and is not overwritten."""
    record = json.loads((target / "compression.json").read_text())
    assert record["recipe"]["name"] == recipe and record["lineage"]["base_model"]["digest"]
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card  # the hub has no such id
    assert "| recover | least-squares |" in card
    assert "| Once upon a time | " in card and len(record["samples"]["texts"]) == 3
    assert str(desk) not in card and str(PROJECT) not in card
    refused = cli(desk, "export", "-m", "stories260k", "-r", recipe, "--to", str(target))
    assert refused.returncode == 2 and "new or empty" in refused.stderr


def test_decisions_leaderboard_store(desk, ran):
    rows = json.loads(cli(desk, "decisions", "-m", "stories260k", "-r", "cut-20-ls", "--json", check=0).stdout)
    assert {r["stage"] for r in rows} == {"merge", "recover"} and all(json.loads(r["evidence"]) for r in rows)
    only = json.loads(
        cli(desk, "decisions", "-m", "stories260k", "-r", "cut-20-ls", "--stage", "recover", "--json", check=0).stdout
    )
    assert [r["action"] for r in only] == ["recover"]
    boards = json.loads(cli(desk, "leaderboard", "--json", check=0).stdout)
    assert {r["family"] for r in boards["stories260k"]} == {"baseline", *STAGES}
    sizes = json.loads(cli(desk, "store", "--json", check=0).stdout)
    assert sizes["recovered_weights"]["artifacts"] == 1
    prune = json.loads(cli(desk, "store", "--prune", "--days", "0", "--json", check=0).stdout)
    assert prune == {"would_remove": [], "bytes": 0, "left_alone": [], "failed": []}
    checked = json.loads(cli(desk, "store", "--check", "--json", check=0).stdout)
    assert checked.keys() == {"artifacts", "bytes", "damaged", "left_alone"} and checked["damaged"] == []


def test_prune_removes_recipes_that_are_gone_when_asked(desk, ran, tmp_path):
    """Their results stay until `--recipes-gone`; what other recipes share stays even then."""
    work = tmp_path / "desk"
    shutil.copytree(desk, work)
    (work / "recipes" / "cut-20-ls-w8.yaml").unlink()
    prune = ("store", "--prune", "--days", "0", "--json")
    assert json.loads(cli(work, *prune, check=0).stdout)["would_remove"] == []
    removed = json.loads(cli(work, *prune, "--recipes-gone", "--yes", check=0).stdout)["removed"]
    kinds = {r.split("/")[1] for r in removed if r.startswith("artifacts/")}
    assert "quantized_weights" in kinds and "recovered_weights" not in kinds
    gone = {r.split("/")[2].removesuffix(".json") for r in removed if r.startswith("handles/")}
    assert gone == {"cut-20-ls-w8", "stories260k|cut-20-ls-w8"}
    again = json.loads(cli(work, "run", "-m", "stories260k", "-r", "cut-20-ls", "--json", check=0).stdout)
    states = {k: a["cache"] for k, a in again["recipes"]["cut-20-ls"]["assets"].items()}
    assert set(states.values()) == {"hit"}
    (flipped,) = (work / "home" / "artifacts" / "recovered_weights").glob("*/checkpoint/model.safetensors")
    flipped.chmod(0o644)
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"!")
    checked = json.loads(cli(work, "store", "--check", "--json", check=1).stdout)
    (damage,) = [entry for entry in checked["damaged"] if entry["kind"] == "recovered_weights"]
    assert damage["files"] == {"checkpoint/model.safetensors": "other content than was stored"}


def test_listings(desk):
    assert "stories260k" in json.loads(cli(desk, "models", "--json", check=0).stdout)
    listed = subprocess.run(
        [sys.executable, "-m", "compression_dags.cli", "methods", "--json"], capture_output=True, text=True, check=True
    )
    described = json.loads(listed.stdout)
    assert described["merge: shortgpt"]["parameters"]["protect_first"]["default"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-m", "no-such-model", "-r", "cut-20"), "no-such-model"),
        (("-m", "stories260k", "-r", "cut-99"), "recipe 'cut-99' is unknown"),
        (("-m", "stories260k", "-r", "cut-20", "--tasks", "no_such_task"), "no_such_task"),
        (("-m", "stories260k", "-r", "cut-20", "--device", "tpu"), "device 'tpu' is unknown"),
        (("-m", "stories260k", "-r", "cut-20-ls", "--sequences", "2"), "fitting tokens and needs"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(desk, ran, arguments, says):
    done = cli(desk, "run", *arguments, "--json", check=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0] and done.stdout == ""


def test_a_text_of_one_s_own_is_a_task_and_may_vanish_later(desk, ran):
    """`--tasks FILE` scores a text, the home remembers it, and a deleted text does not break later runs."""
    text = desk / "my text.txt"
    text.write_text("Once upon a time there was a little cat who liked to play in the garden. " * 200)
    found = json.loads(
        cli(desk, "run", "-m", "stories260k", "-r", "cut-20", "--tasks", str(text), "--json", check=0).stdout
    )
    assert found["recipes"]["cut-20"]["scores"]["my_text"]["windows"] >= 1
    prune = ("store", "--prune", "--days", "0", "--recipes-gone", "--json")
    listed = json.loads(cli(desk, *prune, check=0).stdout)["would_remove"]
    # the boards and cards of before the text are of no use any more
    assert {r.split("/")[1] for r in listed} <= {"leaderboard", "decision_ledger", "scorecard"}, listed
    text.unlink()
    cli(desk, "run", "-m", "stories260k", "-r", "cut-20", "--json", check=0)
    listed = json.loads(cli(desk, *prune, check=0).stdout)["would_remove"]
    assert not [r for r in listed if "/evaluation/" in r or r.startswith("handles/")], listed
    assert (desk / "home" / "handles" / "eval_my_text" / "stories260k|cut-20.json").is_file()


def test_a_changed_calibration_is_a_recipe_of_its_own(desk, ran, tmp_path):
    """It stands on the leaderboard beside the recipe, and each says its own calibration wherever it is described."""
    changed = ("--sequences", "16", "--length", "64")
    found = json.loads(cli(desk, "run", "-m", "stories260k", "-r", "cut-20", *changed, "--json", check=0).stdout)
    assert found["recipes"].keys() == {"cut-20@16x64"}
    (board,) = json.loads(cli(desk, "leaderboard", "--json", check=0).stdout).values()
    rows = {row["family"]: row["recipe_changed"] for row in board}
    assert {"baseline", "cut-20", "cut-20@16x64"} <= rows.keys() and not any(rows.values()), rows
    for name, size in (("cut-20", (24, 128)), ("cut-20@16x64", (16, 64))):
        cli(desk, "export", "-m", "stories260k", "-r", name, "--to", str(tmp_path / name), check=0)
        described = json.loads((tmp_path / name / "compression.json").read_text())["recipe"]
        assert described["name"] == name
        assert (described["calibration"]["sequences"], described["calibration"]["length"]) == size
        card = (tmp_path / name / "README.md").read_text()
        assert "calibration:\n  sequences: {}\n  length: {}\n".format(*size) in card
    again = json.loads(cli(desk, "run", "-m", "stories260k", "-r", "cut-20@16x64", "--json", check=0).stdout)
    assert {a["cache"] for a in again["recipes"]["cut-20@16x64"]["assets"].values()} == {"hit"}


FAILS = """
import sys
from compression_dags.depth import workers
plan = workers.plan
def fails(job):
    if job.stage.layers == 2:
        raise {error}
    return plan(job)
workers.plan = fails
from compression_dags.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ('RuntimeError("it broke")', "failed: merge_plan stories260k|cut-two: RuntimeError: it broke (run "),
        ('__import__("compression_dags.errors").errors.InputError("no")', "failed: stories260k|cut-two: no; done: "),
    ],
)
def test_a_recipe_that_fails_does_not_keep_the_others_from_being_done(desk, ran, error, says):
    """Neither from being run, though it comes first, nor from the leaderboard; and the same command goes on."""
    stages = {"cut-two": "  - merge: {method: shortgpt, layers: 2}", "w8": "  - quantize: {method: rtn, scheme: W8A16}"}
    for name, text in stages.items():
        (desk / "recipes" / f"{name}.yaml").write_text(SMALL.format(name=name, stages=text))
    arguments = ("run", "-m", "stories260k", "-r", "cut-two", "-r", "w8", "--json")
    done = cli(desk, *arguments, code=FAILS.format(error=error), check=1)
    assert done.stdout == "", done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith(("failed: ", "error: "))]
    assert len(lines) == 1 and lines[0].startswith(says) and lines[0].endswith("; done: w8"), lines
    assert "failed    stories260k|cut-two" in done.stderr
    (board,) = json.loads(cli(desk, "leaderboard", "--json", check=0).stdout).values()
    families = {row["family"] for row in board}
    assert "w8" in families and "cut-two" not in families


def test_directory_with_a_separator_in_its_name(desk):
    folder = desk / "a,b"
    shutil.copytree(PROJECT / "models" / "stories260k", folder)
    done = cli(desk, "run", "-m", str(folder), "-r", "cut-20", check=2)
    assert "a,b" in done.stderr and "--name" in done.stderr


def test_unwritable_home(desk):
    (desk / "blocked").write_text("")
    done = cli(desk, "run", "-m", "stories260k", "-r", "cut-20", home="blocked/home", check=2)
    assert "not writable" in done.stderr


WITHOUT_TORCH = """
import sys
from compression_dags.cli.main import main
main(sys.argv[1:], standalone_mode=False)
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_why_reads_the_store_alone(desk, ran):
    line = ["why", "-m", "stories260k", "-r", "cut-20-ls-w8", "4", "--json", "--home", str(desk / "home")]
    environment = {**os.environ, "COMPRESSION_DAGS_RECIPES": str(desk / "recipes")}
    command = [sys.executable, "-c", WITHOUT_TORCH, *line]
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert list(found) == [
        *("base_model", "recipe", "base_layers", "layer", "module", "fate", "new_layer", "stand_in", "stages")
    ]
    assert (found["fate"], found["new_layer"], found["layer"]) == ("kept", 3, 4)
    merge, recover, quantize = found["stages"]
    assert not recover["decisions"] and "no removed layer follows it" in recover["note"]
    assert set(merge) == {"step", "stage", "method", "fingerprint", "run", "layer", "decisions", "note"}
    assert merge["decisions"][0]["reason"].startswith("protected: last layer (protect_last 1)")
    assert len(quantize["decisions"][0]["targets"]) == 7 and quantize["layer"] == 3
    assert set(quantize["decisions"][0]) == {"targets", "action", "reason", "values", "unit"}


@pytest.mark.parametrize(
    ("model", "recipe", "layer", "says"),
    [
        ("no-such-model", "cut-20", "1", "no-such-model"),
        ("stories260k", "nothing", "1", "recipe 'nothing' is unknown. Known: cut-20, other"),
        ("stories260k", "other", "1", "recipe other was not run on stories260k: compression-dags run"),
        ("stories260k", "cut-20", "5", "layer 5 is out of range: stories260k has layers 0 to 4"),
        ("stories260k", "cut-20", "-1", "layer -1 is out of range"),
    ],
)
def test_why_refuses_what_it_does_not_know(desk, ran, tmp_path, monkeypatch, model, recipe, layer, says):
    from compression_dags.cli.main import main

    for name in ("cut-20", "other"):
        (tmp_path / f"{name}.yaml").write_text(SMALL.format(name=name, stages=STAGES["cut-20"]))
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(tmp_path))
    monkeypatch.setenv("COMPRESSION_DAGS_HOME", str(desk / "home"))
    done = CliRunner().invoke(main, ["why", "-m", model, "-r", recipe, layer, "--json"])
    assert done.exit_code == 2 and done.stdout == "" and says in done.stderr and done.stderr.count("\n") == 1


def test_decisions_show_reasons_whole(desk, ran, monkeypatch):
    from compression_dags.cli.main import main

    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(desk / "recipes"))
    done = CliRunner().invoke(main, ["decisions", "-m", "stories260k", "-r", "cut-20", "--home", str(desk / "home")])
    assert done.exit_code == 0
    (row,) = (line for line in done.stdout.splitlines() if " layer 4 " in line)
    assert row.endswith("was not compared") and "protected: last layer" in row
