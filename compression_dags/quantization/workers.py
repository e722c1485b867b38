"""What `quantized_weights` does: round, pack, and check that the checkpoint loads in stock transformers."""

from __future__ import annotations

from typing import Any

from compression_dags.calibration.job_tokens import tokens_of
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.serving_lint import serving_fact
from compression_dags.checkpoints.size import record_size
from compression_dags.job import Job
from compression_dags.quantization.scheme_plan import SchemePlan
from compression_dags.quantization.stage import QuantizeStage


def quantize(job: Job) -> dict[str, Any]:
    """Size of the quantized checkpoint, bits a weight, its reload gate, and whether vLLM would serve it."""
    stage, source = job.stage, job.checkpoint()
    assert isinstance(stage, QuantizeStage)
    stage.check(source.shape)
    blocks = tokens_of(job) if "calibration_tokens" in job.inputs else None
    plan = job.path("quantization_plan")
    schemes = SchemePlan.load(plan).choices if plan else None
    with job.device() as on:
        model = stage.quantize(
            source, job.target, blocks=blocks, schemes=schemes, **on, resume=job.resume, progress=job.progress
        )
        reference = stage.reference_logits(source, rounding=model.rounding, **on)
        gate = check_reload(model.checkpoint.path, reference, **on)
    gate["serving"] = serving_fact(model.checkpoint.path)
    job.decide(model.decisions)
    metadata = record_size(model.checkpoint, job.out, job.inputs["weights"].size["parameters"])
    return {**metadata, "bits_per_weight": model.bits_per_weight, "scheme": stage.scheme, **gate}
