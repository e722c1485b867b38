"""`base_model`: validated, digested copies of the models that recipes start from."""

from collections.abc import Callable
from typing import Any

import dagster as dg

from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.assets.publishing import publish
from compression_dags.errors import InputError
from compression_dags.heartbeat import working_on
from compression_dags.provenance.artifacts import Artifact, Request, write_size
from compression_dags.resources.artifact_store import ArtifactStore, Produced, Workplace
from compression_dags.resources.model_hub import ModelHub, ModelSource
from compression_dags.resources.model_imports import opened
from compression_dags.stage import bar
from compression_dags.step import BASE

#: 2: the digest covers what computes, not the card; `size.json`.
VERSION = "2"
#: Tag of a run that imports a model which is not registered yet: the reference from which it is resolved.
REFERENCE = "compression_dags/model"


@dg.asset(
    name=BASE,
    partitions_def=BASE_MODELS,
    group_name="inputs",
    kinds={"huggingface", "safetensors"},
    code_version=VERSION,
)
def base_model(context: dg.AssetExecutionContext, store: ArtifactStore, hub: ModelHub) -> dg.MaterializeResult:
    """A base model as it came: weights, tokenizer and config. It is validated (architecture, whole and finite
    safetensors, tokenizer matches the vocabulary, stock reload, one forward pass). With it are revision, licence and
    the sha256 of every file. It is registered when it has passed."""
    slug = context.partition_key
    source = _source(hub, slug, context.run.tags.get(REFERENCE))
    found = None
    try:
        with opened(hub, source, bar) as found, working_on(f"{BASE} {slug}"):
            produced = store.produce(_request(found.identity), _build(found), context.run_id)
    except InputError:
        if (found is None or found.refused) and slug not in hub.registered() and not store.recall(BASE, slug):
            context.instance.delete_dynamic_partition(BASE_MODELS.name or "", slug)
        raise
    hub.register(source)
    return publish(store, BASE, slug, produced, extra=_notes(produced.artifact))


def import_base_model(store: ArtifactStore, hub: ModelHub, source: ModelSource) -> Produced:
    """The artifact that `base_model` of this source is, made now if it is not stored; then the source is registered.

    Raises:
        InputError: the model is refused or cannot be fetched; nothing was registered or stored.
    """
    with opened(hub, source, bar) as found:
        produced = store.produce(_request(found.identity), _build(found))
    hub.register(source)
    store.remember(BASE, source.slug, produced.artifact)
    return produced


def _source(hub: ModelHub, slug: str, reference: str | None) -> ModelSource:
    if reference and slug not in hub.registered():
        return hub.resolve(reference, slug)
    return hub.source(slug)


def _request(identity: dict[str, str]) -> Request:
    return Request("base_model", VERSION, {}, identity)


def _build(found: Any) -> Callable[[Workplace], dict[str, Any]]:
    def build(work: Workplace) -> dict[str, Any]:
        imported = found.place(work.out / "checkpoint", work.scratch, bar)
        write_size(work.out, {name: imported.metadata[name] for name in ("layers", "parameters", "bytes", "context")})
        work.hashed.update({f"checkpoint/{name}": digest for name, digest in imported.digests.items()})
        return imported.metadata

    return build


def _notes(artifact: Artifact) -> dict[str, str]:
    notes = artifact.metadata.get("notes")
    return {"notes": "; ".join(notes)} if notes else {}
