"""Similarity artifacts: small tables and a picture, taken from the cached activation pass without another forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression_dags.calibration.statistics import HIDDEN_STATES, load_statistics
from compression_dags.depth.plan import Evidence
from compression_dags.errors import InputError
from compression_dags.provenance.plots import bars_png, heatmap_png, merge_tree_png

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "1"
#: Most tokens used: for KSG, whose cost is O(L² n log n), and for CKA, which holds L·n² numbers.
KSG_TOKENS, CKA_TOKENS = 512, 1024

Table = tuple[dict[str, np.ndarray], dict[str, Any], bytes]


def write_similarity(metric: str, activations: Path, directory: Path, device: str = "cpu") -> dict[str, Any]:
    """Write `similarity.safetensors` and `plot.png` of one metric; return its facts.

    Raises:
        InputError: an unknown metric, statistics that are not finite, or states that give no similarity (too few
            tokens, a constant layer, …).
    """
    from safetensors.numpy import save_file

    if metric not in METRICS:
        raise InputError(f"similarity metric {metric!r} is unknown; allowed: {', '.join(METRICS)}")
    arrays, facts, png = METRICS[metric](activations, device)
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


# -- the merge tree -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """One step of merging neighbours.

    Attributes:
        first, second: adjacent groups of layers; `second` starts where `first` stops.
        value: mean similarity of their members.
        low, high: the mean of the members' interval bounds.
        overlaps: other candidates of the same step whose interval reaches `low`: from that many, this merge cannot be
            told apart.
    """

    first: range
    second: range
    value: float
    low: float
    high: float
    overlaps: int


def merge_tree(
    similarity: np.ndarray,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    *,
    allowed: Callable[[range, range], bool] = lambda first, second: True,
    count: int | None = None,
) -> list[Merge]:
    """Merge the most similar allowed neighbours, again and again, with mean linkage; of equal ones the rear.

    Args:
        similarity, low, high: (L, L), and the bounds of its interval (default: the value itself).
        allowed: whether two neighbouring groups may become one.
        count: merges wanted; None goes on while any is allowed.

    Returns:
        Merges in order, fewer than `count` if no more are allowed.
    """
    bounds = [similarity if b is None else b for b in (similarity, low, high)]
    groups = [range(i, i + 1) for i in range(len(similarity))]
    found: list[Merge] = []
    while count is None or len(found) < count:
        pairs = [(a, b) for a, b in itertools.pairwise(groups) if allowed(a, b)]
        if not pairs:
            break
        scores = [[float(m[a.start : a.stop, b.start : b.stop].mean()) for m in bounds] for a, b in pairs]
        best = max(range(len(pairs)), key=lambda i: (scores[i][0], i))
        value, least, most = scores[best]
        overlaps = sum(i != best and score[2] >= least for i, score in enumerate(scores))
        first, second = pairs[best]
        found.append(Merge(first, second, value, least, most, overlaps))
        place = groups.index(first)
        groups[place : place + 2] = [range(first.start, second.stop)]
    return found


# -- metrics --------------------------------------------------------------------------------------------------------


def _block_influence(activations: Path, device: str) -> Table:
    statistics = load_statistics(activations)
    arrays = {name: statistics[name] for name in ("block_influence", "block_influence_stderr")}
    lowest = np.argsort(arrays["block_influence"], kind="stable")
    facts = {
        "least_influential_layer": int(lowest[0]),
        "least_influence": float(arrays["block_influence"][lowest[0]]),
    }
    png = bars_png(arrays["block_influence"], arrays["block_influence_stderr"], "layer", "block influence")
    return arrays, facts, png


def _angular(activations: Path, device: str) -> Table:
    statistics = load_statistics(activations)
    arrays = {"angular": statistics["angular"], "angular_last": statistics["angular_last"]}
    neighbours = np.diagonal(arrays["angular"], 1)
    facts = {"closest_neighbours": int(neighbours.argmin()), "least_distance": float(neighbours.min())}
    return arrays, facts, heatmap_png(arrays["angular"], "entry of layer", "angular distance / π")


def _npib(activations: Path, device: str) -> Table:
    """NPIB of layer outputs by three estimators, its interval, and the released code's own similarity.

    What an estimator cannot give on this model (too few tokens for KSG, a degenerate kernel at the released σ = 8) is
    left out, and the facts say why; the default estimator must work.
    """
    import torch

    from compression_dags.similarity import npib
    from compression_dags.similarity.diffusion import diffusion_embedding, distinct_rows

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
    facts: dict[str, Any] = {"tokens": len(rows), "copies": len(sampled) - len(rows), "bins": bins}
    fewer = points[:, _spread(points.shape[1], KSG_TOKENS)]
    for name, says, compute in (
        ("npib_ksg", f"{fewer.shape[1]} tokens", lambda: npib.ksg(fewer)),
        ("npib_released", f"{npib.RELEASED_TOKENS} tokens", lambda: npib.released(first_tokens[:-1], device)),
    ):
        try:
            arrays[name] = compute().numpy()
            facts[name] = says
        except InputError as error:
            facts[name] = f"not computed: {error}"
    return _with_tree("npib", arrays, facts, "S = I / √(H H), binned")


def _cka(activations: Path, device: str) -> Table:
    from compression_dags.similarity import cka

    hidden, sampled, _ = _states(activations)
    rows = _spread(hidden.shape[1], CKA_TOKENS)
    value, low, high = cka.bootstrap(hidden[1:, rows], sampled[rows, 0], device=device)
    arrays = {"cka": value.numpy(), "cka_low": low, "cka_high": high}
    return _with_tree("cka", arrays, {"tokens": len(rows)}, "debiased linear CKA")


def _states(activations: Path) -> tuple[Tensor, np.ndarray, Tensor]:
    """hidden (L+1, n, d), sampled (n, 2), first_tokens (L+1, m, d) of a stored pass."""
    from safetensors.torch import load_file

    stored = load_file(activations / HIDDEN_STATES)
    return stored["hidden"], stored["sampled"].numpy(), stored["first_tokens"]


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` indices, evenly spaced: sampled tokens are in reading order, so all sequences stay."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(np.int64)


def _with_tree(metric: str, arrays: dict[str, np.ndarray], facts: dict[str, Any], label: str) -> Table:
    tree = merge_tree(arrays[metric], arrays[f"{metric}_low"], arrays[f"{metric}_high"])
    if tree:
        best = tree[0]
        facts = {
            "closest_layers": f"{best.first.start}-{best.second.start}",
            "similarity": best.value,
            "low": best.low,
            "high": best.high,
            "not_told_apart": best.overlaps,
            **facts,
        }
    png = merge_tree_png(arrays[metric], [(m.first, m.second, m.value) for m in tree], "output of layer", label)
    return arrays, facts, png


METRICS: dict[str, Callable[[Path, str], Table]] = {
    "block_influence": _block_influence,
    "angular": _angular,
    "npib": _npib,
    "cka": _cka,
}
