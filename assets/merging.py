"""`merge_plan`, `merged_weights`, `recovered_weights` of one recipe."""

from typing import Any

import dagster as dg

from compression_dags.assets.base_models import base_model, base_models
from compression_dags.assets.calibration import calibration_key
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.depth.plan import VERSION
from compression_dags.provenance.artifacts import CHECKPOINT, DECISIONS, Artifact, Request
from compression_dags.recipes import Recipe, options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore


def recipe_key(recipe: Recipe, name: str) -> dg.AssetKey:
    return dg.AssetKey([recipe.slug, name])


def build_merge_plan(recipe: Recipe) -> dg.AssetsDefinition:
    merge = recipe.merge
    assert merge is not None
    reads = [f"similarity_{need}" for need in merge.needs]
    reads += ["calibration_activations"] * merge.reads_statistics + ["calibration_tokens"] * merge.measures
    analysis = {name: dg.AssetIn(calibration_key(recipe.calibration, name)) for name in reads}

    @dg.asset(
        key=recipe_key(recipe, "merge_plan"),
        partitions_def=base_models,
        group_name=recipe.slug,
        kinds={"parquet"},
        tags={"recipe": recipe.name, "method": merge.method},
        code_version=f"{merge.code_version}:{options_digest(merge.options())}",
        ins={"base": dg.AssetIn(base_model.key), **analysis},
        description=f"`{merge.method}`: {(type(merge).__doc__ or '').strip()}",
        pool=GPU_POOL if merge.measures else None,
    )
    def merge_plan(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        base: Artifact,
        **analysis: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"base_model": base.digest, **{name: a.digest for name, a in analysis.items()}}

        def build(work):
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.depth.apply import removed_share
            from compression_dags.depth.stage import ProbeContext
            from compression_dags.provenance.decisions import write_decisions
            from compression_dags.similarity.evidence import read_evidence
            from compression_dags.stage import bar

            source = Checkpoint(base.checkpoint)
            merge.check(source.shape)
            paths = {name: handle.path for name, handle in analysis.items()}
            tokens, activations = paths.pop("calibration_tokens", None), paths.pop("calibration_activations", None)
            evidence = read_evidence(paths, activations)
            if tokens:
                with accelerator.lease() as device:
                    blocks = load_blocks(tokens / "tokens.safetensors")
                    probe = ProbeContext(source, blocks, device.name, device.dtype, work.resume(), bar)
                    plan, decisions = merge.plan(source.shape, evidence, probe)
            else:
                plan, decisions = merge.plan(source.shape, evidence)
            plan.save(work.out)
            write_decisions(decisions, work.out / DECISIONS)
            return {
                "layers_before": plan.base_layers,
                "layers_after": len(plan.layers),
                "ratio_asked": merge.ratio or merge.removed(plan.base_layers) / plan.base_layers,
                "ratio_of_layers": 1 - len(plan.layers) / plan.base_layers,
                **removed_share(source, plan),
                "dropped": ", ".join(map(str, plan.dropped)),
                "merged": "; ".join("+".join(map(str, x.sources)) for x in plan.layers if len(x.sources) > 1),
            }

        numeric = accelerator.numeric if merge.measures else {}
        request = Request("merge_plan", merge.code_version, merge.options(), inputs, numeric)
        return publish(context, store, request, build, recipe=recipe.as_run())

    return merge_plan


