"""What planners may read of a model: the small statistics of the calibration pass, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from compression_dags.calibration.statistics import load_statistics

#: Code version of the similarity tables.
VERSION = "1"


@dataclass(frozen=True)
class Evidence:
    """What planners may read: small statistics of the calibration pass.

    Attributes:
        block_influence: (L,).
        angular, angular_last: (L+1, L+1), mean angle over π between the states at the entries of two layers.
        similarity: arrays of every other similarity artifact that the method needs, by name (`npib`, `cka`, …).
        statistics: what the calibration pass left (`norms.layers.3.mlp_output.mean_abs` → (channels,), …); filled for
            methods with `reads_statistics`.
    """

    block_influence: np.ndarray
    angular: np.ndarray
    angular_last: np.ndarray
    similarity: Mapping[str, np.ndarray] = field(default_factory=dict)
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)


def read_evidence(directories: dict[str, Path], activations: Path | None = None) -> Evidence:
    """Evidence for a planner from the similarity artifacts it asked for (metric → directory), and the calibration
    pass's statistics if it reads them."""
    arrays: dict[str, np.ndarray] = {}
    for directory in directories.values():
        arrays |= load_file(directory / "similarity.safetensors")
    empty = np.empty(0)
    first = [arrays.pop(name, empty) for name in ("block_influence", "angular", "angular_last")]
    statistics = load_statistics(activations) if activations else {}
    return Evidence(first[0], first[1], first[2], arrays, statistics)
