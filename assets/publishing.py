"""How every asset reports itself: data version, cache hit or computed, metadata, decisions table, plots."""

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import dagster as dg
from dagster._core.events import DagsterEventType

from compression_dags.provenance.artifacts import DECISIONS, Artifact
from compression_dags.provenance.decisions import read_decisions
from compression_dags.recipes.kinds import TABLE
from compression_dags.resources.artifact_store import ArtifactStore, Produced
from compression_dags.step import worker

logger = logging.getLogger("compression_dags")
#: Dagster queues assets of this pool one at a time; `Accelerator.lease` decides who computes on which device.
GPU_POOL = "gpu"
TABLE_ROWS = 300
VERSION_TAG = "dagster/data_version"


def publish(
    store: ArtifactStore,
    asset: str,
    partition: str,
    produced: Produced,
    *,
    recipe: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dg.MaterializeResult:
    """What Dagster is told of an artifact, once the store remembers which artifact the partition is.

    Args:
        recipe: `Recipe.as_run`; the handle keeps it, so that what was run can be told from what a file says later.
        extra: metadata of this asset alone.
    """
    artifact = replace(produced.artifact, recipe=dict(recipe)) if recipe else produced.artifact
    store.remember(asset, partition, artifact)
    say(asset, partition, produced)
    metadata = {**metadata_of(produced), **(extra or {})}
    return dg.MaterializeResult(asset_key=asset, metadata=metadata, data_version=dg.DataVersion(artifact.digest))


def report(instance: dg.DagsterInstance, asset: str, made: Mapping[str, Produced]) -> None:
    """Tell Dagster of artifacts (partition → how it came) that were made outside a run, but for versions it knows."""
    known = known_versions(instance, asset, list(made))
    for partition, produced in made.items():
        digest = produced.artifact.digest
        if not produced.hit or known.get(partition) != digest:
            tags = {VERSION_TAG: digest}
            instance.report_runless_asset_event(
                dg.AssetMaterialization(asset, partition=partition, metadata=metadata_of(produced), tags=tags)
            )


def known_versions(instance: dg.DagsterInstance, asset: str, partitions: Sequence[str]) -> dict[str, str]:
    """Partition → data version of its latest materialization, of those partitions that have one; one query."""
    found = instance.event_log_storage.get_latest_tags_by_partition(
        dg.AssetKey(asset), DagsterEventType.ASSET_MATERIALIZATION, [VERSION_TAG], list(partitions)
    )
    return {partition: tags[VERSION_TAG] for partition, tags in found.items() if VERSION_TAG in tags}


def say(asset: str, partition: str, produced: Produced) -> None:
    """Log the one line that the command line shows of an asset."""
    logger.info("%-9s %s (%.1f s)", state_of(produced), f"{asset} {partition}", produced.seconds)


def state_of(produced: Produced) -> str:
    """`hit`, `computed`, or `rebuilt` where a stored one was damaged."""
    return "hit" if produced.hit else "rebuilt" if produced.damage else "computed"


def outcome_of(produced: Produced) -> dict[str, Any]:
    """How an artifact came, as `run --json` says it: cache state, time, fingerprint."""
    return {
        "cache": state_of(produced),
        "seconds": round(produced.seconds, 3),
        "fingerprint": produced.artifact.fingerprint,
    }


def metadata_of(produced: Produced) -> dict[str, Any]:
    """Cache state, time, memory, fingerprint, metadata and decisions of an artifact."""
    artifact = produced.artifact
    return {
        **outcome_of(produced),
        "computed_seconds": artifact.seconds,
        "peak_memory_mb": artifact.peak_memory_mb,
        "peak_device_memory_mb": artifact.peak_device_memory_mb,
        "path": dg.MetadataValue.path(artifact.path),
        **({"damage": "kept aside: " + "; ".join(produced.damage)} if produced.damage else {}),
        **{name: value for name, value in artifact.metadata.items() if isinstance(value, (int, float, str))},
        **({"computed_by": dg.MetadataValue.dagster_run(artifact.run_id)} if produced.hit and artifact.run_id else {}),
        **(decisions_table(artifact) if artifact.decisions else {}),
        **pictures(artifact),
    }


def pictures(artifact: Artifact) -> dict[str, Any]:
    """The stored pictures of an artifact, or the one that its kind draws: a file more would change its digest."""
    _, kind = TABLE.get(artifact.kind, ("", None))
    if kind and kind.picture and artifact.decisions:
        return {"plot": picture(worker(kind.picture)(artifact.path))}
    stored = {name: artifact.path / f"{name}.png" for name in ("plot", "modules")}
    return {name: picture(path.read_bytes()) for name, path in stored.items() if path.is_file()}


def decisions_table(artifact: Artifact) -> dict[str, Any]:
    """The decision rows as an inline table: all of them, or the first 300 and the count."""
    frame = read_decisions(artifact.path / DECISIONS)
    records = [
        dg.TableRecord(
            {
                "step": int(row["step"]),
                "target": row["target"],
                "action": row["action"],
                "sources": ", ".join(map(str, row["sources"])),
                "value": "" if row["value"] is None or row["value"] != row["value"] else f"{row['value']:.6g}",
                "unit": row["unit"],
                "reason": row["reason"],
                "evidence": row["evidence"],
            }
        )
        for row in frame.head(TABLE_ROWS).to_dict("records")
    ]
    return {"decisions": dg.MetadataValue.table(records), "decision_count": len(frame)}


def picture(png: bytes) -> dg.MarkdownMetadataValue:
    """A PNG that Dagster's pages show."""
    return dg.MetadataValue.md(f"![plot](data:image/png;base64,{base64.b64encode(png).decode()})")
