"""Shared analysis: one family of assets for every calibration setting, however many recipes use it."""

import dagster as dg

from compression_dags.assets.base_models import base_model, base_models
from compression_dags.assets.publishing import GPU_POOL, picture, publish
from compression_dags.calibration.corpora import Calibration, corpus_digest
from compression_dags.calibration.statistics import VERSION
from compression_dags.provenance.artifacts import Artifact, Request
from compression_dags.provenance.escaping import markdown_code
from compression_dags.recipes import options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.similarity.evidence import VERSION as SIMILARITY_VERSION
from compression_dags.similarity.redundancy import VERSION as REDUNDANCY_VERSION

SIMILARITIES = ("block_influence", "angular", "npib", "cka")
#: Also drawn from the activations, for sparsity; its tables are not a merging method's.
REDUNDANCY = "similarity_redundancy"


def calibration_key(calibration: Calibration, name: str) -> dg.AssetKey:
    return dg.AssetKey([calibration.slug, name])


def build_calibration_assets(calibration: Calibration) -> list[dg.AssetsDefinition]:
    """`calibration_tokens` → `calibration_activations` → `similarity_*` for one calibration setting."""
    return [
        _tokens(calibration),
        _activations(calibration),
        *(_similarity(calibration, metric) for metric in SIMILARITIES),
        _redundancy(calibration),
    ]


def _tokens(calibration: Calibration) -> dg.AssetsDefinition:
    # not the corpus: its content is an input, and where it lies is a fact of a machine
    options = calibration.model_dump(mode="json", exclude={"samples", "corpus"})

    @dg.asset(
        key=calibration_key(calibration, "calibration_tokens"),
        partitions_def=base_models,
        group_name="analysis",
        kinds={"parquet"},
        code_version=f"{calibration.version}:{options_digest(options)}",
        ins={"base": dg.AssetIn(base_model.key)},
        description=f"{calibration.sequences} × {calibration.length} tokens of {markdown_code(calibration.corpus)}, "
        f"packed by `{calibration.packing}`, seed {calibration.seed}: exact counts, clipped to the model's context.",
    )
    def calibration_tokens(
        context: dg.AssetExecutionContext, store: ArtifactStore, base: Artifact
    ) -> dg.Output[Artifact]:
        inputs = {"base_model": base.digest, "corpus": corpus_digest(calibration.corpus)}

        def build(work):
            from transformers import AutoTokenizer

            from compression_dags.calibration.corpora import make_blocks, read_documents, save_blocks

            tokenizer = AutoTokenizer.from_pretrained(base.checkpoint, local_files_only=True)
            blocks = make_blocks(read_documents(calibration.corpus), tokenizer, calibration, base.size["context"])
            save_blocks(blocks, work.out / "tokens.safetensors")
            sequences, length = blocks.ids.shape
            counts = {"sequences": sequences, "length": length, "tokens": blocks.tokens, "documents": blocks.documents}
            return {"corpus": calibration.corpus, **counts}

        return publish(context, store, Request("calibration_tokens", calibration.version, options, inputs), build)

    return calibration_tokens


def _activations(calibration: Calibration) -> dg.AssetsDefinition:
    options = {"samples": calibration.samples, "seed": calibration.seed}

    @dg.asset(
        key=calibration_key(calibration, "calibration_activations"),
        partitions_def=base_models,
        group_name="analysis",
        kinds={"torch", "safetensors"},
        code_version=f"{VERSION}:{options_digest(options)}",
        ins={
            "base": dg.AssetIn(base_model.key),
            "tokens": dg.AssetIn(calibration_key(calibration, "calibration_tokens")),
        },
        description="One streamed pass over the calibration tokens: block influence, angular distances, hidden states "
        f"of {calibration.samples} sampled tokens and of the first of sequence 0 before the final norm, channel norms "
        "of every projection input.",
        pool=GPU_POOL,
    )
    def calibration_activations(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        base: Artifact,
        tokens: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"base_model": base.digest, "calibration_tokens": tokens.digest}

        def build(work):
            from compression_dags.calibration.activations import profile_activations
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.calibration.streaming import DecoderStream
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.stage import bar

            with accelerator.lease() as device:
                stream = DecoderStream(Checkpoint(base.checkpoint), device=device.name, dtype=device.dtype)
                blocks = load_blocks(tokens.path / "tokens.safetensors")
                found = profile_activations(stream, blocks, **options, resume=work.resume(), progress=bar)
                stream.close()
            found.save(work.out)
            return {"tokens": found.tokens, "layers": stream.num_layers, "sampled_tokens": len(found.sampled)}

        request = Request("calibration_activations", VERSION, options, inputs, accelerator.numeric)
        return publish(context, store, request, build)

    return calibration_activations


def _similarity(calibration: Calibration, metric: str) -> dg.AssetsDefinition:
    says = {
        "block_influence": "1 − mean cosine between the input and the output of every layer (ShortGPT).",
        "angular": "Mean angle over π between the states at the entries of every two layers (Gromov et al.).",
        "npib": "Information that the outputs of every two layers share, on their diffusion manifolds, over the "
        "geometric mean of their entropies (MKA), by three estimators, with intervals over prompts and the merge tree.",
        "cka": "Debiased linear centred kernel alignment of the outputs of every two layers, with intervals over "
        "prompts and the merge tree.",
    }[metric]

    @dg.asset(
        key=calibration_key(calibration, f"similarity_{metric}"),
        partitions_def=base_models,
        group_name="analysis",
        kinds={"numpy"},
        code_version=SIMILARITY_VERSION,
        ins={"activations": dg.AssetIn(calibration_key(calibration, "calibration_activations"))},
        description=says,
    )
    def similarity(
        context: dg.AssetExecutionContext, store: ArtifactStore, activations: Artifact
    ) -> dg.Output[Artifact]:
        def build(work):
            from compression_dags.similarity.tables import write_similarity

            return write_similarity(metric, activations.path, work.out)

        def plot(artifact: Artifact) -> dict:
            return {"plot": picture((artifact.path / "plot.png").read_bytes())}

        request = Request(
            f"similarity_{metric}", SIMILARITY_VERSION, {}, {"calibration_activations": activations.digest}
        )
        return publish(context, store, request, build, extra=plot)

    return similarity


def _redundancy(calibration: Calibration) -> dg.AssetsDefinition:
    @dg.asset(
        key=calibration_key(calibration, REDUNDANCY),
        partitions_def=base_models,
        group_name="analysis",
        kinds={"numpy"},
        code_version=REDUNDANCY_VERSION,
        ins={"activations": dg.AssetIn(calibration_key(calibration, "calibration_activations"))},
        description="How much the inputs, outputs and gates of every two layers, and of every two modules, hold of "
        "each other (ALS): as printed, centred, and debiased.",
    )
    def similarity_redundancy(
        context: dg.AssetExecutionContext, store: ArtifactStore, activations: Artifact
    ) -> dg.Output[Artifact]:
        def build(work):
            from compression_dags.similarity.redundancy_tables import write_redundancy

            return write_redundancy(activations.path, work.out)

        def plots(artifact: Artifact) -> dict:
            found = {name: artifact.path / f"{name}.png" for name in ("plot", "modules")}
            return {name: picture(file.read_bytes()) for name, file in found.items() if file.is_file()}

        inputs = {"calibration_activations": activations.digest}
        return publish(context, store, Request(REDUNDANCY, REDUNDANCY_VERSION, {}, inputs), build, extra=plots)

    return similarity_redundancy
