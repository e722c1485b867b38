"""`compression-dags why`: the story of one layer in words, from stored artifacts alone."""

from __future__ import annotations

from pathlib import Path

from compression_dags.assets.base_models import base_model
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.results import _graph, known_slug
from compression_dags.errors import InputError
from compression_dags.recipes import BASELINE, pick_recipes
from compression_dags.reports.story import Story, decided_names, story, subject_of
from compression_dags.resources.artifact_store import ArtifactStore


def tell(home: Path, model: str, recipe: str, layer: str) -> tuple[str, Story]:
    """The model's slug, and the story of one of its layers or modules in a recipe.

    Raises:
        InputError: an unknown model, recipe or layer, naming the known ones; or a recipe that was not run.
    """
    slug, store, graph = known_slug(home, model), ArtifactStore(home=str(home)), _graph()
    if recipe != BASELINE:
        pick_recipes(graph.recipes, [recipe])
    base = store.recall(base_model.key, slug)
    steps = [(key.path[-1], store.recall(key, slug)) for key in graph.families[recipe].stages]
    if base is None or (steps and not any(artifact for _, artifact in steps)):
        raise InputError(f"recipe {recipe} was not run on {slug}: compression-dags run -m {slug} -r {recipe}")
    checkpoint = Checkpoint(base.checkpoint)
    return slug, story(subject_of(layer, checkpoint, slug, decided_names(steps)), checkpoint, steps)
