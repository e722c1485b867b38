"""The asset graph: one asset a kind of artifact, recipes as partitions, rooms apart, reruns that reuse."""

import datetime
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest
import torch
from dagster import DagsterEvent
from graph_runs import CAT, RECIPES, run, small_recipes, states
from safetensors.torch import load_file, save_file

from compression_dags.assets.evaluation import eval_key
from compression_dags.assets.partitions import Place
from compression_dags.assets.recipe import at, register
from compression_dags.assets.selection import selection
from compression_dags.definitions import Settings, all_tasks, build
from compression_dags.evaluation.tasks import evaluation_book
from compression_dags.paths import PROJECT
from compression_dags.provenance.decisions import LEDGER_COLUMNS
from compression_dags.recipes import BASELINE_RECIPE, load_recipes
from compression_dags.recipes.kinds import TABLE, WEIGHTS_KINDS
from compression_dags.recipes.pipeline import last_weights, steps_of
from compression_dags.resources.artifact_store import ArtifactStore


def whole_graph(home: Path = Path("/nonexistent"), **settings) -> dg.Definitions:
    """What the UI loads, of all shipped recipes."""
    return build(all_tasks(evaluation_book(RECIPES), list(load_recipes(RECIPES).values())), Settings(home, **settings))


@pytest.fixture(scope="module")
def definitions():
    return whole_graph()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home):
    return run(home, small_recipes("shortgpt-20", "shortgpt-20-ls"))


def test_the_graph_is_one_asset_a_kind_of_artifact(definitions):
    dg.Definitions.validate_loadable(definitions)
    keys = definitions.resolve_asset_graph().get_all_asset_keys()
    jobs = set(definitions.get_repository_def().job_names) - {"__ASSET_JOB"}
    assert {"base_model", "recipe", "leaderboard", "scorecard", *TABLE} <= {k.to_user_string() for k in keys}
    assert len(keys) <= 45 and jobs == {"compress", "evaluate", "summarise", "import_base_model"}


def test_every_asset_is_described_and_grouped(definitions):
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description and node.group_name != "default", key
    for name in ("calibration_activations", *WEIGHTS_KINDS):
        assert graph.get(dg.AssetKey(name)).pools == {"gpu"}


def test_every_step_reads_what_its_asset_says(definitions):
    """Of every shipped recipe: a step's inputs are parents of its asset, so that a run makes them before it."""
    graph = definitions.resolve_asset_graph()
    for recipe in load_recipes(RECIPES).values():
        steps = steps_of(recipe)
        for name, step in steps.items():
            parents = {key.to_user_string() for key in graph.get(dg.AssetKey(name)).parent_keys}
            assert set(step.sources.values()) <= parents, (recipe.name, name)
            assert set(step.sources.values()) - {"base_model"} <= set(steps), (recipe.name, name)
        assert {*selection(recipe, ["wikitext2"])} <= {k.to_user_string() for k in graph.get_all_asset_keys()}


def test_weights_follow_the_stages():
    recipes = load_recipes(RECIPES)

    def reads(recipe: str, name: str) -> set[str]:
        return set(steps_of(recipes[recipe])[name].sources.values())

    assert reads("angular-20-ls-rtn-w4", "quantized_weights") == {"recovered_weights"}
    assert reads("rtn-w4", "quantized_weights") == reads("reverse-20", "merge_plan") == {"base_model"}
    assert reads("shortgpt-20", "merge_plan") == {"base_model", "similarity_block_influence"}
    assert "recovered_weights" in reads("shortgpt-20-sweep-distill", "recovered_weights_2")
    assert last_weights(BASELINE_RECIPE) == "base_model" and not steps_of(BASELINE_RECIPE)


def test_one_stage_s_options_change_one_step():
    recipe = small_recipes("shortgpt-20-ls")["shortgpt-20-ls"]
    other = replace(recipe, stages=(recipe.merge.model_copy(update={"ratio": 0.3}), *recipe.recoveries))
    steps, changed = steps_of(recipe), steps_of(other)
    differing = [n for n in steps if (steps[n].options, steps[n].version) != (changed[n].options, changed[n].version)]
    assert steps.keys() == changed.keys() and differing == ["merge_plan"]


def test_first_run_computes_and_shares_the_equal_prefix(first):
    assert first["base_model"]["base_model"]["cache"] == "computed"
    # equal plans are one artifact: of the two recipes' the second is a hit
    for name in ("calibration_activations", "merge_plan", "merged_weights"):
        assert [first[r][name]["cache"] for r in ("shortgpt-20", "shortgpt-20-ls")] == ["computed", "hit"]
    assert first["shortgpt-20-ls"]["recovered_weights"]["cache"] == "computed"
    assert (
        first["shortgpt-20-ls"]["compressed_model"]["data_version"]
        == (first["shortgpt-20-ls"]["recovered_weights"]["data_version"])
    )


