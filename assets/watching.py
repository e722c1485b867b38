"""New base models: what appears in a watched folder or list is imported."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg

from compression_dags.assets.base_models import REFERENCE
from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.model_hub import ModelHub
from compression_dags.resources.model_imports import check, stamp_of
from compression_dags.step import BASE


def new_base_models_sensor(job: Any, home: Path, watch: str) -> dg.SensorDefinition:
    """The sensor that imports models which appear in `watch`, a folder or a list."""

    @dg.sensor(job=job, name="new_base_models", minimum_interval_seconds=300)
    def new_base_models(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        """Imports models that appear in the watched folder or list (`COMPRESSION_DAGS_WATCH`).

        A refused one is tried again when its files change.
        """
        if not watch:
            return dg.SkipReason("COMPRESSION_DAGS_WATCH names no folder or list of models")
        hub, store = ModelHub(home=str(home)), ArtifactStore(home=str(home))
        known = set(context.instance.get_dynamic_partitions(BASE_MODELS.name or ""))
        asked, requests, refused = _asked(context.cursor), [], []
        for reference in hub.watch(watch):
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
            return dg.SkipReason(f"no new base model in {watch}" + "; refused: ".join(["", *refused]))
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(run_key=f"{slug}-{stamp}", partition_key=slug, tags={REFERENCE: reference})
                for slug, stamp, reference in requests
            ],
            dynamic_partitions_requests=[BASE_MODELS.build_add_request([slug for slug, _, _ in requests])],
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
    if slug in known and (registered or slug not in asked or store.recall(BASE, slug)):
        return slug, None
    check(hub, source)
    stamp = stamp_of(source)
    if slug in known and source.kind in {"hub", "wheel"}:
        stamp += f"-{date.today()}"  # its download failed: once more each day
    return slug, None if asked.get(slug) == stamp else stamp
