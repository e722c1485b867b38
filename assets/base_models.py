"""`base_model`: validated, digested copies of the models that recipes start from."""

import dagster as dg

from assets.publishing import publish
from compression_dags.provenance.artifacts import Artifact, Request, write_size
from resources.artifact_store import ArtifactStore
from resources.model_hub import ModelHub

#: 2: the digest covers what computes, not the card; `size.json`.
VERSION = "2"
base_models = dg.DynamicPartitionsDefinition(name="base_model")


@dg.asset(
    partitions_def=base_models, group_name="base_models", kinds={"huggingface", "safetensors"}, code_version=VERSION
)
def base_model(context: dg.AssetExecutionContext, store: ArtifactStore, hub: ModelHub) -> dg.Output[Artifact]:
    """A base model as it came: weights, tokenizer and config, validated (architecture, whole and finite safetensors,
    tokenizer matches the vocabulary, stock reload) with revision, licence and the sha256 of every file."""
    source = hub.source(context.partition_key)
    request = Request("base_model", VERSION, {}, hub.identity(source))

    def build(work):
        from compression_dags.checkpoints.importing import import_checkpoint
        from compression_dags.stages import bar

        folder = hub.fetch(source, work.scratch)
        imported = import_checkpoint(
            folder, work.out / "checkpoint", revision=source.revision, origin=source.origin, track=bar
        )
        write_size(work.out, {name: imported.facts[name] for name in ("layers", "parameters", "bytes", "context")})
        return imported.facts

    return publish(context, store, request, build)
