"""The composition root: recipes → assets, resources, jobs, schedule, sensor. Imports no torch."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import dagster as dg

from compression_dags.assets.base_models import REFERENCE, base_model, base_models
from compression_dags.assets.calibration import SIMILARITIES, build_calibration_assets, calibration_key
from compression_dags.assets.families import Family, build_baseline, build_recipe_family
from compression_dags.assets.planning import NAME as ALTERNATIVES
from compression_dags.assets.planning import build_alternatives
from compression_dags.assets.summary import build_decision_ledger, build_leaderboard
from compression_dags.calibration.corpora import Calibration
from compression_dags.errors import InputError
from compression_dags.evaluation.added import added_tasks
from compression_dags.evaluation.tasks import Task, TaskBook, evaluation_book
from compression_dags.planning.options import CandidateOptions
from compression_dags.recipes import BASELINE, Recipe, load_recipes, recipes_folder
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore, HandleIO
from compression_dags.resources.evaluator import Evaluator
from compression_dags.resources.model_hub import ModelHub
from compression_dags.resources.model_imports import stamp_of

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
        store = ArtifactStore(home=home)
        return {
            "store": store,
            "hub": ModelHub(home=home),
            "accelerator": Accelerator(home=home, device=self.device, dtype=self.dtype),
            "evaluator": Evaluator(data_dirs=self.eval_data),
            "io_manager": HandleIO(store=store),
        }


@dataclass(frozen=True)
class Graph:
    """Everything that was built, for the CLI to select from."""

    definitions: dg.Definitions
    recipes: dict[str, Recipe]
    families: dict[str, Family]
    book: TaskBook

    SUMMARY = (dg.AssetKey(["leaderboard"]), dg.AssetKey(["decision_ledger"]))

    def keys(self, names: Sequence[str], tasks: Sequence[str]) -> list[dg.AssetKey]:
        """Assets of a run: the baseline, the named recipes, and the summaries over all."""
        chosen = [self.families[name] for name in (BASELINE, *names)]
        return list(dict.fromkeys([*(k for f in chosen for k in f.keys(tasks)), *self.SUMMARY]))


def build_graph(recipes: dict[str, Recipe], book: TaskBook, settings: Settings, extra: Sequence[Task] = ()) -> Graph:
    """All assets of all recipes. `extra` are tasks asked for on the command line, offered to every family.

    A recipe whose tasks do not resolve is left out and said, and so is an extra task whose name a recipe uses.
    """
    own, everything = _tasks_of_recipes(recipes, book)
    recipes = {name: recipe for name, recipe in recipes.items() if name in own}
    for task in extra:
        if everything.setdefault(task.name, task) != task:
            logger.warning("task %s of tasks.json is left out: a recipe has another task of that name", task.name)
    offered = [task for task in extra if everything[task.name] == task]
    families = {BASELINE: build_baseline(list(everything.values()))}
    families |= {
        name: build_recipe_family(recipe, list({t.name: t for t in [*own[name], *offered]}.values()))
        for name, recipe in recipes.items()
    }
    calibrations = _calibrations(recipes)
    assets = [
        base_model,
        *(a for c in calibrations for a in build_calibration_assets(c)),
        *(build_alternatives(c, CandidateOptions.model_validate({})) for c in calibrations),
        *(a for f in families.values() for a in f.assets),
        build_leaderboard({n: f.scorecard for n, f in families.items()}, _similarity_keys(calibrations)),
        build_decision_ledger({n: f.stages for n, f in families.items() if f.stages}),
    ]
    banks = [calibration_key(c, ALTERNATIVES) for c in calibrations]
    compress, summarise, evaluate, everything_job = _jobs(families, banks)
    definitions = dg.Definitions(
        assets=assets,
        resources=settings.resources(),
        jobs=[*compress, summarise, evaluate, everything_job],
        schedules=[_recompress_monthly(everything_job)],
        sensors=[_new_base_models(everything_job, settings), _summarise_recipes(compress, summarise)],
        executor=dg.in_process_executor,
    )
    return Graph(definitions, recipes, families, book)


def _tasks_of_recipes(recipes: dict[str, Recipe], book: TaskBook) -> tuple[dict[str, list[Task]], dict[str, Task]]:
    """Recipe → its tasks, and all tasks by name, which are the baseline's; without recipes that do not resolve."""
    defaults = book.resolve(sorted({task for suite in book.default_suites.values() for task in book.suites[suite]}))
    everything: dict[str, Task] = {task.name: task for task in defaults}
    own: dict[str, list[Task]] = {}
    for name, recipe in recipes.items():
        try:
            tasks = book.resolve(list(recipe.evaluate)) if recipe.evaluate else defaults
            for task in tasks:
                if everything.get(task.name, task) != task:
                    raise InputError(f"its task {task.name!r} is another one than that of the other recipes")
        except InputError as error:
            logger.warning("recipe %s is left out: evaluate: %s", name, error)
            continue
        everything |= {task.name: task for task in tasks}
        own[name] = list(tasks)
    return own, everything


def _calibrations(recipes: dict[str, Recipe]) -> list[Calibration]:
    used = [r.calibration for r in recipes.values() if r.reads_tokens]
    return list({c.slug: c for c in used}.values())


def _similarity_keys(calibrations: Sequence[Calibration]) -> list[dg.AssetKey]:
    return [calibration_key(c, f"similarity_{metric}") for c in calibrations for metric in SIMILARITIES]