@pytest.mark.slow
def test_merging_wing_shares_one_pass_and_recoveries_follow_one_another(tmp_path):
    """Methods that measure get tokens and a device; three plans are three checkpoints; each recovery is an asset."""
    recipes = small_recipes("mka-20", "come-20", "shortgpt-20-sweep-distill")
    chain = recipes["shortgpt-20-sweep-distill"]
    quick = {"tokens": 2048, "batch_tokens": 256, "length": 64, "held_windows": 4, "logit_lr": 50.0, "hidden_lr": 50.0}
    distill = chain.stages[2].model_copy(update=quick)
    recipes[chain.name] = replace(chain, stages=(*chain.stages[:2], distill))
    found = run(tmp_path, recipes)
    assert len({found[r]["calibration_activations"]["fingerprint"] for r in recipes}) == 1
    assert {asset for assets in found.values() for asset in assets if "similarity" in asset} == {
        "similarity_block_influence",
        "similarity_angular",
        "similarity_npib",
        "similarity_cka",
    }
    paths = {name: [Path(found[r][name]["path"]) for r in recipes] for name in ("merge_plan", "merged_weights")}
    assert len({(p / "checkpoint/model.safetensors").read_bytes() for p in paths["merged_weights"]}) == 3
    assert len({(p / "decisions.parquet").read_bytes() for p in paths["merge_plan"]}) == 3
    # a learning rate of 50 ruins every part: all are rejected, and the pipeline goes on with the unrecovered weights
    one, two = (Path(found[chain.name][name]["path"]) for name in ("recovered_weights", "recovered_weights_2"))
    assert set(pd.read_parquet(two / "decisions.parquet")["action"]) == {"reject"}
    assert (one / "checkpoint/model.safetensors").read_bytes() == (two / "checkpoint/model.safetensors").read_bytes()
    assert "scorecard" in found[chain.name]


def test_second_run_is_all_hits_even_with_a_fresh_dagster_instance(home, first):
    again = run(home, small_recipes("shortgpt-20", "shortgpt-20-ls"))
    assert states(again, "computed") == set()
    for recipe, assets in first.items():
        assert {n: s["fingerprint"] for n, s in again[recipe].items()} == {
            n: s["fingerprint"] for n, s in assets.items()
        }


def test_another_ratio_computes_only_from_the_plan_on(home, first):
    recipe = small_recipes("shortgpt-30")["shortgpt-30"]
    recipe = replace(recipe, stages=(recipe.merge.model_copy(update={"ratio": 0.4}),))
    found = run(home, {recipe.name: recipe})
    after = ("merge_plan", "merged_weights", "eval_cat", "samples", "scorecard")
    own = {f"shortgpt-30/{name}" for name in after}
    assert states(found, "computed") == own | {"summary/leaderboard", "summary/decision_ledger"}


def test_handles_are_what_travels(home, first):
    handles = [json.loads(p.read_text()) for p in (home / "handles").rglob("*.json")]
    assert handles and all(set(h) - {"recipe"} == {"kind", "fingerprint"} for h in handles)


def test_ledger_explains_every_layer(home, first):
    artifact = ArtifactStore(home=str(home)).recall("decision_ledger", "stories260k")
    ledger = pd.read_parquet(artifact.path / "ledger.parquet")
    assert list(ledger.columns) == LEDGER_COLUMNS
    rows = ledger[(ledger.recipe == "shortgpt-20") & (ledger.stage == "merge")]
    assert len(rows) == 5 and (rows.action == "drop").sum() == 1 and rows.value.notna().all()
    assert (ledger[ledger.recipe == "shortgpt-20-ls"].stage == "recover").sum() == 1


def test_bad_weights_fail_in_base_model_and_harm_nothing(home, first, tmp_path):
    bad = tmp_path / "broken"
    shutil.copytree(PROJECT / "models" / "stories260k", bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"model\.norm\.weight"):
        run(home, {}, model=str(bad))
    assert states(run(home, small_recipes("shortgpt-20")), "computed") <= {"summary/leaderboard"}


def test_a_step_that_a_recipe_has_not_is_passed_on(home, first):
    """A person may select it all the same: nothing is computed, and the page says so."""
    definitions = build(evaluation_book(RECIPES).resolve([str(CAT)]), Settings(home, device="cpu"))
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("base_model", ["stories260k"])
        instance.add_dynamic_partitions("recipe", ["shortgpt-20"])
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key=Place("stories260k", "shortgpt-20").key,
            asset_selection=[dg.AssetKey("quantized_weights")],
        )
    (event,) = (e for e in result.all_events if e.is_step_materialization)
    assert "no such step" in event.materialization.metadata["passed_on"].value


