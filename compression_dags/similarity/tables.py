"""Similarity artifacts: small tables and a picture, from the cached activation pass without another forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from compression_dags.calibration.statistics import HIDDEN_STATES, load_statistics
from compression_dags.errors import InputError
from compression_dags.provenance.plots import bars_png, heatmap_png, merge_tree_png
from compression_dags.similarity import cka, npib
from compression_dags.similarity.diffusion import diffusion_embedding, distinct_rows
from compression_dags.similarity.merge_tree import merge_tree

if TYPE_CHECKING:
    from torch import Tensor

#: Most tokens used: for KSG, whose cost is O(L² n log n), and for CKA, which holds L·n² numbers.
KSG_TOKENS, CKA_TOKENS = 512, 1024

Table = tuple[dict[str, np.ndarray], dict[str, Any], bytes]


def write_similarity(metric: str, activations: Path, directory: Path, device: str = "cpu") -> dict[str, Any]:
    """Metadata of one metric, whose `similarity.safetensors` and `plot.png` it writes.

    Raises:
        InputError: an unknown metric, statistics that are not finite, or states that give no similarity (too few
            tokens, a constant layer, …).
    """
    if metric not in METRICS:
        raise InputError(f"similarity metric {metric!r} is unknown; allowed: {', '.join(METRICS)}")
    arrays, metadata, png = METRICS[metric](activations, device)
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise InputError(f"similarity_{metric}: the calibration statistics are not finite")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, directory / "similarity.safetensors")
    (directory / "plot.png").write_bytes(png)
    return metadata


def _block_influence(activations: Path, device: str) -> Table:
    statistics = load_statistics(activations)
    arrays = {name: statistics[name] for name in ("block_influence", "block_influence_stderr")}
    lowest = np.argsort(arrays["block_influence"], kind="stable")
    metadata = {
        "least_influential_layer": int(lowest[0]),
        "least_influence": float(arrays["block_influence"][lowest[0]]),
    }
    png = bars_png(arrays["block_influence"], arrays["block_influence_stderr"], "layer", "block influence")
    return arrays, metadata, png


def _angular(activations: Path, device: str) -> Table:
    statistics = load_statistics(activations)
    arrays = {"angular": statistics["angular"], "angular_last": statistics["angular_last"]}
    neighbours = np.diagonal(arrays["angular"], 1)
    metadata = {"closest_neighbours": int(neighbours.argmin()), "least_distance": float(neighbours.min())}
    return arrays, metadata, heatmap_png(arrays["angular"], "entry of layer", "angular distance / π")


def _npib(activations: Path, device: str) -> Table:
    """NPIB of layer outputs by three estimators, its interval, and the released code's own similarity.

    What an estimator cannot give on this model (too few tokens for KSG, a degenerate kernel at the released σ = 8) is
    left out, and the metadata says why. The default estimator must work.
    """
    hidden, sampled, first_tokens = _states(activations)
    outputs = hidden[1:]
    rows = distinct_rows(outputs)
    bins = npib.bins_for(len(rows))
    embedding = diffusion_embedding(outputs[:, torch.from_numpy(rows)], device=device)
    points = embedding.coordinates
    arrays = {
        "npib": npib.binned(points, bins, device).numpy(),
        "npib_gaussian_copula": npib.gaussian_copula(points, device=device).numpy(),
        "npib_sigma": embedding.sigma.numpy(),
        "npib_spectrum": embedding.spectrum.numpy(),
        "npib_samples": np.array([len(rows)]),
        "npib_bins": np.array([bins]),
    }
    arrays["npib_low"], arrays["npib_high"] = npib.bootstrap(points, sampled[rows, 0], bins=bins, device=device)
    metadata: dict[str, Any] = {"tokens": len(rows), "copies": len(sampled) - len(rows), "bins": bins}
    fewer = points[:, _spread(points.shape[1], KSG_TOKENS)]
    for name, says, compute in (
        ("npib_ksg", f"{fewer.shape[1]} tokens", lambda: npib.ksg(fewer)),
        ("npib_released", f"{npib.RELEASED_TOKENS} tokens", lambda: npib.released(first_tokens[:-1], device)),
    ):
        try:
            arrays[name] = compute().numpy()
            metadata[name] = says
        except InputError as error:
            metadata[name] = f"not computed: {error}"
    return _with_tree("npib", arrays, metadata, "S = I / √(H H), binned")


def _cka(activations: Path, device: str) -> Table:
    hidden, sampled, _ = _states(activations)
    rows = _spread(hidden.shape[1], CKA_TOKENS)
    value, low, high = cka.bootstrap(hidden[1:, rows], sampled[rows, 0], device=device)
    arrays = {"cka": value.numpy(), "cka_low": low, "cka_high": high}
    return _with_tree("cka", arrays, {"tokens": len(rows)}, "debiased linear CKA")


def _states(activations: Path) -> tuple[Tensor, np.ndarray, Tensor]:
    """hidden (L+1, n, d), sampled (n, 2), first_tokens (L+1, m, d) of a stored pass."""
    stored = load_file(activations / HIDDEN_STATES)
    return stored["hidden"], stored["sampled"].numpy(), stored["first_tokens"]


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` indices, evenly spaced: sampled tokens are in reading order, so all sequences stay."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(np.int64)


def _with_tree(metric: str, arrays: dict[str, np.ndarray], metadata: dict[str, Any], label: str) -> Table:
    tree = merge_tree(arrays[metric], arrays[f"{metric}_low"], arrays[f"{metric}_high"])
    if tree:
        best = tree[0]
        metadata = {
            "closest_layers": f"{best.first.start}-{best.second.start}",
            "similarity": best.value,
            "low": best.low,
            "high": best.high,
            "not_told_apart": best.overlaps,
            **metadata,
        }
    png = merge_tree_png(arrays[metric], [(m.first, m.second, m.value) for m in tree], "output of layer", label)
    return arrays, metadata, png


METRICS: dict[str, Callable[[Path, str], Table]] = {
    "block_influence": _block_influence,
    "angular": _angular,
    "npib": _npib,
    "cka": _cka,
}
