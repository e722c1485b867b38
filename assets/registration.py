"""A home's base models and recipes as partitions that Dagster knows."""

import dagster as dg

from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.assets.publishing import report
from compression_dags.assets.recipe import register
from compression_dags.recipes import BASELINE, BASELINE_RECIPE, shown_recipes
from compression_dags.resources.artifact_store import ArtifactStore, Produced
from compression_dags.resources.model_hub import ModelHub
from compression_dags.step import BASE


def register_home(instance: dg.DagsterInstance, store: ArtifactStore, hub: ModelHub) -> dict[str, Produced]:
    """Name → artifact of the baseline and of each recipe that is shown, once Dagster knows them and the base models.

    Of the registered base models those count that are imported; a home that is older than its Dagster gets them back.

    Raises:
        InputError: the recipes folder cannot be read.
    """
    stored = {slug: artifact for slug in hub.registered() if (artifact := store.recall(BASE, slug))}
    if missing := set(stored) - set(instance.get_dynamic_partitions(BASE_MODELS.name or "")):
        instance.add_dynamic_partitions(BASE_MODELS.name or "", sorted(missing))
    report(instance, BASE, {slug: Produced(artifact, True, 0.0) for slug, artifact in stored.items()})
    return register(instance, store, {BASELINE: BASELINE_RECIPE, **shown_recipes()})
