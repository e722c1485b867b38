"""What `merge_plan` and `merged_weights` do: decide which layers stay, and write the model that is left."""

from __future__ import annotations

from typing import Any

from compression_dags.calibration.job_tokens import tokens_of
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.size import record_size
from compression_dags.depth.apply import apply_plan, reference_logits, removed_share
from compression_dags.depth.plan import MergePlan
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.job import Job
from compression_dags.similarity.evidence import read_evidence
from compression_dags.step import BASE


def plan(job: Job) -> dict[str, Any]:
    """Metadata of the depth plan, which it writes with a decision row for every layer."""
    merge, source = job.stage, job.checkpoint(BASE)
    assert isinstance(merge, MergeStage)
    merge.check(source.shape)
    paths = {role: artifact.path for role, artifact in job.inputs.items() if role.startswith("similarity_")}
    evidence = read_evidence(paths, job.path("calibration_activations"))
    if merge.measures:
        with job.device() as on:
            probe = ProbeContext(source, tokens_of(job), on["device"], on["dtype"], job.resume, job.progress)
            chosen, decisions = merge.plan(source.shape, evidence, probe)
    else:
        chosen, decisions = merge.plan(source.shape, evidence)
    chosen.save(job.out)
    job.decide(decisions)
    return {
        "layers_before": chosen.base_layers,
        "layers_after": len(chosen.layers),
        "ratio_asked": merge.ratio or merge.removed(chosen.base_layers) / chosen.base_layers,
        "ratio_of_layers": 1 - len(chosen.layers) / chosen.base_layers,
        **removed_share(source, chosen),
        "dropped": ", ".join(map(str, chosen.dropped)),
        "merged": "; ".join("+".join(map(str, x.sources)) for x in chosen.layers if len(x.sources) > 1),
    }


def apply(job: Job) -> dict[str, Any]:
    """Size of the merged checkpoint, and what its reload gate measured."""
    source, chosen = job.checkpoint(BASE), MergePlan.load(job.inputs["merge_plan"].path)
    written = apply_plan(source, chosen, job.target)
    with job.device() as on:
        reference = reference_logits(source, chosen, **on)
        gate = check_reload(written.path, reference, **on)
    return {**record_size(written, job.out), **gate}