def build_merged_weights(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(
        key=recipe_key(recipe, "merged_weights"),
        partitions_def=base_models,
        group_name=recipe.slug,
        kinds={"torch", "safetensors"},
        tags={"recipe": recipe.name},
        code_version=VERSION,
        ins={"base": dg.AssetIn(base_model.key), "plan": dg.AssetIn(recipe_key(recipe, "merge_plan"))},
        description="The plan applied: layers renumbered, per-layer config remapped, reload gate passed.",
        pool=GPU_POOL,
    )
    def merged_weights(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        base: Artifact,
        plan: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"base_model": base.digest, "merge_plan": plan.digest}

        def build(work):
            from compression_dags.checkpoints.facts import record_size
            from compression_dags.checkpoints.gate import check_reload
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.depth.apply import apply_plan, reference_logits
            from compression_dags.depth.plan import MergePlan

            source, chosen = Checkpoint(base.checkpoint), MergePlan.load(plan.path)
            written = apply_plan(source, chosen, work.out / CHECKPOINT)
            with accelerator.lease() as device:
                reference = reference_logits(source, chosen, device=device.name, dtype=device.dtype)
                gate = check_reload(written.path, reference, device=device.name, dtype=device.dtype)
            return {**record_size(written, work.out), **gate}

        request = Request("merged_weights", VERSION, {}, inputs, accelerator.numeric)
        return publish(context, store, request, build, recipe=recipe.as_run())

    return merged_weights


def recovered_key(recipe: Recipe, index: int) -> dg.AssetKey:
    """`recovered_weights`, then `recovered_weights_2`, … for every further recovery stage."""
    return recipe_key(recipe, "recovered_weights" + (f"_{index + 1}" if index else ""))


def build_recovered_weights(recipe: Recipe, index: int, before: dg.AssetKey) -> dg.AssetsDefinition:
    recover = recipe.recoveries[index]

    @dg.asset(
        key=recovered_key(recipe, index),
        partitions_def=base_models,
        group_name=recipe.slug,
        kinds={"torch", "safetensors"},
        tags={"recipe": recipe.name, "method": recover.method},
        code_version=f"{recover.code_version}:{options_digest(recover.computing_options())}",
        ins={
            "base": dg.AssetIn(base_model.key),
            "tokens": dg.AssetIn(calibration_key(recipe.calibration, "calibration_tokens")),
            "plan": dg.AssetIn(recipe_key(recipe, "merge_plan")),
            "weights": dg.AssetIn(before),
        },
        description=f"`{recover.method}`: {(type(recover).__doc__ or '').strip()}",
        pool=GPU_POOL,
    )
    def recovered_weights(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        base: Artifact,
        tokens: Artifact,
        plan: Artifact,
        weights: Artifact,
    ) -> dg.Output[Artifact]:
        handles = {"base_model": base, "calibration_tokens": tokens, "merge_plan": plan, "weights": weights}
        inputs = {role: handle.digest for role, handle in handles.items()} | recover.data_digests()

        def build(work):
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.checkpoints.facts import record_size
            from compression_dags.checkpoints.gate import check_reload
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.depth.apply import reference_logits
            from compression_dags.depth.plan import MergePlan, keep_only
            from compression_dags.provenance.decisions import write_decisions
            from compression_dags.stage import bar

            teacher, student = Checkpoint(base.checkpoint), Checkpoint(weights.checkpoint)
            recover.check(teacher.shape)
            chosen = MergePlan.load(plan.path)
            blocks = load_blocks(tokens.path / "tokens.safetensors")
            with accelerator.lease() as device:
                on: dict[str, Any] = {"device": device.name, "dtype": device.dtype}
                recovery = recover.recover(
                    teacher, student, chosen, blocks, work.out / CHECKPOINT, **on, resume=work.resume(), progress=bar
                )
                same = keep_only("none", student.num_layers, list(range(student.num_layers)))
                reference = reference_logits(student, same, replaced=recovery.fitted, **on)
                gate = check_reload(recovery.checkpoint.path, reference, **on)
            write_decisions(recovery.decisions, work.out / DECISIONS)
            accepted = sum(d.action == "recover" for d in recovery.decisions)
            tally = {"accepted": accepted, "rejected": len(recovery.decisions) - accepted}
            return {**record_size(recovery.checkpoint, work.out), **recovery.facts, **tally, **gate}

        options = recover.computing_options()
        request = Request("recovered_weights", recover.code_version, options, inputs, accelerator.numeric)
        return publish(context, store, request, build, recipe=recipe.as_run())

    return recovered_weights
