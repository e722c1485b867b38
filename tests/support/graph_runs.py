"""Runs of the real asset graph in this process, on a throw-away Dagster instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import dagster_caches

from compression_dags.assets.partitions import BASE_MODELS, Place
from compression_dags.assets.recipe import register
from compression_dags.assets.selection import selection
from compression_dags.assets.summary import LEADERBOARD, LEDGER
from compression_dags.calibration.corpora import Calibration
from compression_dags.definitions import Settings, build
from compression_dags.evaluation.tasks import evaluation_book
from compression_dags.paths import PROJECT
from compression_dags.recipes import BASELINE_RECIPE, Recipe, load_recipes
from compression_dags.resources.model_hub import ModelHub

dagster_caches.install()
RECIPES = PROJECT / "recipes"
#: A text of a few hundred tokens to score on, where the score does not matter.
CAT = Path(__file__).with_name("cat.txt")
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
#: Recipe, or `base_model` and `summary` → asset → metadata and `data_version`.
Found = dict[str, dict[str, dict[str, Any]]]


def small_recipes(*names: str) -> dict[str, Recipe]:
    """Shipped recipes with a calibration that takes a second."""
    tiny = Calibration(sequences=24, length=128, samples=256)
    shipped = load_recipes(RECIPES)
    return {name: replace(shipped[name], calibration=tiny) for name in names}


def definitions_of(home: Path, tasks: Sequence[str], more: Mapping[str, Any] | None = None) -> dg.Definitions:
    """The graph on a home, with the resources in `more` instead of its own."""
    made = build(evaluation_book(RECIPES).resolve(list(tasks)), Settings(home, device="cpu"))
    if not more:
        return made
    resources = {**(made.resources or {}), **more}
    return dg.Definitions(assets=made.assets, resources=resources, executor=dg.in_process_executor)


def run(
    home: Path,
    recipes: Mapping[str, Recipe],
    tasks: Sequence[str] = (str(CAT),),
    model: str = "stories260k",
    more: Mapping[str, Any] | None = None,
    summary: bool = True,
) -> Found:
    """What one run a recipe, the baseline's first, materializes; then leaderboard and ledger."""
    hub = ModelHub(home=str(home))
    source = hub.resolve(model)
    hub.register(source)
    definitions = definitions_of(home, tasks, more)
    job = definitions.resolve_implicit_global_asset_job_def()
    names = [task.name for task in evaluation_book(RECIPES).resolve(list(tasks))]
    store = (definitions.resources or {})["store"]
    every = {BASELINE_RECIPE.name: BASELINE_RECIPE, **recipes}
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(BASE_MODELS.name or "", [source.slug])

        def execute(partition: str, assets: Sequence[str]) -> dict[str, dict[str, Any]]:
            result = job.execute_in_process(
                instance=instance,
                partition_key=partition,
                asset_selection=[dg.AssetKey(name) for name in assets],
                run_config=QUIET,
            )
            events = [e for e in result.all_events if e.is_step_materialization]
            return {e.asset_key.to_user_string(): _said(e.materialization) for e in events}

        found = {"base_model": execute(source.slug, ["base_model"])}
        register(instance, store, every)
        for name, recipe in every.items():
            found[name] = execute(Place(source.slug, name).key, selection(recipe, names))
        if summary:
            found["summary"] = execute(source.slug, [LEADERBOARD, LEDGER])
    return found


def _said(materialization: Any) -> dict[str, Any]:
    said = {name: value.value for name, value in materialization.metadata.items()}
    return said | {"data_version": materialization.tags["dagster/data_version"]}


def states(found: Found, state: str) -> set[str]:
    """`<recipe>/<asset>` of what came in one state: computed, hit or rebuilt."""
    return {f"{r}/{asset}" for r, assets in found.items() for asset, said in assets.items() if said["cache"] == state}
