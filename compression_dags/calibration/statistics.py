"""The small statistics of a calibration pass, read without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

#: Code version of the calibration pass.
VERSION = "3"
STATISTICS = "statistics.safetensors"
HIDDEN_STATES = "hidden_states.safetensors"
MODULE_ALIGNMENT = "module_alignment.safetensors"


def load_statistics(directory: Path) -> dict[str, np.ndarray]:
    """`block_influence` (L,), `angular` (L+1, L+1), `norms.layers.3.mlp_input.mean_square` (channels,), … float64."""
    return load_file(directory / STATISTICS)


def load_alignment(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]], dict[str, int]]:
    """How alike the features of every two modules are, on some of the sampled tokens.

    Returns:
        tables: `in.cka-debiased.token` → (P, P) float32: family (`in`, `out`) . mode . `token` or `raw` (with and
            without every token's features scaled to length 1). Those of too few tokens are absent.
        labels: family → what its rows are: `3.mlp_input` (a group's shared input), `3.mlp.up_proj` (an output).
        tokens: `paper`: tokens used by that mode; `centred`: by the others, which skip the first positions.
    """
    with safe_open(directory / MODULE_ALIGNMENT, framework="numpy") as file:
        note = json.loads(file.metadata()["alignment"])
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tables, note["labels"], note["tokens"]