def _jobs(families: dict[str, Family], banks: Sequence[dg.AssetKey]):
    """`compress_<recipe>` with everything upstream, `summarise`, `evaluate_all`, and `compress_all`.

    The summary depends on every recipe, and Dagster copies all of a job's unselected parents into the job. With it in
    each recipe's job 140 recipes take 38 s to load, without it 2 s; `summarise_recipes` starts it after them.
    """
    summary = dg.AssetSelection.assets(*Graph.SUMMARY)
    compress = [
        dg.define_asset_job(
            f"compress_{family.slug}",
            dg.AssetSelection.assets(family.scorecard).upstream(),
            description=f"Recipe {family.name} from base model to scorecard; the leaderboard follows.",
        )
        for family in families.values()
        if family.name != BASELINE
    ]
    evaluations = [key for f in families.values() for key in (*f.tasks.values(), f.samples, f.scorecard)]
    evaluate = dg.define_asset_job(
        "evaluate_all",
        dg.AssetSelection.assets(*evaluations) | summary,
        description="Score stored weights again: what is scored already is a hit.",
    )
    summarise = dg.define_asset_job("summarise", summary, description="Leaderboard and ledger of what was run so far.")
    # no recipe reads the planner's banks: they are made when somebody plans
    recipes = dg.AssetSelection.all() - dg.AssetSelection.assets(*banks)
    everything = dg.define_asset_job("compress_all", recipes, description="Every recipe.")
    return compress, summarise, evaluate, everything


def _summarise_recipes(compress, summarise) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name="summarise_recipes",
        run_status=dg.DagsterRunStatus.SUCCESS,
        monitored_jobs=compress,
        request_job=summarise,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def summarise_recipes(context: dg.RunStatusSensorContext):
        """Brings a base model's leaderboard and ledger up to date after one of its recipes was run."""
        slug = context.dagster_run.tags.get("dagster/partition")
        if slug is None:
            return dg.SkipReason(f"run {context.dagster_run.run_id} is of no base model")
        return dg.RunRequest(run_key=context.dagster_run.run_id, partition_key=slug)

    return summarise_recipes


def _recompress_monthly(job) -> dg.ScheduleDefinition:
    @dg.schedule(job=job, cron_schedule="0 3 1 * *", name="recompress_monthly")
    def recompress_monthly(context: dg.ScheduleEvaluationContext):
        """Every base model through every recipe; runs are idempotent, so only what changed is computed."""
        for slug in context.instance.get_dynamic_partitions(base_models.name or ""):
            yield dg.RunRequest(run_key=f"{slug}-{context.scheduled_execution_time:%Y-%m}", partition_key=slug)

    return recompress_monthly


def _new_base_models(job, settings: Settings) -> dg.SensorDefinition:
    @dg.sensor(job=job, name="new_base_models", minimum_interval_seconds=300)
    def new_base_models(context: dg.SensorEvaluationContext):
        """Imports and compresses models that appear in the watched folder or list (`COMPRESSION_DAGS_WATCH`).

        A refused one is tried again when its files change.
        """
        if not settings.watch:
            return dg.SkipReason("COMPRESSION_DAGS_WATCH names no folder or list of models")
        hub, store = ModelHub(home=str(settings.home)), ArtifactStore(home=str(settings.home))
        known = set(context.instance.get_dynamic_partitions(base_models.name or ""))
        asked, requests, refused = _asked(context.cursor), [], []
        for reference in hub.watch(settings.watch):
            try:
                slug, stamp = _new_model(hub, store, reference, known, asked)
            except ValueError as error:
                refused.append(f"{reference}: {error}")
                continue
            if stamp:
                asked[slug] = stamp
                requests.append((slug, stamp, reference))
        for line in refused:
            context.log.warning(line)
        if not requests:
            return dg.SkipReason(f"no new base model in {settings.watch}" + "; refused: ".join(["", *refused]))
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(run_key=f"{slug}-{stamp}", partition_key=slug, tags={REFERENCE: reference})
                for slug, stamp, reference in requests
            ],
            dynamic_partitions_requests=[base_models.build_add_request([slug for slug, _, _ in requests])],
            cursor=json.dumps(asked),
        )

    return new_base_models


def _asked(cursor: str | None) -> dict[str, str]:
    """Slug → stamp of the files for which a run was requested last."""
    try:
        found = json.loads(cursor or "{}")
    except ValueError:
        found = {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _new_model(
    hub: ModelHub, store: ArtifactStore, reference: str, known: set[str], asked: dict[str, str]
) -> tuple[str, str | None]:
    """(slug, stamp of the files to import; None if the model is there, or these files were asked for before).

    Raises:
        InputError: the reference means nothing, or the model is refused by its headers.
    """
    source = hub.resolve(reference)
    slug, registered = source.slug, source.slug in hub.registered()
    if slug in known and (registered or slug not in asked or store.recall(base_model.key, slug)):
        return slug, None
    hub.check(source)
    stamp = stamp_of(source)
    if slug in known and source.kind in {"hub", "wheel"}:
        stamp += f"-{date.today()}"  # its download failed: once more each day
    return slug, None if asked.get(slug) == stamp else stamp


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster's tools load: the recipes folder and the home of the environment."""
    settings = Settings.from_environment()
    book = evaluation_book(recipes_folder())
    return build_graph(load_recipes(), book, settings, added_tasks(settings.home, book)).definitions
