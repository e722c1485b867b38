"""The calibration set as a step gets it."""

from __future__ import annotations

from compression_dags.calibration.corpora import TokenBlocks, load_blocks
from compression_dags.job import Job


def tokens_of(job: Job) -> TokenBlocks:
    """The calibration set among a job's inputs: ids (sequences, length) int32, with the length of each row."""
    return load_blocks(job.inputs["calibration_tokens"].path / "tokens.safetensors")
