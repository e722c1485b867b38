"""An edited recipe: exactly its partitions become stale, and one run makes them anew from the plan on."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from compression_dags.assets.base_models import import_base_model
from compression_dags.assets.partitions import Place
from compression_dags.assets.publishing import report
from compression_dags.assets.registration import register_home
from compression_dags.cli.session import execute
from compression_dags.definitions import Settings, build
from compression_dags.recipes import load_recipes
from compression_dags.recipes.pipeline import steps_of
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.model_hub import ModelHub
from compression_dags.step import BASE

RECIPE = """name: {name}
description: {about}
calibration: {{sequences: 8, length: 64, samples: 64}}
stages: [merge: {{method: shortgpt, ratio: {ratio}}}]
"""
MODELS, EDITED = ("stories260k", "other"), "cut-a"
RECIPES = (EDITED, "cut-a-b")


def say(folder: Path, name: str, ratio: float, about: str = "first words") -> None:
    (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, ratio=ratio, about=about))


def statuses(instance: dg.DagsterInstance, definitions: dg.Definitions, asset: str) -> dict[str, str]:
    """Partition → what the UI asks for as `staleStatus(partition:)`."""
    graph = definitions.resolve_asset_graph()
    asked = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    places = [str(Place(model, recipe)) for model in MODELS for recipe in RECIPES]
    return {place: asked.get_status(dg.AssetKey(asset), place).value for place in places}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "recipes"
    path.mkdir()
    for name in RECIPES:
        say(path, name, 0.2)
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(path))
    return path


def test_an_edited_ratio_makes_exactly_its_partitions_stale(tmp_path, folder):
    home, settings = tmp_path / "home", Settings(tmp_path / "home", device="cpu")
    definitions, store, hub = build([], settings), ArtifactStore(home=str(home)), ModelHub(home=str(home))
    sensor = definitions.resolve_sensor_def("recipes_changed")
    with dg.DagsterInstance.ephemeral() as instance:

        def tick() -> str:
            said = sensor(dg.build_sensor_context(instance=instance, repository_def=definitions.get_repository_def()))
            assert isinstance(said, dg.SkipReason)
            return str(said.skip_message)

        def run(model: str, recipe: str) -> dict[str, str]:
            assets = list(steps_of(load_recipes()[recipe]))
            said = execute(instance, definitions, Place(model, recipe).key, assets, settings)
            return {asset: metadata["cache"] for asset, metadata in said.items()}

        instance.add_dynamic_partitions("base_model", list(MODELS))
        imported = {name: import_base_model(store, hub, hub.resolve("stories260k", name)) for name in MODELS}
        report(instance, BASE, imported)
        assert tick() == "changed: baseline, cut-a-b, cut-a"
        assert set(statuses(instance, definitions, "merge_plan").values()) == {"MISSING"}
        for model in MODELS:
            for recipe in RECIPES:
                run(model, recipe)
        for asset in ("merge_plan", "merged_weights", "calibration_tokens"):
            assert set(statuses(instance, definitions, asset).values()) == {"FRESH"}, asset

        say(folder, "cut-a-b", 0.2, about="other words")
        assert tick() == "3 recipes are as they were"
        say(folder, EDITED, 0.4)
        assert tick() == f"changed: {EDITED}"
        edited = {str(Place(model, EDITED)) for model in MODELS}
        found = statuses(instance, definitions, "merge_plan")
        assert {place for place, status in found.items() if status == "STALE"} == edited, found
        assert set(found.values()) == {"STALE", "FRESH"}

        first, second = (run(model, EDITED) for model in MODELS)
        assert {asset for asset, state in first.items() if state == "computed"} == {"merge_plan", "merged_weights"}
        assert set(second.values()) == {"hit"}  # the same weights under another name
        for asset in ("merge_plan", "merged_weights"):
            assert set(statuses(instance, definitions, asset).values()) == {"FRESH"}, asset


def test_a_recipe_that_is_a_partition_follows_its_file_though_it_is_not_shown(tmp_path, folder):
    """A study or a derived recipe that somebody ran; keys without a recipe are left alone."""
    home = str(tmp_path / "home")
    store, derived = ArtifactStore(home=home), f"{EDITED}@16x64"
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("recipe", [derived, "gone", f"{EDITED}@1x1"])
        first = register_home(instance, store, ModelHub(home=home))
        assert set(first) == {"baseline", *RECIPES, derived}
        say(folder, EDITED, 0.4)
        again = register_home(instance, store, ModelHub(home=home))
        assert {name for name, produced in again.items() if not produced.hit} == {EDITED, derived}
