"""The small statistics of a calibration pass, read without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

#: Code version of the calibration pass.
VERSION = "2"
STATISTICS = "statistics.safetensors"
HIDDEN_STATES = "hidden_states.safetensors"


def load_statistics(directory: Path) -> dict[str, np.ndarray]:
    """`block_influence` (L,), `angular` (L+1, L+1), `norms.layers.3.mlp_input.mean_square` (channels,), … float64."""
    from safetensors.numpy import load_file

    return load_file(directory / STATISTICS)
