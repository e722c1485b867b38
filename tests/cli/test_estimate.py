"""The line before a run: from shapes, from what past runs took, and never in the way of a run."""

import json
import logging
import shutil
import subprocess
import sys

import pytest

from compression_dags.cli import estimate as cli_estimate
from compression_dags.cli.estimate import announce, foresee
from compression_dags.cli.run import _planned, admit, resolve
from compression_dags.definitions import Settings
from compression_dags.estimate import RATES, START, Estimate, Model, Past, Work, estimate, predicted, read_past
from compression_dags.paths import PROJECT
from compression_dags.provenance.artifacts import Request
from compression_dags.recipes import load_recipes, own_recipes, pick_recipes
from compression_dags.resources.artifact_store import ArtifactStore

SMALL, LARGE = Model(260_032, 5, 1_040_128), Model(135_000_000, 30, 270_000_000)


def test_what_is_stored_costs_nothing():
    steps = [Work("a", "calibration_activations", tokens=65_536), Work("b", "evaluation", tokens=12_000, stored=True)]
    one, both = (
        estimate(SMALL, steps, "cpu"),
        estimate(SMALL, [Work("b", "evaluation", tokens=12_000), *steps[:1]], "cpu"),
    )
    assert (one.steps, one.missing, both.missing) == (2, 1, 2) and one.seconds < both.seconds
    none = estimate(SMALL, [Work("b", "evaluation", stored=True)], "cpu")
    assert none.seconds == 0 and none.line() == "all 1 assets are stored"
    assert one.line().endswith("disk") and "1 of 2 assets to compute (1 stored)" in one.line()
    assert "by built-in rates" in one.line()


def test_the_line():
    found = Estimate(110.0, 3.1e9, 0.42e9, 14, 9, known=True)
    said = "about 2 min (by past runs): 9 of 14 assets to compute (5 stored); 3.1 GB memory, 0.4 GB disk"
    assert found.line() == said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_takes_longer(device):
    for name in RATES:
        kind, _, method = name.partition(":")
        few, many = (predicted(kind, method, tokens, SMALL, device) for tokens in (1000, 10**6))
        assert 0 < few <= many
        assert predicted(kind, method, 10**5, LARGE, device) >= predicted(kind, method, 10**5, SMALL, device)
    assert predicted("nothing like it", "", 5, SMALL, device) > 0


def past_run(home, kind, number, seconds, facts, inputs=None, config=None, device="cpu"):
    folder = home / "artifacts" / kind / f"{kind}{number}"
    folder.mkdir(parents=True)
    request = {"inputs": inputs or {}, "config": config or {}, "numeric": {"device": device}, "version": "1"}
    manifest = {"digest": f"{kind}{number}", "request": request, "facts": facts, "seconds": seconds}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"peak_memory_mb": 2048.0, "fingerprint": folder.name}))


