"""What `calibration_tokens` and `calibration_activations` do."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import Calibration, make_blocks, read_documents, save_blocks
from compression_dags.calibration.job_tokens import tokens_of
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.job import Job
from compression_dags.step import BASE


def pack_tokens(job: Job) -> dict[str, Any]:
    """Counts of the calibration set, which it writes to `tokens.safetensors`."""
    base, calibration = job.inputs[BASE], job.stage
    assert isinstance(calibration, Calibration)
    tokenizer = AutoTokenizer.from_pretrained(base.checkpoint, local_files_only=True)
    blocks = make_blocks(read_documents(calibration.corpus), tokenizer, calibration, base.size["context"])
    save_blocks(blocks, job.out / "tokens.safetensors")
    sequences, length = blocks.ids.shape
    counts = {"sequences": sequences, "length": length, "tokens": blocks.tokens, "documents": blocks.documents}
    return {"corpus": calibration.corpus, **counts}


def profile(job: Job) -> dict[str, Any]:
    """Counts of one streamed pass over the calibration set, whose statistics it writes."""
    options = job.step.options
    with job.device() as on:
        stream = DecoderStream(job.checkpoint(BASE), **on)
        found = profile_activations(
            stream,
            tokens_of(job),
            samples=options["samples"],
            seed=options["seed"],
            resume=job.resume,
            progress=job.progress,
        )
        stream.close()
    found.save(job.out)
    return {"tokens": found.tokens, "layers": stream.num_layers, "sampled_tokens": len(found.sampled)}
