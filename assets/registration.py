"""A home's base models and recipes as partitions that Dagster knows."""

import contextlib

import dagster as dg

from compression_dags.assets.partitions import BASE_MODELS, RECIPES
from compression_dags.assets.publishing import report
from compression_dags.assets.recipe import register
from compression_dags.errors import InputError
from compression_dags.recipes import BASELINE, BASELINE_RECIPE, Recipe, find_recipe, load_recipes, shown_recipes
from compression_dags.resources.artifact_store import ArtifactStore, Produced
from compression_dags.resources.model_hub import ModelHub
from compression_dags.step import BASE


def register_home(instance: dg.DagsterInstance, store: ArtifactStore, hub: ModelHub) -> dict[str, Produced]:
    """Name → artifact of each recipe that is shown or a partition already, once Dagster knows them and the base models.

    Of the registered base models those count that are imported; a home that is older than its Dagster gets them back.

    Raises:
        InputError: the recipes folder cannot be read.
    """
    stored = {slug: artifact for slug in hub.registered() if (artifact := store.recall(BASE, slug))}
    if missing := set(stored) - set(instance.get_dynamic_partitions(BASE_MODELS.name or "")):
        instance.add_dynamic_partitions(BASE_MODELS.name or "", sorted(missing))
    report(instance, BASE, {slug: Produced(artifact, True, 0.0) for slug, artifact in stored.items()})
    recipes, kept = load_recipes(), dict[str, Recipe]()
    for name in instance.get_dynamic_partitions(RECIPES.name or ""):  # studies that somebody ran, too
        with contextlib.suppress(InputError):  # a key that a person typed
            if recipe := find_recipe(recipes, name):
                kept[name] = recipe
    return register(instance, store, {BASELINE: BASELINE_RECIPE, **shown_recipes(), **kept})
