"""`quantization_plan` and `quantized_weights` of one recipe."""

from typing import Any

import dagster as dg

from compression_dags.assets.base_models import base_models
from compression_dags.assets.calibration import calibration_key
from compression_dags.assets.merging import recipe_key
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.planning.identity import MIXED_VERSION, mixed_identity
from compression_dags.provenance.artifacts import CHECKPOINT, DECISIONS, Artifact, Request
from compression_dags.recipes import Recipe, options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore


def build_quantization_plan(recipe: Recipe, weights_key: dg.AssetKey) -> dg.AssetsDefinition:
    """Only of recipes that ask for an average of bits."""
    quantizer = recipe.quantize
    assert quantizer is not None and quantizer.bits
    options = mixed_identity(quantizer)

    @dg.asset(
        key=recipe_key(recipe, "quantization_plan"),
        partitions_def=base_models,
        group_name=recipe.slug,
        kinds={"parquet"},
        tags={"recipe": recipe.name, "method": quantizer.method},
        code_version=f"{MIXED_VERSION}:{options_digest(options)}",
        ins={
            "weights": dg.AssetIn(weights_key),
            "tokens": dg.AssetIn(calibration_key(recipe.calibration, "calibration_tokens")),
        },
        description=f"A scheme for every group of projections, {quantizer.bits:g} bits a weight on average: the least "
        "sum of measured losses, exactly.",
        pool=GPU_POOL,
    )
    def quantization_plan(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        weights: Artifact,
        tokens: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"weights": weights.digest, "calibration_tokens": tokens.digest}

        def build(work):
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.planning.mixed import plan_schemes
            from compression_dags.provenance.decisions import write_decisions
            from compression_dags.stage import bar

            source = Checkpoint(weights.checkpoint)
            quantizer.check(source.shape)
            blocks = load_blocks(tokens.path / "tokens.safetensors")
            with accelerator.lease() as device:
                on: dict[str, Any] = {"device": device.name, "dtype": device.dtype}
                plan, decisions = plan_schemes(quantizer, source, blocks, **on, progress=bar)
            plan.save(work.out)
            write_decisions(decisions, work.out / DECISIONS)
            return {"bits_per_weight": plan.bits, "predicted_kl": plan.cost}

        request = Request("quantization_plan", MIXED_VERSION, options, inputs, accelerator.numeric)
        return publish(context, store, request, build, recipe=recipe.as_run())

    return quantization_plan


def build_quantized_weights(recipe: Recipe, weights_key: dg.AssetKey) -> dg.AssetsDefinition:
    quantizer = recipe.quantize
    assert quantizer is not None
    ins = {"weights": dg.AssetIn(weights_key)}
    if quantizer.reads_tokens:
        ins["tokens"] = dg.AssetIn(calibration_key(recipe.calibration, "calibration_tokens"))
    if quantizer.bits:
        ins["plan"] = dg.AssetIn(recipe_key(recipe, "quantization_plan"))

    @dg.asset(
        key=recipe_key(recipe, "quantized_weights"),
        partitions_def=base_models,
        group_name=recipe.slug,
        kinds={"torch", "safetensors"},
        tags={"recipe": recipe.name, "method": quantizer.method, "scheme": quantizer.scheme},
        code_version=f"{quantizer.code_version}:{options_digest(quantizer.options())}",
        ins=ins,
        description=f"`{quantizer.method}` onto compressed-tensors `{quantizer.scheme}`: "
        f"{(type(quantizer).__doc__ or '').strip()}",
        pool=GPU_POOL,
    )
    def quantized_weights(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        weights: Artifact,
        **more: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"weights": weights.digest}
        roles = {"tokens": "calibration_tokens", "plan": "quantization_plan"}
        inputs |= {roles[name]: artifact.digest for name, artifact in more.items()}

        def build(work):
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.checkpoints.facts import record_size
            from compression_dags.checkpoints.gate import check_reload
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.checkpoints.serving_lint import serving_fact
            from compression_dags.planning.mixed import SchemePlan
            from compression_dags.provenance.decisions import write_decisions
            from compression_dags.stage import bar

            source = Checkpoint(weights.checkpoint)
            quantizer.check(source.shape)
            blocks = load_blocks(more["tokens"].path / "tokens.safetensors") if "tokens" in more else None
            schemes = SchemePlan.load(more["plan"].path).choices if "plan" in more else None
            with accelerator.lease() as device:
                on: dict[str, Any] = {"device": device.name, "dtype": device.dtype}
                model = quantizer.quantize(
                    source,
                    work.out / CHECKPOINT,
                    blocks=blocks,
                    schemes=schemes,
                    **on,
                    resume=work.resume(),
                    progress=bar,
                )
                reference = quantizer.reference_logits(source, rounding=model.rounding, **on)
                gate = check_reload(model.checkpoint.path, reference, **on)
            gate["serving"] = serving_fact(model.checkpoint.path)
            write_decisions(model.decisions, work.out / DECISIONS)
            facts = record_size(model.checkpoint, work.out, weights.size["parameters"])
            return {**facts, "bits_per_weight": model.bits_per_weight, "scheme": quantizer.scheme, **gate}

        options, numeric = quantizer.options(), accelerator.numeric
        request = Request("quantized_weights", quantizer.code_version, options, inputs, numeric)
        return publish(context, store, request, build, recipe=recipe.as_run())

    return quantized_weights
