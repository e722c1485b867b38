"""The runs that sensors and schedules ask for."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from compression_dags.assets.partitions import Place
from compression_dags.assets.recipe import register
from compression_dags.assets.selection import Planner

#: How a run may end.
ENDS = ("SUCCESS", "FAILURE", "CANCELED")
_UNFINISHED = [status for status in dg.DagsterRunStatus if status.value not in ENDS]


def run_requests(planner: Planner, slugs: Sequence[str], key: str, context: Any) -> Iterator[dg.RunRequest]:
    """A run for every recipe that a base model lacks; those that cannot work on it are named in the log."""
    recipes = planner.recipes()
    register(context.instance, planner.store, recipes)
    for slug in slugs:
        for recipe, assets in planner.outstanding(slug, recipes):
            here = Place(slug, recipe.name)
            if isinstance(assets, str):
                context.log.info("%s is not applicable: %s", here, assets)
                continue
            chosen = [dg.AssetKey(asset) for asset in assets]
            yield dg.RunRequest(run_key=f"{here}-{key}", partition_key=here.key, asset_selection=chosen)


def summary_request(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.RunRequest | dg.SkipReason:
    """The summary of the base model on which `run` has ended; of a backfill, after the last of its runs on it."""
    slug = run.tags.get("dagster/partition/base_model")
    if slug is None or "dagster/partition/recipe" not in run.tags:
        return dg.SkipReason(f"run {run.run_id} is of no recipe on a base model")
    key = run.run_id
    if backfill := run.tags.get("dagster/backfill"):
        tags = {"dagster/backfill": backfill, "dagster/partition/base_model": slug}
        if instance.get_runs_count(dg.RunsFilter(tags=tags, statuses=_UNFINISHED)):
            return dg.SkipReason(f"more runs of backfill {backfill} on {slug} are to come")
        # the same for all of its runs whose ends are seen late, another if the backfill goes on
        key = f"{backfill}-{slug}-{instance.get_runs_count(dg.RunsFilter(tags=tags))}"
    return dg.RunRequest(run_key=key, partition_key=slug)
