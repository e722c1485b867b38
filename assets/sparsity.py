"""`sparsity_plan` and `sparse_weights` of one recipe."""

from typing import Any

import dagster as dg

from compression_dags.assets.base_models import base_models
from compression_dags.assets.calibration import calibration_key
from compression_dags.assets.merging import recipe_key
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.provenance.artifacts import CHECKPOINT, DECISIONS, Artifact, Request
from compression_dags.recipes import Recipe, options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.sparsity.identity import plan_identity


def build_sparsity_plan(recipe: Recipe, weights_key: dg.AssetKey) -> dg.AssetsDefinition:
    sparsify = recipe.sparsify
    assert sparsify is not None
    allocation = sparsify.allocation
    reads = recipe.sparsity_reads
    ins = {"weights": dg.AssetIn(weights_key)}
    ins |= {name: dg.AssetIn(calibration_key(recipe.calibration, name)) for name in reads}
    samples, seed = recipe.calibration.samples, recipe.calibration.seed
    options = plan_identity(sparsify, reads, samples, seed)

    @dg.asset(
        key=recipe_key(recipe, "sparsity_plan"),
        partitions_def=base_models,
        group_name=recipe.slug,
        kinds={"parquet"},
        tags={"recipe": recipe.name, "method": allocation.method},
        code_version=f"{sparsify.code_version}:{options_digest(options)}",
        ins=ins,
        description=f"`{allocation.method}`: {(type(allocation).__doc__ or '').strip()}",
        pool=GPU_POOL if "calibration_tokens" in reads else None,
    )
    def sparsity_plan(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        weights: Artifact,
        **analysis: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"weights": weights.digest, **{name: a.digest for name, a in analysis.items()}}

        def build(work):
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.provenance.decisions import write_decisions
            from compression_dags.sparsity.evidence import PruneProbe, fresh_evidence, stored_evidence
            from compression_dags.stage import bar

            source = Checkpoint(weights.checkpoint)
            sparsify.check(source.shape)
            paths = {name: handle.path for name, handle in analysis.items()}
            if tokens := paths.get("calibration_tokens"):
                with accelerator.lease() as device:
                    on: dict[str, Any] = {"device": device.name, "dtype": device.dtype}
                    blocks = load_blocks(tokens / "tokens.safetensors")
                    evidence = fresh_evidence(
                        source, allocation, blocks, samples=samples, seed=seed, **on, progress=bar
                    )
                    plan, decisions = sparsify.plan(source, evidence, PruneProbe(sparsify, source, blocks, **on))
            else:
                evidence = stored_evidence(
                    source, paths.get("calibration_activations"), paths.get("similarity_redundancy")
                )
                plan, decisions = sparsify.plan(source, evidence, PruneProbe(sparsify, source))
            plan.save(work.out)
            write_decisions(decisions, work.out / DECISIONS)
            shares = [p.sparsity for p in plan.patterns.values()]
            notes = {"notes": "; ".join(plan.evidence["notes"])} if plan.evidence.get("notes") else {}
            planned = plan.evidence["summary"]["planned_mean"]
            facts = {"target": plan.target, "pattern": plan.pattern, "planned": planned}
            return {**facts, "matrices": len(shares), "least": min(shares), "most": max(shares), **notes}

        numeric = accelerator.numeric if "calibration_tokens" in reads else {}
        request = Request("sparsity_plan", sparsify.code_version, options, inputs, numeric)
        return publish(context, store, request, build, recipe=recipe.as_run())

    return sparsity_plan


def build_sparse_weights(recipe: Recipe, weights_key: dg.AssetKey) -> dg.AssetsDefinition:
    sparsify = recipe.sparsify
    assert sparsify is not None
    ins = {"weights": dg.AssetIn(weights_key), "plan": dg.AssetIn(recipe_key(recipe, "sparsity_plan"))}
    if sparsify.reads_tokens:
        ins["tokens"] = dg.AssetIn(calibration_key(recipe.calibration, "calibration_tokens"))

    @dg.asset(
        key=recipe_key(recipe, "sparse_weights"),
        partitions_def=base_models,
        group_name=recipe.slug,
        kinds={"torch", "safetensors"},
        tags={"recipe": recipe.name, "method": sparsify.method},
        code_version=f"{sparsify.version}:{options_digest(sparsify.prune_options())}",
        ins=ins,
        description=f"`{sparsify.method}`: {(type(sparsify).__doc__ or '').strip()}",
        pool=GPU_POOL,
    )
    def sparse_weights(
        context: dg.AssetExecutionContext,
        store: ArtifactStore,
        accelerator: Accelerator,
        weights: Artifact,
        plan: Artifact,
        **tokens: Artifact,
    ) -> dg.Output[Artifact]:
        inputs = {"weights": weights.digest, "sparsity_plan": plan.digest}
        if tokens:
            inputs["calibration_tokens"] = tokens["tokens"].digest

        def build(work):
            from compression_dags.calibration.corpora import load_blocks
            from compression_dags.checkpoints.facts import record_size
            from compression_dags.checkpoints.gate import check_reload
            from compression_dags.checkpoints.reader import Checkpoint
            from compression_dags.provenance.decisions import write_decisions
            from compression_dags.sparsity.allocation import SparsityPlan
            from compression_dags.stage import bar

            source, chosen = Checkpoint(weights.checkpoint), SparsityPlan.load(plan.path)
            sparsify.check(source.shape)
            blocks = load_blocks(tokens["tokens"].path / "tokens.safetensors") if tokens else None
            with accelerator.lease() as device:
                on: dict[str, Any] = {"device": device.name, "dtype": device.dtype}
                sparse = sparsify.sparsify(
                    source, chosen, blocks, work.out / CHECKPOINT, **on, resume=work.resume(), progress=bar
                )
                gate = check_reload(sparse.checkpoint.path, sparse.reference_logits(source, **on), **on)
            write_decisions(sparse.decisions, work.out / DECISIONS)
            return {**record_size(sparse.checkpoint, work.out), **sparse.facts, **gate}

        options = sparsify.prune_options()
        request = Request("sparse_weights", sparsify.version, options, inputs, accelerator.numeric)
        return publish(context, store, request, build, recipe=recipe.as_run())

    return sparse_weights
