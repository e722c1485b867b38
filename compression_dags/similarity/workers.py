"""What `similarity_*` do."""

from __future__ import annotations

from typing import Any

from compression_dags.job import Job
from compression_dags.similarity.redundancy_tables import write_redundancy
from compression_dags.similarity.tables import write_similarity


def measure(job: Job) -> dict[str, Any]:
    """Metadata of one similarity of layers, whose tables and plot it writes."""
    return write_similarity(job.stage, job.inputs["calibration_activations"].path, job.out)


def redundancy(job: Job) -> dict[str, Any]:
    """Metadata of the redundancy of layers and modules, whose tables and plots it writes."""
    return write_redundancy(job.inputs["calibration_activations"].path, job.out)
