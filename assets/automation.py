"""Jobs, and what starts them: new base models, changed recipes, ended runs, the first of a month."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import dagster as dg

from compression_dags.assets.evaluation import SAMPLES, eval_key
from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.assets.registration import register_home
from compression_dags.assets.requests import ENDS, run_requests, summary_request
from compression_dags.assets.scorecard import SCORECARD
from compression_dags.assets.selection import Planner
from compression_dags.assets.summary import LEADERBOARD, LEDGER
from compression_dags.assets.watching import new_base_models_sensor
from compression_dags.evaluation.tasks import Task
from compression_dags.recipes.kinds import TABLE
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.model_hub import ModelHub
from compression_dags.step import BASE


class Settings(Protocol):
    """What of the composition root's settings is read here."""

    @property
    def home(self) -> Path: ...

    @property
    def watch(self) -> str: ...

    def resources(self) -> dict[str, Any]: ...


def automation(tasks: Sequence[Task], settings: Settings) -> tuple[list, list, list]:
    """Jobs, schedules and sensors."""
    scores = [*(eval_key(task.name) for task in tasks), SAMPLES, SCORECARD]
    compress = dg.define_asset_job(
        "compress",
        dg.AssetSelection.assets(*TABLE, COMPRESSED, *scores),
        description="One recipe on one base model, from its calibration set to its scorecard.",
    )
    evaluate = dg.define_asset_job(
        "evaluate",
        dg.AssetSelection.assets(*scores),
        description="Score a compressed model: what is scored already is a hit.",
    )
    summarise = dg.define_asset_job(
        "summarise",
        dg.AssetSelection.assets(LEADERBOARD, LEDGER),
        description="Leaderboard and ledger of a base model, from what was run so far.",
    )
    add = dg.define_asset_job(
        "import_base_model", dg.AssetSelection.assets(BASE), description="Check and import one base model."
    )
    planner = Planner(tasks, settings.resources())
    sensors = [
        new_base_models_sensor(add, settings.home, settings.watch),
        _compress_new_models(add, compress, planner),
        _recipes_changed(settings),
        *(_summarise_after(summarise, status) for status in ENDS),
    ]
    return [compress, evaluate, summarise, add], [_recompress_monthly(compress, planner)], sensors


def _summarise_after(summarise: Any, status: str) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name=f"summarise_after_{status.lower()}",
        run_status=dg.DagsterRunStatus[status],
        request_job=summarise,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def summarise_after(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
        """Brings a base model's leaderboard and ledger up to date after a run of one of its recipes has ended.

        A backfill counts once for each base model: when the last of its runs on it has ended.
        """
        return summary_request(context.instance, context.dagster_run)

    return summarise_after


def _recompress_monthly(job: Any, planner: Planner) -> dg.ScheduleDefinition:
    @dg.schedule(job=job, cron_schedule="0 3 1 * *", name="recompress_monthly")
    def recompress_monthly(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
        """Every base model through every recipe that is shown, where the store lacks something."""
        when = f"{context.scheduled_execution_time:%Y-%m}"
        slugs = context.instance.get_dynamic_partitions(BASE_MODELS.name or "")
        yield from run_requests(planner, slugs, when, context)

    return recompress_monthly


def _compress_new_models(monitored: Any, compress: Any, planner: Planner) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name="compress_new_models",
        run_status=dg.DagsterRunStatus.SUCCESS,
        monitored_jobs=[monitored],
        request_job=compress,
    )
    def compress_new_models(context: dg.RunStatusSensorContext) -> Any:
        """Every recipe that is shown, on a base model that was just imported."""
        slug = context.dagster_run.tags.get("dagster/partition")
        found = list(run_requests(planner, [slug], context.dagster_run.run_id, context)) if slug else []
        return found or dg.SkipReason(f"nothing is missing of {slug}")

    return compress_new_models


def _recipes_changed(settings: Settings) -> dg.SensorDefinition:
    @dg.sensor(name="recipes_changed", minimum_interval_seconds=60, default_status=dg.DefaultSensorStatus.RUNNING)
    def recipes_changed(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        """Keeps the partitions of `recipe` as the recipe files are: new ones appear, changed ones are materialized."""
        home = str(settings.home)
        made = register_home(context.instance, ArtifactStore(home=home), ModelHub(home=home))
        changed = [name for name, produced in made.items() if not produced.hit]
        return dg.SkipReason(f"changed: {', '.join(changed)}" if changed else f"{len(made)} recipes are as they were")

    return recipes_changed
