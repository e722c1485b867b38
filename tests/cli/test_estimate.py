"""The line before a run: from shapes, from what past runs took, and never in the way of a run."""

import json
import logging
import shutil
import subprocess
import sys

import dagster as dg
import pytest

from compression_dags.cli import estimate as cli_estimate
from compression_dags.cli.estimate import announce, foresee
from compression_dags.definitions import Settings, build_graph, evaluation_book
from compression_dags.estimate import RATES, START, Estimate, Model, Past, Step, estimate, predicted, read_past
from compression_dags.paths import PROJECT
from compression_dags.recipes import BASELINE, load_recipe
from compression_dags.resources.model_hub import ModelHub

SMALL, LARGE = Model(260_032, 5, 1_040_128), Model(135_000_000, 30, 270_000_000)


def test_what_is_stored_costs_nothing():
    steps = [Step("a", "calibration_activations", tokens=65_536), Step("b", "evaluation", tokens=12_000, stored=True)]
    one, both = (
        estimate(SMALL, steps, "cpu"),
        estimate(SMALL, [Step("b", "evaluation", tokens=12_000), *steps[:1]], "cpu"),
    )
    assert (one.steps, one.missing, both.missing) == (2, 1, 2) and one.seconds < both.seconds
    none = estimate(SMALL, [Step("b", "evaluation", stored=True)], "cpu")
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
    step = Step("r", "recovered_weights", "least-squares", 65_536)
    found = estimate(SMALL, [step], "cpu", past)
    assert found.seconds == pytest.approx(START["cpu"] + 3 * usual) and found.known
    assert estimate(LARGE, [step], "cpu", past).seconds > 2 * found.seconds, "scaled to the model's size"
    assert read_past(tmp_path, ["recovered_weights"], "cpu", 1000).memory == 0, "a larger model's says nothing"
    assert read_past(tmp_path / "nowhere", ["evaluation"], "cpu", 1) == Past()


@pytest.fixture
def house(tmp_path):
    """A home that knows stories260k, and the graph of one recipe."""
    settings = Settings(tmp_path / "home", device="cpu")
    hub = ModelHub(home=str(settings.home))
    hub.register(hub.resolve("stories260k"))
    (tmp_path / "r.yaml").write_text(
        "name: r\ncalibration: {sequences: 16, length: 9000}\nstages:\n"
        "  - merge: {method: shortgpt, layers: 1}\n  - recover: {method: least-squares}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    graph = build_graph({"r": recipe}, evaluation_book(PROJECT / "recipes"), settings)
    return settings, graph, graph.keys(["r"], ["heldout_stories"])


def pretend(settings, graph, key, **changes):
    """Store a manifest and a handle, as if an asset had been made by its present version and options."""
    spec = next(s for a in graph.definitions.assets for s in a.specs if s.key == key)
    name, home = "_".join(key.path), settings.home
    version, _, _ = (spec.code_version or "").rpartition(":")
    past_run(home, name, 0, 1.0, {})
    file = home / "artifacts" / name / f"{name}0" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["request"] |= {"version": version} | changes
    file.write_text(json.dumps(manifest))
    handle = home.joinpath("handles", *key.path, "stories260k.json")
    handle.parent.mkdir(parents=True, exist_ok=True)
    handle.write_text(json.dumps({"kind": name, "fingerprint": f"{name}0"}))


def missing(settings, graph, keys):
    found = foresee(graph.definitions, "stories260k", keys, settings)
    assert found is not None
    return found.missing


def test_assets_are_counted_as_the_graph_has_them(house):
    settings, graph, keys = house
    found = foresee(graph.definitions, "stories260k", keys, settings)
    assert found is not None and found.steps == found.missing == len(keys) and not found.known
    assert 5 < found.seconds < 600 and found.memory > 0.5e9
    activations = next(k for k in keys if k.path[-1] == "calibration_activations")
    pretend(settings, graph, activations, config={"samples": 2048, "seed": 0})
    assert missing(settings, graph, keys) == len(keys), "what it is made of is not"
    tokens = next(k for k in keys if k.path[-1] == "calibration_tokens")
    options = {"sequences": 16, "length": 9000, "seed": 0, "packing": "concat"}
    for key, config in ((tokens, options), (dg.AssetKey(["base_model"]), {})):
        pretend(settings, graph, key, config=config)
    stored = settings.home / "artifacts" / "base_model" / "base_model0"
    (stored / "checkpoint").symlink_to(PROJECT / "models" / "stories260k")
    assert missing(settings, graph, keys) == len(keys) - 3
    manifest = settings.home / "artifacts" / "_".join(tokens.path) / ("_".join(tokens.path) + "0") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    assert missing(settings, graph, keys) == len(keys) - 1, "of other options"


def test_tokens_are_those_of_the_context(house):
    _, graph, keys = house
    specs = {s.key: s for a in graph.definitions.assets for s in a.specs}
    steps = {k.path[-1]: cli_estimate._step(specs[k], 512, graph.book.tasks, False) for k in keys}
    assert steps["calibration_activations"].tokens == 16 * 512 == steps["recovered_weights"].tokens
    assert steps["recovered_weights"].method == "least-squares" and steps["eval_heldout_stories"].tokens == 24 * 512
    assert steps["merged_weights"].tokens == 0


def test_nothing_odd_stops_a_run(house, monkeypatch, caplog):
    settings, graph, keys = house
    monkeypatch.setattr(cli_estimate, "foresee", lambda *_: 1 / 0)
    with caplog.at_level(logging.DEBUG, logger="compression_dags"):
        cli_estimate.logger.propagate = True
        announce(graph.definitions, "stories260k", keys, settings)
    assert [r.message for r in caplog.records if r.levelno >= logging.INFO] == []
    assert any(r.exc_info for r in caplog.records), "the cause is kept for --debug"
    monkeypatch.undo()
    shutil.rmtree(settings.home)
    assert foresee(graph.definitions, "stories260k", keys, settings) is None, "a model that is nowhere yet"
    (settings.home / "artifacts").mkdir(parents=True)
    (settings.home / "artifacts" / "base_model").write_text("a file where a folder belongs")
    assert read_past(settings.home, ["base_model"], "cpu", 1) == Past()


def test_it_needs_no_torch():
    code = "import sys, compression_dags.estimate, compression_dags.cli.estimate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout.strip() == "False"


def test_the_baseline_is_counted_once(house):
    _, _, keys = house
    assert len(set(keys)) == len(keys) and dg.AssetKey([BASELINE, "scorecard"]) in keys
