"""Size of a checkpoint: a file that scorecards read, and metadata of its artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.provenance.artifacts import write_size


def record_size(checkpoint: Checkpoint, directory: Path, parameters: int | None = None) -> dict[str, Any]:
    """Layers, parameters and bytes of the weight files, also written to `size.json` in the artifact's directory.

    Args:
        parameters: counts a quantized matrix as the dense one it stands for; None counts the stored numbers.
    """
    numel = checkpoint.numel if parameters is None else parameters
    size = {"layers": checkpoint.num_layers, "parameters": numel, "bytes": checkpoint.nbytes}
    write_size(directory, size)
    return size
