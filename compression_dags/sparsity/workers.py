"""What `sparsity_plan` and `sparse_weights` do: share out the zeros, and prune."""

from __future__ import annotations

from typing import Any

from compression_dags.calibration.job_tokens import tokens_of
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.size import record_size
from compression_dags.job import Job
from compression_dags.sparsity.allocation import SparsityPlan
from compression_dags.sparsity.evidence import PruneProbe, fresh_evidence, stored_evidence
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import Progress


def plan(job: Job) -> dict[str, Any]:
    """Metadata of the sparsity plan, which it writes with a decision row for every matrix."""
    stage, source = job.stage, job.checkpoint()
    assert isinstance(stage, SparsifyStage)
    stage.check(source.shape)
    if "calibration_tokens" in job.inputs:
        pass_options = job.step.options.get("evidence", {})
        with job.device() as on:
            blocks, progress = tokens_of(job), job.progress
            evidence = fresh_evidence(source, stage.allocation, blocks, **pass_options, **on, progress=progress)
            chosen, decisions = stage.plan(source, evidence, PruneProbe(stage, source, blocks, **on))
    else:
        evidence = stored_evidence(source, job.path("calibration_activations"), job.path("similarity_redundancy"))
        chosen, decisions = stage.plan(source, evidence, PruneProbe(stage, source))
    chosen.save(job.out)
    job.decide(decisions)
    shares = [p.sparsity for p in chosen.patterns.values()]
    notes = {"notes": "; ".join(chosen.evidence["notes"])} if chosen.evidence.get("notes") else {}
    metadata = {
        "target": chosen.target,
        "pattern": chosen.pattern,
        "planned": chosen.evidence["summary"]["planned_mean"],
    }
    return {**metadata, "matrices": len(shares), "least": min(shares), "most": max(shares), **notes}


def prune(job: Job) -> dict[str, Any]:
    """Size of the pruned checkpoint, what the pass measured, and its reload gate."""
    stage, source, chosen = job.stage, job.checkpoint(), SparsityPlan.load(job.inputs["sparsity_plan"].path)
    assert isinstance(stage, SparsifyStage)
    stage.check(source.shape)
    blocks = tokens_of(job) if stage.reads_tokens else None
    progress: Progress = job.progress
    with job.device() as on:
        sparse = stage.sparsify(source, chosen, blocks, job.target, **on, resume=job.resume, progress=progress)
        gate = check_reload(sparse.checkpoint.path, sparse.reference_logits(source, **on), **on)
    job.decide(sparse.decisions)
    return {**record_size(sparse.checkpoint, job.out), **sparse.metadata, **gate}
