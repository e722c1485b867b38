"""The composition root: assets, resources, jobs, schedule, sensors. Imports no torch."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from compression_dags.assets.automation import automation
from compression_dags.assets.base_models import base_model
from compression_dags.assets.evaluation import evaluations
from compression_dags.assets.grid import grid_assets
from compression_dags.assets.planning import alternatives_asset
from compression_dags.assets.recipe import recipe
from compression_dags.assets.scorecard import scorecards
from compression_dags.assets.summary import decision_ledger, leaderboard
from compression_dags.calibration.corpora import Calibration
from compression_dags.errors import InputError
from compression_dags.evaluation.added import added_tasks
from compression_dags.evaluation.tasks import Task, TaskBook, evaluation_book
from compression_dags.planning.candidates import CandidateOptions
from compression_dags.recipes import Recipe, load_recipes, recipes_folder
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Evaluator
from compression_dags.resources.model_hub import ModelHub

logger = logging.getLogger("compression_dags")


@dataclass(frozen=True)
class Settings:
    """Where things lie and what computes.

    Attributes:
        home: artifact store, Dagster instance, imported models.
        device, dtype: for `Accelerator`.
        eval_data: folders with local evaluation tasks, separated by the path separator.
        watch: a folder of model directories, or a text file with one model reference a line; the sensor reads it.
    """

    home: Path
    device: str = "auto"
    dtype: str = "auto"
    eval_data: str = ""
    watch: str = ""

    @classmethod
    def from_environment(cls) -> "Settings":
        get = os.environ.get
        return cls(
            Path(get("COMPRESSION_DAGS_HOME") or Path.cwd() / ".compression_dags").absolute(),
            get("COMPRESSION_DAGS_DEVICE") or "auto",
            get("COMPRESSION_DAGS_DTYPE") or "auto",
            get("COMPRESSION_DAGS_EVAL_DATA") or "",
            get("COMPRESSION_DAGS_WATCH") or "",
        )

    def resources(self) -> dict[str, object]:
        home = str(self.home)
        return {
            "store": ArtifactStore(home=home),
            "hub": ModelHub(home=home),
            "accelerator": Accelerator(home=home, device=self.device, dtype=self.dtype),
            "evaluator": Evaluator(data_dirs=self.eval_data),
        }


def all_tasks(book: TaskBook, recipes: Sequence[Recipe] = (), extra: Sequence[Task] = ()) -> list[Task]:
    """Every task that has an asset: those of the book, those that recipes name, and those asked for by name.

    A recipe's task that does not resolve, or whose name another task has, is left out and said.
    """
    found: dict[str, Task] = {task.name: task for task in book.tasks.values()}
    for each in recipes:
        try:
            named = book.resolve(list(each.evaluate))
        except InputError as error:
            logger.warning("recipe %s: evaluate: %s", each.name, error)
            continue
        for task in named:
            if found.setdefault(task.name, task) != task:
                logger.warning("recipe %s: its task %r is another one than the graph's", each.name, task.name)
    for task in extra:
        if found.setdefault(task.name, task) != task:
            logger.warning("task %s of tasks.json is left out: a recipe has another task of that name", task.name)
    return list(found.values())


def build(tasks: Sequence[Task], settings: Settings) -> dg.Definitions:
    """The whole graph, for any number of base models and recipes: they are partitions."""
    jobs, schedules, sensors = automation(tasks, settings)
    return dg.Definitions(
        assets=[
            base_model,
            recipe,
            *grid_assets(),
            evaluations(tasks),
            scorecards(tasks),
            leaderboard,
            decision_ledger,
            alternatives_asset(Calibration.model_validate({}), CandidateOptions.model_validate({})),
        ],
        resources=settings.resources(),
        jobs=jobs,
        schedules=schedules,
        sensors=sensors,
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster's tools load: the recipes folder and the home of the environment."""
    settings = Settings.from_environment()
    book = evaluation_book(recipes_folder())
    return build(all_tasks(book, list(load_recipes().values()), added_tasks(settings.home, book)), settings)