def test_past_runs_correct_the_rates(tmp_path):
    past_run(tmp_path, "base_model", 0, 3.0, {"parameters": 260_032, "layers": 5, "bytes": 1_040_128})
    past_run(tmp_path, "calibration_tokens", 0, 1.0, {"tokens": 65_536})
    usual = predicted("recovered_weights", "least-squares", 65_536, SMALL, "cpu")
    inputs = {"base_model": "base_model0", "calibration_tokens": "calibration_tokens0"}
    for number, factor in enumerate((2.0, 3.0, 50.0)):
        past_run(tmp_path, "recovered_weights", number, factor * usual, {}, inputs, {"method": "least-squares"})
    past_run(tmp_path, "recovered_weights", 9, 1e6, {}, inputs, {"method": "least-squares"}, device="cuda")
    past_run(tmp_path, "recovered_weights", 8, 1e6, {}, {"base_model": "of a model that is gone"})
    (tmp_path / "artifacts" / "recovered_weights" / "damaged").mkdir()
    (tmp_path / "artifacts" / "recovered_weights" / ".DS_Store").write_text("")
    past = read_past(tmp_path, ["recovered_weights", "evaluation"], "cpu", SMALL.parameters)
    assert past.factors == {"recovered_weights": pytest.approx(3.0)} and past.memory == 2048.0 * 2**20
    step = Work("r", "recovered_weights", "least-squares", 65_536)
    found = estimate(SMALL, [step], "cpu", past)
    assert found.seconds == pytest.approx(START["cpu"] + 3 * usual) and found.known
    assert estimate(LARGE, [step], "cpu", past).seconds > 2 * found.seconds, "scaled to the model's size"
    assert read_past(tmp_path, ["recovered_weights"], "cpu", 1000).memory == 0, "a larger model's says nothing"
    assert read_past(tmp_path / "nowhere", ["evaluation"], "cpu", 1) == Past()


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A home with stories260k, and what is planned of two recipes that share all but a recovery."""
    (tmp_path / "recipes").mkdir()
    cut = "calibration: {sequences: 16, length: 9000}\nstages:\n  - merge: {method: shortgpt, layers: 1}\n"
    (tmp_path / "recipes" / "cut.yaml").write_text(f"name: cut\n{cut}")
    (tmp_path / "recipes" / "cut-ls.yaml").write_text(f"name: cut-ls\n{cut}  - recover: {{method: least-squares}}\n")
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(tmp_path / "recipes"))
    return House(Settings(tmp_path / "home", device="cpu"))


class House:
    def __init__(self, settings):
        self.settings, self.store = settings, ArtifactStore(home=str(settings.home))
        self.base = admit(resolve("stories260k", settings, None), settings).artifact

    def plan(self, *names, **options):
        chosen = pick_recipes(load_recipes(), list(names))
        return _planned("stories260k", chosen, self.settings, "heldout_stories", None, **options)

    def foresee(self, *names):
        return foresee(self.plan(*names), self.base)

    def foreseen(self, recipe):
        """What a run of a recipe, or of the baseline, would find."""
        plan = self.plan("cut", "cut-ls")
        (found,) = (r for r in plan.recipes if r.name == recipe)
        return {e.asset: e for e in plan.planner.foreseen(found, ["heldout_stories"], self.base, "stories260k")}

    def pretend(self, recipe, *assets):
        """Store manifests as if these assets of a recipe had been made."""
        for asset in assets:
            each = self.foreseen(recipe)[asset]
            kind = "evaluation" if asset.startswith("eval_") else asset
            request = {"inputs": {}, "config": {}, "numeric": {"device": "cpu"}, "version": "1", "kind": kind}
            said = {"fingerprint": each.fingerprint, "digest": f"of {asset}", "request": request, "files": {}}
            folder = self.store.directory(kind, each.fingerprint)
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps(said | MANIFEST))

    def score(self, recipe):
        """Store a scorecard of what is stored of a recipe."""
        digests = {asset.removeprefix("eval_"): each.digest for asset, each in self.foreseen(recipe).items()}
        inputs = {"weights": digests.get("merged_weights", self.base.digest)}
        inputs |= {name: digests[name] for name in ("heldout_stories", "samples")}
        made = self.store.produce(Request("scorecard", "3", {"family": recipe}, inputs), lambda _: {})
        self.store.remember("scorecard", f"stories260k|{recipe}", made.artifact)


MANIFEST = {"facts": {}, "seconds": 1.0, "peak_memory_mb": 1.0, "run_id": ""}
#: Tokens, activations, two similarities, plan and weights of a cut.
CUT = ("calibration_tokens", "calibration_activations", "similarity_block_influence", "similarity_angular")
CUT += ("merge_plan", "merged_weights")
#: Of every model that is scored.
SCORED = ("eval_heldout_stories", "samples", "scorecard")


def test_what_recipes_share_is_counted_once(house):
    one, both = house.foresee("cut"), house.foresee("cut", "cut-ls")
    assert one.steps == one.missing == len(CUT) + 2 * len(SCORED) and not one.known
    assert both.steps == both.missing == one.steps + 1 + len(SCORED)
    assert 5 < one.seconds < both.seconds < 600 and one.memory > 0.5e9


def test_what_is_stored_is_found_by_what_it_is_made_of(house):
    steps = house.foresee("cut").steps
    house.pretend("cut", *CUT[:3])
    assert house.foresee("cut").missing == steps - 3
    assert house.foresee("cut-ls").missing == steps + 1 - 3, "the other recipe shares them"
    recipe = own_recipes() / "cut.yaml"
    recipe.write_text(recipe.read_text().replace("sequences: 16", "sequences: 17"))
    assert house.foresee("cut").missing == steps, "of other options"
    tokens = house.foreseen("cut-ls")["calibration_tokens"]
    shutil.rmtree(house.store.directory("calibration_tokens", tokens.fingerprint))
    assert house.foresee("cut-ls").missing == steps + 1, "what it is made of is gone"


def test_a_rerun_says_that_all_is_stored_until_a_recipe_is_edited(house, monkeypatch):
    """Also in the check of free disk, which counts the checkpoints that are to be made."""
    for name, steps in (("baseline", ()), ("cut", CUT)):
        house.pretend(name, *steps, "eval_heldout_stories", "samples")
        house.score(name)
    assert house.foresee("cut").line() == f"all {len(CUT) + 2 * len(SCORED)} assets are stored"
    needed = []
    monkeypatch.setattr(ArtifactStore, "ensure_writable", lambda _, need=0: needed.append(need))
    house.plan("cut")
    assert needed[-1] == 0
    recipe = own_recipes() / "cut.yaml"
    recipe.write_text(recipe.read_text().replace("layers: 1", "layers: 2"))
    assert house.foresee("cut").missing == 2 + len(SCORED)
    assert needed[-1] == house.base.size["bytes"], "one checkpoint, though a scorecard of this name is stored"
    house.plan("cut-ls")
    assert needed[-1] == house.base.size["bytes"], "the recovered one; the merged one is there"


def test_tokens_are_those_of_the_context(house, monkeypatch):
    works = {}
    monkeypatch.setattr(cli_estimate, "_sum", lambda found, *_: works.update({w.name: w for w in found}))
    house.foresee("cut-ls")
    assert works["calibration_activations"].tokens == 16 * 512 == works["recovered_weights"].tokens
    assert works["recovered_weights"].method == "least-squares" and works["eval_heldout_stories"].tokens == 24 * 512
    assert works["merged_weights"].tokens == 0


def test_nothing_odd_stops_a_run(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="compression_dags"):
        cli_estimate.logger.propagate = True
        announce(lambda: 1 / 0)
    assert [r.message for r in caplog.records if r.levelno >= logging.INFO] == []
    assert any(r.exc_info for r in caplog.records), "the cause is kept for --debug"
    (tmp_path / "artifacts").mkdir(parents=True)
    (tmp_path / "artifacts" / "base_model").write_text("a file where a folder belongs")
    assert read_past(tmp_path, ["base_model"], "cpu", 1) == Past()


def test_it_needs_no_torch():
    code = "import sys, compression_dags.estimate, compression_dags.cli.estimate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout.strip() == "False"
