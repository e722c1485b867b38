"""`compression-dags why`: the story of one layer in words, from stored artifacts alone."""

from __future__ import annotations

from pathlib import Path

from compression_dags.assets.partitions import Place
from compression_dags.assets.recipe import at
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.results import known_slug
from compression_dags.errors import InputError
from compression_dags.recipes import load_recipes, pick_recipes
from compression_dags.recipes.pipeline import steps_of
from compression_dags.reports.story import Story, decided_names, story, subject_of
from compression_dags.resources.artifact_store import RECIPE, ArtifactStore
from compression_dags.step import BASE


def tell(home: Path, model: str, recipe: str, layer: str) -> tuple[str, Story]:
    """The model's slug, and the story of one of its layers or modules in a recipe.

    Raises:
        InputError: an unknown model, recipe or layer, naming the known ones; or a recipe that was not run.
    """
    slug, store = known_slug(home, model), ArtifactStore(home=str(home))
    if store.recall(RECIPE, recipe) is None:
        pick_recipes(load_recipes(), [recipe])
        raise InputError(f"recipe {recipe} was not run on {slug}: compression-dags run -m {slug} -r {recipe}")
    own = [name for name, step in steps_of(at(store, recipe)).items() if step.stage is not None and _decides(name)]
    base = store.recall(BASE, slug)
    steps = [(name, store.recall(name, str(Place(slug, recipe)))) for name in own]
    if base is None or (steps and not any(artifact for _, artifact in steps)):
        raise InputError(f"recipe {recipe} was not run on {slug}: compression-dags run -m {slug} -r {recipe}")
    checkpoint = Checkpoint(base.checkpoint)
    return slug, story(subject_of(layer, checkpoint, slug, decided_names(steps)), checkpoint, steps)


def _decides(name: str) -> bool:
    return not name.startswith(("calibration_", "similarity_"))
