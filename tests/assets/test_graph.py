"""The asset graph: how recipes become assets, rooms stay apart, reruns reuse, the UI's queries answer."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest
from dagster import DagsterEvent

from compression_dags.calibration.corpora import Calibration
from compression_dags.definitions import Graph, Settings, build_graph, evaluation_book
from compression_dags.paths import PROJECT
from compression_dags.recipes import load_recipes

RECIPES = PROJECT / "recipes"


def small_recipes(*names: str) -> dict:
    """Shipped recipes with a calibration that takes a second."""
    tiny = Calibration(sequences=24, length=128, samples=256)
    shipped = load_recipes(RECIPES)
    return {n: replace(shipped[n], calibration=tiny) for n in names}


def graph_of(home: Path, recipes: dict) -> Graph:
    return build_graph(recipes, evaluation_book(RECIPES), Settings(home, device="cpu"))


def run(home: Path, recipes: dict, names=None, tasks=("heldout_stories",), model="stories260k"):
    """Materialize in this process on a throw-away Dagster instance; asset key → (cache, fingerprint)."""
    from compression_dags.assets.base_models import base_models
    from compression_dags.resources.model_hub import ModelHub

    hub = ModelHub(home=str(home))
    source = hub.resolve(model)
    hub.register(source)
    graph = graph_of(home, recipes)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(base_models.name, [source.slug])
        result = graph.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key=source.slug,
            asset_selection=graph.keys(list(names or recipes), list(tasks)),
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    events = [e for e in result.all_events if e.is_step_materialization]
    return {
        e.asset_key.to_user_string(): (
            e.materialization.metadata["cache"].value,
            e.materialization.metadata["fingerprint"].value,
        )
        for e in events
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home):
    return run(home, small_recipes("shortgpt-20", "shortgpt-20-ls"))


def test_all_recipes_load():
    graph = graph_of(Path("/nonexistent"), load_recipes(RECIPES))
    dg.Definitions.validate_loadable(graph.definitions)
    keys = {k.to_user_string() for k in graph.definitions.resolve_asset_graph().get_all_asset_keys()}
    assert {"base_model", "leaderboard", "decision_ledger", "baseline/scorecard", "shortgpt_20/merge_plan"} <= keys
    assert "c4_sample_128x2048/similarity_angular" in keys and "angular_20_ls_rtn_w4/quantized_weights" in keys


def test_edges_follow_the_stages():
    graph = graph_of(Path("/nonexistent"), load_recipes(RECIPES)).definitions.resolve_asset_graph()

    def parents(*path):
        return {k.to_user_string() for k in graph.get(dg.AssetKey(list(path))).parent_keys}

    assert parents("angular_20_ls_rtn_w4", "quantized_weights") == {"angular_20_ls_rtn_w4/recovered_weights"}
    assert parents("rtn_w4", "quantized_weights") == {"base_model"}
    assert parents("reverse_20", "merge_plan") == {"base_model"}
    assert parents("shortgpt_20", "merge_plan") == {"base_model", "c4_sample_128x2048/similarity_block_influence"}
    assert "shortgpt_20_ls/merged_weights" in parents("shortgpt_20_ls", "recovered_weights")
    assert "baseline/scorecard" in parents("shortgpt_20", "scorecard")


def test_every_asset_is_described_grouped_and_versioned():
    graph = graph_of(Path("/nonexistent"), load_recipes(RECIPES)).definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description and node.code_version and node.group_name != "default", key
    pools = {k.path[-1]: graph.get(k).pools for k in graph.get_all_asset_keys()}
    for name in ("calibration_activations", "merged_weights", "recovered_weights", "quantized_weights"):
        assert pools[name] == {"gpu"}


def test_one_stage_s_options_change_one_stage_s_version():
    def versions(ratio):
        recipe = small_recipes("shortgpt-20-ls")["shortgpt-20-ls"]
        merge = recipe.merge.model_copy(update={"ratio": ratio})
        recipes = {recipe.name: replace(recipe, stages=(merge, *recipe.recoveries))}
        graph = graph_of(Path("/nonexistent"), recipes).definitions.resolve_asset_graph()
        return {k: graph.get(k).code_version for k in graph.get_all_asset_keys()}

    a, b = versions(0.2), versions(0.3)
    assert [k.to_user_string() for k in a if a[k] != b[k]] == ["shortgpt_20_ls/merge_plan"]


def test_first_run_computes_and_shares_the_equal_prefix(first):
    assert first["base_model"][0] == "computed"
    # equal plans are one artifact: of the two recipes' plans and merged weights the second is a hit
    for name in ("merge_plan", "merged_weights"):
        assert sorted([first[f"shortgpt_20/{name}"][0], first[f"shortgpt_20_ls/{name}"][0]]) == ["computed", "hit"]
    assert first["shortgpt_20_ls/recovered_weights"][0] == "computed"


def test_merging_wing_shares_one_pass_and_recoveries_follow_one_another(tmp_path):
    """Methods that measure get tokens and a device; three plans are three checkpoints; each recovery is an asset."""
    recipes = small_recipes("mka-20", "come-20", "shortgpt-20-sweep-distill")
    chain = recipes["shortgpt-20-sweep-distill"]
    quick = {"tokens": 2048, "batch_tokens": 256, "length": 64, "held_windows": 4, "logit_lr": 50.0, "hidden_lr": 50.0}
    distill = chain.stages[2].model_copy(update=quick)
    recipes[chain.name] = replace(chain, stages=(*chain.stages[:2], distill))
    found = run(tmp_path, recipes)
    passes = [k for k in found if k.endswith("calibration_activations")]
    assert len(passes) == 1 and {k.split("/")[1] for k in found if "similarity" in k} == {
        "similarity_block_influence",
        "similarity_angular",
        "similarity_npib",
        "similarity_cka",
    }
    slugs = ("mka_20", "come_20", "shortgpt_20_sweep_distill")
    for name in ("merge_plan", "merged_weights"):
        assert len({found[f"{slug}/{name}"][1] for slug in slugs}) == 3
    store = tmp_path / "artifacts"
    weights = [
        store / "merged_weights" / found[f"{s}/merged_weights"][1] / "checkpoint/model.safetensors" for s in slugs
    ]
    assert len({path.read_bytes() for path in weights}) == 3
    ledgers = [store / "merge_plan" / found[f"{s}/merge_plan"][1] / "decisions.parquet" for s in slugs]
    assert len({path.read_bytes() for path in ledgers}) == 3
    # a learning rate of 50 ruins every part: all are rejected, and the pipeline goes on with the unrecovered weights
    first, second = (
        store / "recovered_weights" / found[f"shortgpt_20_sweep_distill/recovered_weights{n}"][1] for n in ("", "_2")
    )
    assert set(pd.read_parquet(second / "decisions.parquet")["action"]) == {"reject"}
    assert (first / "checkpoint/model.safetensors").read_bytes() == (
        second / "checkpoint/model.safetensors"
    ).read_bytes()
    assert "shortgpt_20_sweep_distill/scorecard" in found


def test_second_run_is_all_hits_even_with_a_fresh_dagster_instance(home, first):
    again = run(home, small_recipes("shortgpt-20", "shortgpt-20-ls"))
    assert {k: c for k, (c, _) in again.items() if c != "hit"} == {}
    assert {k: f for k, (_, f) in again.items()} == {k: f for k, (_, f) in first.items()}


def test_another_ratio_computes_only_from_the_plan_on(home, first):
    recipes = small_recipes("shortgpt-20", "shortgpt-20-ls", "shortgpt-30")
    merge = recipes["shortgpt-30"].merge.model_copy(update={"ratio": 0.4})
    recipes["shortgpt-30"] = replace(recipes["shortgpt-30"], stages=(merge,))
    found = run(home, recipes, names=["shortgpt-30"])
    computed = {k for k, (cache, _) in found.items() if cache == "computed"}
    family = {
        f"shortgpt_30/{n}" for n in ("merge_plan", "merged_weights", "eval_heldout_stories", "samples", "scorecard")
    }
    assert computed == family | {"leaderboard", "decision_ledger"}
    assert found["c4_sample_24x128_n256/calibration_activations"][0] == "hit"


def test_handles_are_what_travels(home, first):
    handles = [json.loads(p.read_text()) for p in (home / "handles").rglob("*.json")]
    assert handles and all(set(h) - {"recipe"} == {"kind", "fingerprint"} for h in handles)


def test_ledger_explains_every_layer(home, first):
    import pandas as pd

    from compression_dags.provenance.decisions import LEDGER_COLUMNS
    from compression_dags.resources.artifact_store import ArtifactStore

    artifact = ArtifactStore(home=str(home)).recall(dg.AssetKey(["decision_ledger"]), "stories260k")
    ledger = pd.read_parquet(artifact.path / "ledger.parquet")
    assert list(ledger.columns) == LEDGER_COLUMNS
    rows = ledger[(ledger.recipe == "shortgpt-20") & (ledger.stage == "merge")]
    assert len(rows) == 5 and (rows.action == "drop").sum() == 1 and rows.value.notna().all()
    assert (ledger[ledger.recipe == "shortgpt-20-ls"].stage == "recover").sum() == 1


def test_bad_weights_fail_in_base_model_and_harm_nothing(home, first, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "broken"
    shutil.copytree(PROJECT / "models" / "stories260k", bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"model\.norm\.weight"):
        run(home, small_recipes("reverse-20"), model=str(bad))
    found = run(home, small_recipes("shortgpt-20", "shortgpt-20-ls"), names=["shortgpt-20"])
    assert {k for k, (c, _) in found.items() if c != "hit"} <= {"leaderboard", "decision_ledger"}


# -- rooms -----------------------------------------------------------------------------------------------------


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_science_imports_no_dagster_assets_or_resources():
    outside = {"assets", "resources", "cli"}
    for path in (PROJECT / "compression_dags").rglob("*.py"):
        room = path.relative_to(PROJECT / "compression_dags").parts[0]
        if room in outside or room == "definitions.py":
            continue
        outer = {
            n for n in imports_of(path) if n.split(".")[0] == "dagster" or n.split(".")[1:2] in [[o] for o in outside]
        }
        assert not outer, (path, outer)


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
    import shutil

    watched = tmp_path / "watched"
    shutil.copytree(PROJECT / "models" / "stories260k", watched / "new-model")
    settings = Settings(tmp_path / "home", device="cpu", watch=str(watched))
    graph = build_graph(small_recipes("reverse-20"), evaluation_book(RECIPES), settings)
    sensor = graph.definitions.resolve_sensor_def("new_base_models")
    repository = graph.definitions.get_repository_def()
    with dg.instance_for_test() as instance:
        context = dg.build_sensor_context(instance=instance, repository_def=repository)
        tick = sensor(context)
        assert [r.partition_key for r in tick.run_requests] == ["new-model"]
        assert tick.dynamic_partitions_requests[0].partition_keys == ["new-model"]
        instance.add_dynamic_partitions("base_model", ["new-model"])
        again = sensor(dg.build_sensor_context(instance=instance, repository_def=repository))
        assert isinstance(again, dg.SkipReason)


def test_schedule_asks_for_every_model(tmp_path):
    import datetime

    graph = graph_of(tmp_path, small_recipes("reverse-20"))
    schedule = graph.definitions.resolve_schedule_def("recompress_monthly")
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("base_model", ["a", "b"])
        when = datetime.datetime(2026, 1, 1, 3)
        context = dg.build_schedule_context(
            instance=instance, scheduled_execution_time=when, repository_def=graph.definitions.get_repository_def()
        )
        assert [r.partition_key for r in schedule.evaluate_tick(context).run_requests] == ["a", "b"]


def test_jobs_exist_for_every_recipe(tmp_path):
    jobs = set(graph_of(tmp_path, load_recipes(RECIPES)).definitions.get_repository_def().job_names)
    assert {"compress_all", "evaluate_all", "summarise", "compress_shortgpt_20", "compress_rtn_w4"} <= jobs


def test_the_leaderboard_follows_a_recipe_s_job(tmp_path):
    graph = graph_of(tmp_path, small_recipes("reverse-20"))
    repository = graph.definitions.get_repository_def()
    sensor = graph.definitions.resolve_sensor_def("summarise_recipes")
    job = repository.get_job("compress_reverse_20")
    assert not {k.to_user_string() for k in job.asset_layer.selected_asset_keys} & {"leaderboard", "decision_ledger"}
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("base_model", ["a-model"])
        for tags, wanted in (({"dagster/partition": "a-model"}, "a-model"), ({}, None)):
            run = instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.SUCCESS)
            event = DagsterEvent("PIPELINE_SUCCESS", job.name)
            context = dg.build_run_status_sensor_context("summarise_recipes", event, instance, run)
            found = sensor(context)
            assert getattr(found, "partition_key", None) == wanted
