"""What `quantization_plan` and `alternatives` do: measure, and choose."""

from __future__ import annotations

from typing import Any

from compression_dags.calibration.job_tokens import tokens_of
from compression_dags.calibration.statistics import load_statistics
from compression_dags.job import Job
from compression_dags.planning.candidate_table import bank_decisions, measure_bank
from compression_dags.planning.mixed import plan_schemes
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.step import BASE


def choose_schemes(job: Job) -> dict[str, Any]:
    """Bits a weight and predicted KL of the chosen schemes, which it writes with a decision row for every group."""
    stage, source = job.stage, job.checkpoint()
    assert isinstance(stage, QuantizeStage)
    stage.check(source.shape)
    with job.device() as on:
        plan, decisions = plan_schemes(stage, source, tokens_of(job), **on, progress=job.progress)
    plan.save(job.out)
    job.decide(decisions)
    return {"bits_per_weight": plan.bits, "predicted_kl": plan.cost}


def measure_candidates(job: Job) -> dict[str, Any]:
    """Counts of the measured candidates, which it writes with a decision row for each."""
    activations = job.path("calibration_activations")
    found = load_statistics(activations) if activations else None
    with job.device() as on:
        table = measure_bank(
            job.checkpoint(BASE), tokens_of(job), job.stage, **on, statistics=found, progress=job.progress
        )
    table.save(job.out)
    job.decide(bank_decisions(table))
    alive = sum(candidate.alive for candidate in table.alternatives)
    return {"alternatives": len(table.alternatives), "alive": alive, "tokens": table.tokens}
