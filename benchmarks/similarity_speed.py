"""Speed of the similarity of layers, against the released code's form of it, on one CPU in one run.

    python benchmarks/similarity_speed.py --out similarity_speed.json
    python benchmarks/similarity_speed.py --tiny                                      # seconds on a CPU: does it run

States are synthetic (a residual stream of L layers); only their number matters. The reference does what the released
code does after its embedding: for every pair of layers two calls of scikit-learn's `mutual_info_regression` with two
features each, and both entropies anew. It is timed whole at n = 57, and on a sample of pairs, scaled to all of them, at
n = 512; the JSON says which. Floors are stated beside. Both sides run on one thread, so that the ratio does not depend
on the number of cores or on what else they do.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # read when numpy and torch are first imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from compression_dags.similarity import cka, npib  # noqa: E402
from compression_dags.similarity.diffusion import diffusion_embedding  # noqa: E402

FLOORS = {"ksg over scikit-learn per pair, n = 57": 100, "binned, n = 57, milliseconds": 50}
DISTINCT = 2048  # tokens of the default calibration


def states(layers: int, tokens: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(layers, tokens, width, generator=generator).cumsum(0)
    return torch.randn(1, tokens, width, generator=generator) * 4 + drift


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def reference(ranks: np.ndarray, most_pairs: int | None) -> tuple[float, int, int]:
    """Seconds of the released form over all pairs of layers; pairs timed, pairs in all."""
    from sklearn.feature_selection import mutual_info_regression
    from sklearn.neighbors import NearestNeighbors

    def entropy(x: np.ndarray) -> float:
        radius = NearestNeighbors(n_neighbors=npib.ENTROPY_NEIGHBOURS + 1).fit(x).kneighbors(x)[0][:, -1]
        return -float(np.mean(np.log(npib.ENTROPY_NEIGHBOURS / (len(x) * radius**2))))

    def pair(a: np.ndarray, b: np.ndarray) -> float:
        scores = [mutual_info_regression(a, b[:, c], n_neighbors=npib.NEIGHBOURS) for c in range(b.shape[1])]
        return float(np.mean(scores) / np.sqrt(entropy(a) * entropy(b)))

    pairs = [(i, j) for i in range(len(ranks)) for j in range(i, len(ranks))]
    timed = pairs if most_pairs is None else pairs[:: -(-len(pairs) // most_pairs)]
    pair(ranks[0], ranks[-1])
    start = time.perf_counter()
    for i, j in timed:
        pair(ranks[i], ranks[j])
    return (time.perf_counter() - start) * len(pairs) / len(timed), len(timed), len(pairs)


def measure(layers: int, tokens: int, width: int, reference_pairs: int | None, device: str) -> dict[str, Any]:
    hidden = states(layers, tokens, width)
    points = diffusion_embedding(hidden, device=device).coordinates
    sequences = np.arange(tokens) * 16 // tokens
    row: dict[str, Any] = {"layers": layers, "tokens": tokens, "width": width, "bins": npib.bins_for(tokens)}
    milliseconds = {
        "embedding": seconds(lambda: diffusion_embedding(hidden, device=device), 3),
        "binned": seconds(lambda: npib.binned(points, device=device), 9),
        "binned_interval": seconds(lambda: npib.bootstrap(points, sequences, device=device), 3),
        "gaussian_copula": seconds(lambda: npib.gaussian_copula(points, device=device), 9),
        "cka": seconds(lambda: cka.cka(hidden, device=device), 3),
    }
    if reference_pairs != 0:
        milliseconds["ksg"] = seconds(lambda: npib.ksg(points), 5)
    row |= {f"{name}_ms": round(1e3 * value, 2) for name, value in milliseconds.items()}
    if reference_pairs != 0:
        ranks = npib.rank_columns(points).numpy() / tokens
        taken, timed, total = reference(ranks, reference_pairs)
        row |= {"reference_seconds": round(taken, 2), "reference_pairs_timed": f"{timed} of {total}"}
        row["ksg_speedup"] = round(taken / milliseconds["ksg"], 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", default="cpu", help="of the estimators; the reference is always on the CPU")
    parser.add_argument("--pairs", type=int, default=24, help="pairs that the reference is timed on at n = 512")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="few layers and tokens: does it run")
    args = parser.parse_args()
    sizes: list[tuple[int, int | None]] = [(npib.RELEASED_TOKENS, None), (512, args.pairs), (DISTINCT, 0)]
    if args.tiny:
        args.layers, args.width, sizes = 3, 32, [(npib.RELEASED_TOKENS, None), (64, 0)]
    rows = []
    for tokens, pairs in sizes:
        rows.append(measure(args.layers, tokens, args.width, pairs, args.device))
        print(json.dumps(rows[-1]), flush=True)
    ratio, fast = rows[0]["ksg_speedup"], rows[0]["binned_ms"]
    reached = {"ksg": f"{ratio} of at least {FLOORS['ksg over scikit-learn per pair, n = 57']} times"}
    reached["binned"] = f"{fast} of at most {FLOORS['binned, n = 57, milliseconds']} ms"
    print(json.dumps(reached))
    if args.out:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": args.device}
        args.out.write_text(json.dumps({"machine": machine, "floors": FLOORS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