def test_an_edited_recipe_is_materialized_and_its_words_are_no_change(tmp_path):
    store = ArtifactStore(home=str(tmp_path))
    recipe = small_recipes("shortgpt-20")["shortgpt-20"]
    with dg.DagsterInstance.ephemeral() as instance:
        assert not register(instance, store, {recipe.name: recipe})[recipe.name].hit
        assert instance.get_dynamic_partitions("recipe") == [recipe.name]
        said = replace(recipe, description="In other words")
        assert register(instance, store, {recipe.name: said})[recipe.name].hit
        assert at(store, recipe.name).description == "In other words"
        edited = replace(recipe, stages=(recipe.merge.model_copy(update={"ratio": 0.4}),))
        assert not register(instance, store, {recipe.name: edited})[recipe.name].hit
        assert at(store, recipe.name) == edited
        events = instance.fetch_materializations(dg.AssetKey("recipe"), limit=10).records
        assert len({e.asset_materialization.tags["dagster/data_version"] for e in events}) == len(events) == 2


# -- rooms ---------------------------------------------------------------------------------------------------------


def test_nothing_unsafe_is_ever_loaded():
    bad = ("torch.load(", "import pickle", "pickle.load", "yaml.load(", "trust_remote_code=True", "weights_only=False")
    for room in ("compression_dags", "assets", "resources", "benchmarks"):
        for path in (PROJECT / room).rglob("*.py"):
            found = [word for word in bad if word in path.read_text()]
            assert not found, (path, found)


def test_importing_the_definitions_imports_no_torch():
    code = (
        "import sys; from compression_dags.definitions import defs; import dagster as dg; "
        "d = defs(); d.resolve_asset_graph(); heavy = {'torch', 'transformers', 'lm_eval'} & set(sys.modules); "
        "sys.exit(f'heavy: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-2000:]


# -- Dagster's own surface -------------------------------------------------------------------------------------


def test_sensor_registers_new_models_once(tmp_path):
    watched = tmp_path / "watched"
    shutil.copytree(PROJECT / "models" / "stories260k", watched / "new-model")
    definitions = whole_graph(tmp_path / "home", device="cpu", watch=str(watched))
    sensor = definitions.resolve_sensor_def("new_base_models")
    repository = definitions.get_repository_def()
    with dg.instance_for_test() as instance:
        context = dg.build_sensor_context(instance=instance, repository_def=repository)
        tick = sensor(context)
        assert [r.partition_key for r in tick.run_requests] == ["new-model"]
        assert tick.dynamic_partitions_requests[0].partition_keys == ["new-model"]
        instance.add_dynamic_partitions("base_model", ["new-model"])
        again = sensor(dg.build_sensor_context(instance=instance, repository_def=repository))
        assert isinstance(again, dg.SkipReason)


def test_schedule_asks_for_what_the_store_lacks(home, first, tmp_path, monkeypatch):
    """A recipe that was run asks for nothing; one that does not fit the model is named, and the others are run."""
    run(home, small_recipes("shortgpt-20"), ["heldout_stories"], summary=False)
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(tmp_path))
    sizes = "calibration: {sequences: 24, length: 128, samples: 256}\nevaluate: [heldout_stories]\n"
    for name, stage in {
        "shortgpt-20": "merge: {method: shortgpt, ratio: 0.2}",
        "reverse-40": "merge: {method: reverse, ratio: 0.4}",
        "sparse": "sparsify: {method: magnitude, pattern: '7:11'}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\n{sizes}stages: [{stage}]\n")
    definitions = whole_graph(home, device="cpu")
    schedule = definitions.resolve_schedule_def("recompress_monthly")
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("base_model", ["stories260k"])
        context = dg.build_schedule_context(
            instance=instance,
            scheduled_execution_time=datetime.datetime(2026, 1, 1, 3),
            repository_def=definitions.get_repository_def(),
        )
        requests = schedule.evaluate_tick(context).run_requests
    assert [str(r.partition_key) for r in requests] == ["stories260k|reverse-40"]
    assert {k.to_user_string() for k in requests[0].asset_selection} == {
        "merge_plan",
        "merged_weights",
        "compressed_model",
        eval_key("heldout_stories"),
        "samples",
        "scorecard",
    }


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE"])
def test_the_leaderboard_follows_a_run_however_it_ended(status, definitions):
    repository = definitions.get_repository_def()
    sensor = definitions.resolve_sensor_def(f"summarise_after_{status.lower()}")
    job = repository.get_job("compress")
    pair = {"dagster/partition/base_model": "a-model", "dagster/partition/recipe": "a-recipe"}
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("base_model", ["a-model"])
        for tags, wanted in ((pair, "a-model"), ({}, None), ({"dagster/partition": "a-model"}, None)):
            run = instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus[status])
            event = DagsterEvent(f"PIPELINE_{status}", job.name)
            context = dg.build_run_status_sensor_context(sensor.name, event, instance, run)
            assert getattr(sensor(context), "partition_key", None) == wanted
