"""Which assets a recipe takes on a base model, and which of them the store lacks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression_dags.assets.evaluation import SAMPLES, eval_key
from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import Place
from compression_dags.assets.scorecard import SCORECARD
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.evaluation.tasks import Task, TaskBook, evaluation_book
from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.recipes import BASELINE, BASELINE_RECIPE, Recipe, recipes_folder, shown_recipes
from compression_dags.recipes.pipeline import steps_of
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Evaluator
from compression_dags.resources.runner import stored_steps
from compression_dags.resources.scoring import evaluation_request, samples_request
from compression_dags.step import BASE


def selection(recipe: Recipe, tasks: Sequence[str]) -> list[str]:
    """Assets of a run of one recipe, in order: only what it has steps for, and what is asked of its result."""
    return [*steps_of(recipe), COMPRESSED, *(eval_key(task) for task in tasks), SAMPLES, SCORECARD]


def names_of_tasks(book: TaskBook, recipe: Recipe, slug: str) -> list[str]:
    """Tasks that a recipe is scored by on a base model: its own, else the model's default suite."""
    return [task.name for task in book.resolve(list(recipe.evaluate) or book.default_names(slug))]


@dataclass(frozen=True)
class Foreseen:
    """An asset of a run to be.

    Attributes:
        fingerprint: equal for assets that are the same artifact, whether it is stored or not.
        artifact: None if it is to be made.
    """

    asset: str
    fingerprint: str
    artifact: Artifact | None

    @property
    def stored(self) -> bool:
        return self.artifact is not None

    @property
    def digest(self) -> str:
        """The artifact's, or what stands for it while nobody knows it."""
        return self.artifact.digest if self.artifact else self.fingerprint


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
        """The recipes that a schedule runs, without those that name a text which is not there.

        The baseline comes first: the others are measured against it.
        """
        found = shown_recipes()
        found.resolve(lambda: evaluation_book(recipes_folder()))
        return {BASELINE: BASELINE_RECIPE, **found}

    def outstanding(self, slug: str, recipes: Mapping[str, Recipe]) -> Iterator[tuple[Recipe, list[str] | str]]:
        """Recipes of which a base model lacks something, each with the assets of its run; or why it cannot work."""
        base, book = self.store.recall(BASE, slug), evaluation_book(recipes_folder())
        shape = Checkpoint(base.checkpoint).shape if base else None
        for recipe in recipes.values():
            try:
                if shape:
                    recipe.check(shape)
            except InputError as error:
                yield recipe, str(error)
                continue
            tasks = [name for name in names_of_tasks(book, recipe, slug) if name in self.tasks]
            if not all(each.stored for each in self.foreseen(recipe, tasks, base, slug)):
                yield recipe, selection(recipe, tasks)

    def foreseen(self, recipe: Recipe, tasks: Sequence[str], base: Artifact | None, slug: str) -> list[Foreseen]:
        """Every asset of a run but `compressed_model`, which is one of the others.

        Args:
            base: the imported base model; None if it is not stored.
        """
        numeric, weights, found = self.accelerator.numeric, base.digest if base else BASE, list[Foreseen]()
        for step, fingerprint, artifact in stored_steps(self.store, steps_of(recipe).values(), base, numeric):
            found.append(Foreseen(step.name, fingerprint, artifact))
            weights = (artifact.digest if artifact else fingerprint) if step.weights else weights
        card = {"weights": weights}
        for name in tasks:
            task = self.tasks[name]
            found.append(
                self._requested(
                    eval_key(name), evaluation_request(task, weights, self.evaluator.data_digest(task), numeric)
                )
            )
            card[name] = found[-1].digest
        found.append(self._requested(SAMPLES, samples_request(weights, numeric)))
        card[SAMPLES] = found[-1].digest
        held = self.store.recall(SCORECARD, str(Place(slug, recipe.name)))
        present = held and all(held.inputs.get(role) == digest for role, digest in card.items())
        return [*found, Foreseen(SCORECARD, str(Place(slug, recipe.name)), held if present else None)]

    def _requested(self, asset: str, request: Request) -> Foreseen:
        return Foreseen(asset, request.fingerprint, self.store.manifest_of(request.kind, request.fingerprint))
