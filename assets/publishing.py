"""How every asset reports itself: data version, cache hit or computed, facts, decisions table, plots."""

import base64
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import dagster as dg

from compression_dags.errors import InputError, IntegrityError, naming_dtype
from compression_dags.heartbeat import working_on
from compression_dags.provenance.artifacts import DECISIONS, Artifact, Request
from compression_dags.resources.artifact_store import ArtifactStore, Workplace

logger = logging.getLogger("compression_dags")
#: Dagster queues assets of this pool one at a time; `Accelerator.lease` decides who computes on which device.
GPU_POOL = "gpu"
TABLE_ROWS = 300


def publish(
    context: dg.AssetExecutionContext,
    store: ArtifactStore,
    request: Request,
    build: Callable[[Workplace], dict[str, Any]],
    *,
    key: dg.AssetKey | None = None,
    recipe: Mapping[str, Any] | None = None,
    extra: Callable[[Artifact], Mapping[str, Any]] | None = None,
) -> dg.Output[Artifact]:
    """Ask the store, build on a miss, and hand Dagster the handle with its metadata.

    Args:
        recipe: `Recipe.as_run`; the handle keeps it, so that what was run can be told from what a file says later.
    """
    key = key or context.asset_key
    try:
        with working_on(key.to_user_string()):
            produced = store.produce(request, build, context.run_id)
    except (InputError, IntegrityError) as error:
        raise naming_dtype(error, request.numeric.get("dtype")) from error.__cause__
    artifact = replace(produced.artifact, recipe=dict(recipe)) if recipe else produced.artifact
    state = "hit" if produced.hit else "rebuilt" if produced.damage else "computed"
    logger.info("%-9s %s (%.1f s)", state, key.to_user_string(), produced.seconds, extra={"asset": key.path})
    metadata: dict[str, Any] = {
        "cache": state,
        "seconds": round(produced.seconds, 3),
        "computed_seconds": artifact.seconds,
        "peak_memory_mb": artifact.peak_memory_mb,
        "peak_device_memory_mb": artifact.peak_device_memory_mb,
        "fingerprint": artifact.fingerprint,
        "path": dg.MetadataValue.path(artifact.path),
        **({"damage": "kept aside: " + "; ".join(produced.damage)} if produced.damage else {}),
        **{name: value for name, value in artifact.facts.items() if isinstance(value, (int, float, str))},
        **({"computed_by": dg.MetadataValue.dagster_run(artifact.run_id)} if produced.hit and artifact.run_id else {}),
        **(decisions_table(artifact) if artifact.decisions else {}),
        **(extra(artifact) if extra else {}),
    }
    return dg.Output(artifact, data_version=dg.DataVersion(artifact.digest), metadata=metadata)


def decisions_table(artifact: Artifact) -> dict[str, Any]:
    """The decision rows as an inline table: all of them, or the first 300 and the count."""
    import pandas as pd

    from compression_dags.provenance.decisions import read_decisions

    frame = read_decisions(artifact.path / DECISIONS)
    records = [
        dg.TableRecord(
            {
                "step": int(row["step"]),
                "target": row["target"],
                "action": row["action"],
                "sources": ", ".join(map(str, row["sources"])),
                "value": "" if pd.isna(row["value"]) else f"{row['value']:.6g}",
                "unit": row["unit"],
                "reason": row["reason"],
                "evidence": row["evidence"],
            }
        )
        for row in frame.head(TABLE_ROWS).to_dict("records")
    ]
    return {"decisions": dg.MetadataValue.table(records), "decision_count": len(frame)}


def picture(png: bytes) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(f"![plot](data:image/png;base64,{base64.b64encode(png).decode()})")
