"""What the `models` verbs do: list, describe and forget base models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from compression_dags.errors import InputError


def list_models(home: Path) -> dict[str, dict[str, Any]]:
    """Name → kind, location, revision and whether its folder is missing, of embedded and registered models."""
    from compression_dags.resources.model_hub import EMBEDDED_MODELS, SMOLLM2, ModelHub
    from compression_dags.resources.model_imports import is_gone

    shipped = {p.name: {"kind": "embedded", "location": str(p), "revision": None} for p in EMBEDDED_MODELS}
    shipped[SMOLLM2] = {"kind": "wheel", "location": SMOLLM2, "revision": None}
    rows = {name: row | {"missing": False} for name, row in shipped.items()}
    for name, source in ModelHub(home=str(home)).registered().items():
        row = {"kind": source.kind, "location": source.location, "revision": source.revision}
        rows[name] = row | {"missing": is_gone(source)}
    return rows


def models_text(listed: dict[str, dict[str, Any]]) -> str:
    gone = "   (missing; the imported copy is used)"
    return "\n".join(
        f"{name:32} {row['kind']:10} {row['location']}{gone if row['missing'] else ''}" for name, row in listed.items()
    )


def metadata_text(metadata: dict[str, Any]) -> str:
    """One line a fact; each note on a line of its own, files left out."""
    lines = [f"{key}: {value}" for key, value in metadata.items() if key not in ("files", "notes")]
    return "\n".join([*lines, *(f"note: {note}" for note in metadata.get("notes", ()))])


def remove_model(home: Path, name: str) -> str:
    """Forget a model: its registration, its partition in Dagster and its handles. Artifacts stay until pruned.

    Raises:
        InputError: there is no such model; the known ones are listed.
    """
    from compression_dags.resources.artifact_store import ArtifactStore
    from compression_dags.resources.model_hub import ModelHub
    from compression_dags.resources.model_imports import forget

    hub = ModelHub(home=str(home))
    sources = hub.registered()
    partitions = set(_partitions(home, None))
    if name not in sources and name not in partitions:
        known = ", ".join(sorted({*sources, *partitions})) or "none"
        raise InputError(f"model {name!r} is not registered in {home}; registered are: {known}")
    hub.unregister(name)
    source = sources.get(name)
    if source and not any(s.location == source.location for key, s in sources.items() if key != name):
        forget(hub, source)
    _partitions(home, name)
    ArtifactStore(home=str(home)).forget(name)
    return name


def _partitions(home: Path, delete: str | None) -> list[str]:
    """Base models that Dagster knows in this home, after `delete` went; none where it never ran."""
    import dagster as dg

    from compression_dags.assets.partitions import BASE_MODELS

    folder = home / "dagster"
    if not (folder / "dagster.yaml").is_file():
        return []
    os.environ["DAGSTER_HOME"] = str(folder)
    with dg.DagsterInstance.get() as instance:
        if delete:
            instance.delete_dynamic_partition(BASE_MODELS.name or "", delete)
        return list(instance.get_dynamic_partitions(BASE_MODELS.name or ""))
