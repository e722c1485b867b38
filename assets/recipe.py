"""`recipe`: a recipe as data, so that a changed file makes exactly its own partitions stale."""

import json
from collections.abc import Mapping
from dataclasses import replace

import dagster as dg

from compression_dags.assets.partitions import RECIPES
from compression_dags.assets.publishing import publish, report
from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.recipes import Recipe, find_recipe, load_recipes, recipe_of
from compression_dags.resources.artifact_store import RECIPE, ArtifactStore, Produced, Workplace

VERSION = "1"
FILE = "recipe.json"


@dg.asset(
    name=RECIPE,
    partitions_def=RECIPES,
    group_name="inputs",
    kinds={"yaml"},
    code_version=VERSION,
    description="A recipe with every default written out, and the version of each of its methods. The uncompressed "
    "model is the recipe `baseline`, which has no stages.",
)
def recipe(context: dg.AssetExecutionContext, store: ArtifactStore) -> dg.MaterializeResult:
    name = context.partition_key
    found = find_recipe(load_recipes(), name)
    if found is None:
        stored = store.recall(RECIPE, name)
        if stored is None:
            raise InputError(f"no recipe file is named {name!r}")
        found = read(stored)
    return publish(store, RECIPE, name, make(store, found, context.run_id), recipe=found.as_run())


def make(store: ArtifactStore, recipe: Recipe, run_id: str = "") -> Produced:
    """The artifact of a recipe: its stages, options, defaults and versions as one JSON file."""
    said = json.loads(json.dumps(recipe.as_run()))
    del said["description"]  # words decide nothing: they are in the handle

    def build(work: Workplace) -> dict:
        (work.out / FILE).write_text(json.dumps(said, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return {"stages": " → ".join(f"{s.stage}:{s.method}" for s in recipe.stages) or "none"}

    return store.produce(Request(RECIPE, VERSION, said, {}), build, run_id)


def read(artifact: Artifact) -> Recipe:
    """The recipe that an artifact holds, with the description that its handle has."""
    if artifact.recipe:
        return recipe_of(artifact.recipe)
    return recipe_of({"description": ""} | json.loads((artifact.path / FILE).read_text(encoding="utf-8")))


def at(store: ArtifactStore, name: str) -> Recipe:
    """The recipe that a partition is.

    Raises:
        InputError: the partition was not materialized yet.
    """
    artifact = store.recall(RECIPE, name)
    if artifact is None:
        raise InputError(f"recipe {name} is not in the store; materialize `recipe` of {name} first")
    return read(artifact)


def register(instance: dg.DagsterInstance, store: ArtifactStore, recipes: Mapping[str, Recipe]) -> dict[str, Produced]:
    """Name → artifact of each recipe, whose partitions Dagster knows from here on."""
    missing = set(recipes) - set(instance.get_dynamic_partitions(RECIPES.name or ""))
    if missing:
        instance.add_dynamic_partitions(RECIPES.name or "", sorted(missing))
    found = {}
    for name, each in recipes.items():
        found[name] = produced = make(store, each)
        store.remember(RECIPE, name, replace(produced.artifact, recipe=each.as_run()))
    report(instance, RECIPE, found)
    return found
