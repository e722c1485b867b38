"""The command line as a stranger uses it: subprocesses, exit codes, one clear line, JSON with stable keys."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
ids = AutoTokenizer.from_pretrained(sys.argv[1])("Once upon a time", return_tensors="pt").input_ids
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


def cli(desk, *arguments, check=None, home="home"):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(desk), "COMPRESSION_DAGS_RECIPES": str(desk / "recipes")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "compression_dags.cli", *arguments, "--home", str(desk / home)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT, timeout=300)
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
    assert shared <= {key.split("/")[-1] for key in ran["recipes"]["cut-20"]["assets"]}
    scores = {n: e["scores"]["heldout_stories"]["perplexity@512"] for n, e in ran["recipes"].items()}
    assert scores["cut-20-ls"] < scores["cut-20"]
    assert (
        "baseline/samples" not in ran["recipes"]["cut-20"]["assets"]
        and "cut_20/samples" in ran["recipes"]["cut-20"]["assets"]
    )
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


@pytest.mark.parametrize("recipe", ["cut-20-ls", "cut-20-ls-w8"])
def test_export_loads_where_this_project_cannot_be_imported(desk, ran, tmp_path, recipe):
    target = tmp_path / "out"
    cli(desk, "export", "-m", "stories260k", "-r", recipe, "--to", str(target), check=0)
    alone = [
        subprocess.run(
            [sys.executable, "-c", LOADS_ALONE, where], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        for where in (str(target), ran["recipes"][recipe]["checkpoint"])
    ]
    assert all(a.returncode == 0 for a in alone), alone[0].stderr[-2000:]
    assert alone[0].stdout == alone[1].stdout
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
    assert json.loads(cli(desk, "store", "--prune", "--json", check=0).stdout) == {"would_remove": []}


def test_prune_removes_what_no_recipe_reaches(desk, ran, tmp_path):
    work = tmp_path / "desk"
    shutil.copytree(desk, work)
    (work / "recipes" / "cut-20-ls-w8.yaml").unlink()
    removed = json.loads(cli(work, "store", "--prune", "--yes", "--json", check=0).stdout)["removed"]
    assert any("quantized_weights" in r for r in removed) and not any("recovered_weights" in r for r in removed)
    again = json.loads(cli(work, "run", "-m", "stories260k", "-r", "cut-20-ls", "--json", check=0).stdout)
    states = {k: a["cache"] for k, a in again["recipes"]["cut-20-ls"]["assets"].items()}
    assert set(states.values()) == {"hit"}


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
    text.unlink()
    cli(desk, "run", "-m", "stories260k", "-r", "cut-20", "--json", check=0)


def test_directory_with_a_separator_in_its_name(desk):
    folder = desk / "a,b"
    shutil.copytree(PROJECT / "models" / "stories260k", folder)
    done = cli(desk, "run", "-m", str(folder), "-r", "cut-20", check=2)
    assert "a,b" in done.stderr and "--name" in done.stderr


def test_unwritable_home(desk):
    (desk / "blocked").write_text("")
    done = cli(desk, "run", "-m", "stories260k", "-r", "cut-20", home="blocked/home", check=2)
    assert "not writable" in done.stderr


def test_kill_9_then_the_next_run_finishes(desk):
    """Killed as soon as the first artifact is there: no partial artifact is visible and the next run completes."""
    home = desk / "killed"
    command = [sys.executable, "-m", "compression_dags.cli", "run", "-m", "stories260k", "-r", "cut-20-ls", "--json"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(desk), "COMPRESSION_DAGS_RECIPES": str(desk / "recipes")}
    process = subprocess.Popen(
        [*command, "--home", str(home)],
        env=environment,
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((home / "artifacts").glob("calibration_tokens/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in (home / "artifacts").glob("*/*"):
        assert (path / "manifest.json").is_file()
    finished = json.loads(cli(desk, *command[3:], home="killed", check=0).stdout)
    assert finished["recipes"]["cut-20-ls"]["assets"]["base_model"]["cache"] == "hit"
