"""Similarity artifacts: small tables and a picture, taken from the cached activation pass without another forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compression_dags.calibration.statistics import load_statistics
from compression_dags.errors import InputError
from compression_dags.merging.plan import Evidence
from compression_dags.provenance.plots import bars_png, heatmap_png


def write_similarity(metric: str, activations: Path, directory: Path) -> dict[str, Any]:
    """Write `similarity.safetensors` and `plot.png` of one metric; return its facts.

    Raises:
        InputError: the statistics are not finite.
    """
    from safetensors.numpy import save_file

    statistics = load_statistics(activations)
    if metric == "block_influence":
        arrays = {name: statistics[name] for name in ("block_influence", "block_influence_stderr")}
        lowest = np.argsort(arrays["block_influence"], kind="stable")
        facts = {
            "least_influential_layer": int(lowest[0]),
            "least_influence": float(arrays["block_influence"][lowest[0]]),
        }
        png = bars_png(arrays["block_influence"], arrays["block_influence_stderr"], "layer", "block influence")
    elif metric == "angular":
        arrays = {"angular": statistics["angular"], "angular_last": statistics["angular_last"]}
        neighbours = np.diagonal(arrays["angular"], 1)
        facts = {"closest_neighbours": int(neighbours.argmin()), "least_distance": float(neighbours.min())}
        png = heatmap_png(arrays["angular"], "entry of layer", "angular distance / π")
    else:
        raise InputError(f"similarity metric {metric!r} is unknown; allowed: block_influence, angular")
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise InputError(f"similarity_{metric}: the calibration statistics are not finite")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, directory / "similarity.safetensors")
    (directory / "plot.png").write_bytes(png)
    return facts


def read_evidence(directories: dict[str, Path], activations: Path | None = None) -> Evidence:
    """Evidence for a planner from the similarity artifacts it asked for (metric → directory), and the calibration
    pass's statistics if it reads them."""
    from safetensors.numpy import load_file

    arrays: dict[str, np.ndarray] = {}
    for directory in directories.values():
        arrays |= load_file(directory / "similarity.safetensors")
    empty = np.empty(0)
    first = [arrays.pop(name, empty) for name in ("block_influence", "angular", "angular_last")]
    statistics = load_statistics(activations) if activations else {}
    return Evidence(first[0], first[1], first[2], arrays, statistics)
