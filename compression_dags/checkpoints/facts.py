"""Size of a checkpoint, in the facts of its artifact."""

from __future__ import annotations

from typing import Any

from compression_dags.checkpoints.reader import Checkpoint


def weight_facts(checkpoint: Checkpoint, parameters: int | None = None) -> dict[str, Any]:
    """Layers, parameters and bytes of the weight files.

    `parameters` counts a quantized matrix as the dense one it stands for; None counts the stored numbers.
    """
    numel = checkpoint.numel if parameters is None else parameters
    return {"layers": checkpoint.num_layers, "parameters": numel, "bytes": checkpoint.nbytes}
