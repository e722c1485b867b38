"""What `recovered_weights` does: repair the model that a merge left."""

from __future__ import annotations

from typing import Any

from compression_dags.calibration.job_tokens import tokens_of
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.size import record_size
from compression_dags.depth.apply import reference_logits
from compression_dags.depth.plan import MergePlan, keep_only
from compression_dags.job import Job
from compression_dags.recovery.stage import RecoverStage
from compression_dags.step import BASE


def recover(job: Job) -> dict[str, Any]:
    """Size of the recovered checkpoint, how many repairs were accepted, and what its reload gate measured."""
    stage, teacher, student = job.stage, job.checkpoint(BASE), job.checkpoint()
    assert isinstance(stage, RecoverStage)
    stage.check(teacher.shape)
    plan = MergePlan.load(job.inputs["merge_plan"].path)
    with job.device() as on:
        found = stage.recover(
            teacher, student, plan, tokens_of(job), job.target, **on, resume=job.resume, progress=job.progress
        )
        same = keep_only("none", student.num_layers, list(range(student.num_layers)))
        reference = reference_logits(student, same, replaced=found.fitted, **on)
        gate = check_reload(found.checkpoint.path, reference, **on)
    job.decide(found.decisions)
    accepted = sum(d.action == "recover" for d in found.decisions)
    tally = {"accepted": accepted, "rejected": len(found.decisions) - accepted}
    return {**record_size(found.checkpoint, job.out), **found.metadata, **tally, **gate}
