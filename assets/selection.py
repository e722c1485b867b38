"""Which assets a recipe takes on a base model, and which of them the store lacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from compression_dags.assets.evaluation import SAMPLES, eval_key, evaluation_request, samples_request
from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import Place
from compression_dags.assets.scorecard import SCORECARD
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.evaluation.tasks import Task, TaskBook, evaluation_book
from compression_dags.provenance.artifacts import Artifact
from compression_dags.recipes import BASELINE, BASELINE_RECIPE, Recipe, recipes_folder, shown_recipes
from compression_dags.recipes.pipeline import last_weights, steps_of
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Evaluator
from compression_dags.resources.runner import stored_steps
from compression_dags.step import BASE


def selection(recipe: Recipe, tasks: Sequence[str]) -> list[str]:
    """Assets of a run of one recipe, in order: only what it has steps for, and what is asked of its result."""
    return [*steps_of(recipe), COMPRESSED, *(eval_key(task) for task in tasks), SAMPLES, SCORECARD]


def names_of_tasks(book: TaskBook, recipe: Recipe, slug: str) -> list[str]:
    """Tasks that a recipe is scored by on a base model: its own, else the model's default suite."""
    return [task.name for task in book.resolve(list(recipe.evaluate) or book.default_names(slug))]


class Planner:
    """What is missing, by the store alone: fingerprints are followed from the base model as far as artifacts go.

    Args:
        tasks: those that have an asset.
        resources: `store`, `accelerator` and `evaluator`.
    """

    def __init__(self, tasks: Sequence[Task], resources: Mapping[str, Any]):
        self.tasks = {task.name: task for task in tasks}
        self.store: ArtifactStore = resources["store"]
        self.accelerator: Accelerator = resources["accelerator"]
        self.evaluator: Evaluator = resources["evaluator"]

    def recipes(self) -> Mapping[str, Recipe]:
        """The recipes that a schedule runs: the baseline first, as the others are measured against it."""
        return {BASELINE: BASELINE_RECIPE, **shown_recipes()}

    def wanted(self, recipe: Recipe, slug: str) -> list[str]:
        return [name for name in names_of_tasks(evaluation_book(recipes_folder()), recipe, slug) if name in self.tasks]

    def selection(self, recipe: Recipe, slug: str) -> list[str]:
        return selection(recipe, self.wanted(recipe, slug))

    def unfit(self, recipe: Recipe, slug: str) -> str | None:
        """Why a recipe cannot work on a base model; None if it can, or if the model is not stored."""
        base = self.store.recall(BASE, slug)
        try:
            recipe.check(Checkpoint(base.checkpoint).facts) if base else None
        except InputError as error:
            return str(error)
        return None

    def missing(self, recipe: Recipe, slug: str) -> list[str]:
        """Assets of a recipe on a base model that are not stored, or not noted as this partition's."""
        base = self.store.recall(BASE, slug)
        return [name for name, stored in self.stored(recipe, self.wanted(recipe, slug), base, slug) if not stored]

    def stored(
        self, recipe: Recipe, tasks: Sequence[str], base: Artifact | None, slug: str
    ) -> list[tuple[str, Artifact | None]]:
        """Every asset of a run with its artifact; None where it is to be made. The scorecard is left out."""
        numeric = self.accelerator.numeric
        found: dict[str, Artifact | None] = {}
        for step, artifact in stored_steps(self.store, steps_of(recipe).values(), base, numeric):
            found[step.name] = artifact
        weights = {BASE: base, **found}.get(last_weights(recipe))
        for name in tasks:
            request = weights and evaluation_request(
                self.tasks[name], weights, self.evaluator.data_digest(self.tasks[name]), numeric
            )
            found[eval_key(name)] = request and self.store.manifest_of(request.kind, request.fingerprint)
        request = weights and samples_request(weights, numeric)
        found[SAMPLES] = request and self.store.manifest_of(request.kind, request.fingerprint)
        card = self.store.recall(SCORECARD, str(Place(slug, recipe.name)))
        known = card and weights and card.inputs.get("weights") == weights.digest
        found[SCORECARD] = card if known else None
        return list(found.items())
