"""Redundancy metrics (RM) of layers and of modules, from what the calibration pass left.

ALS (NeurIPS 2024) ends, after mutual information and a kernel estimate, at RM(X, Y) = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), which is
linear CKA without centring. What it leaves open, and what is done here:

* what a row of X is (a token or a sequence): a token;
* "feature normalisation": every token's features scaled to length 1 (`token` tables; `raw` without);
* "weight normalisation", "per-layer weights of the distance function": see `rho`, where it enters;
* which positions count: `paper` uses all sampled ones, as printed; `cka` and `cka-debiased` skip the first 4 of a
  sequence, where attention sinks sit.

Raw and uncentred, one huge token or one constant outlier channel takes RM of unrelated features to 0.999, and even
without them the plain estimate is about d / (n + d); `cka-debiased` with `token` gives 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression_dags.calibration.statistics import HIDDEN_STATES, load_alignment
from compression_dags.errors import InputError
from compression_dags.provenance.plots import heatmap_png

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "1"
TABLES, NOTE = "redundancy.safetensors", "redundancy.json"
GATE = ".mlp.gate_proj"


@dataclass(frozen=True)
class Redundancy:
    """RM tables of one model.

    Attributes:
        tables: `layer.in.cka-debiased.token` → (P, P) float32: level (`layer`, `module`) . feature (`in`, `out`,
            `gate`) . mode . `token` or `raw`.
        labels: `module.in` → what the rows are: `3` (a layer), `3.mlp_input` (the input that a group of projections
            shares), `3.mlp.up_proj` (an output).
        tokens: `paper` and `centred`: tokens behind a table of that mode.
    """

    tables: Mapping[str, np.ndarray]
    labels: Mapping[str, tuple[str, ...]]
    tokens: Mapping[str, int] = field(default_factory=dict)

    def table(self, level: str, feature: str, mode: str, token_norm: bool) -> tuple[tuple[str, ...], np.ndarray]:
        """Labels, and (P, P) float64.

        Raises:
            InputError: the table is not there, or a module's features have no structure.
        """
        family = f"{level}.{feature}"
        name = f"{family}.{mode}.{'token' if token_norm else 'raw'}"
        if name not in self.tables:
            have = ", ".join(sorted(self.labels)) or "none"
            raise InputError(
                f"redundancy: no table {name} (features recorded: {have}; tokens: {dict(self.tokens)}, of which a "
                "table needs 4): the model has no such module, or the calibration set is too small"
            )
        found = np.asarray(self.tables[name], dtype=np.float64)
        if bad := np.flatnonzero(~np.isfinite(found).all(axis=1)).tolist():
            # a broken module makes every row but its own non-finite in one place only
            worst = max(bad, key=lambda i: int((~np.isfinite(found[i])).sum()))
            raise InputError(
                f"redundancy: {self.labels[family][worst]} ({feature}) has features that are all the same or not finite"
            )
        return tuple(self.labels[family]), found


def rho(matrix: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """ρ_i = Σ_{j≠i} w_j RM_ij: how much of i the others hold. (P, P) → (P,).

    Estimates below 0 (`cka-debiased`) count as 0. `weights` are ALS's "weight normalisation" as read here: w_j is the
    Frobenius norm of module j's weights over the mean of all; the paper does not say whether W or ω is meant.
    """
    held = np.maximum(matrix, 0.0) if weights is None else np.maximum(matrix, 0.0) * weights[None, :]
    return held.sum(axis=1) - np.diagonal(held)


def write_redundancy(activations: Path, directory: Path, device: str = "cpu") -> dict[str, Any]:
    """Write `redundancy.safetensors`, `redundancy.json` (labels, tokens) and two heat maps; return the facts.

    Layers are compared by the residual stream at their entry (`in`) and exit (`out`), which the calibration pass keeps,
    and by the output of their gate projection where they have one; modules by the tables of the pass.

    Raises:
        InputError: fewer than 4 sampled tokens past the first positions, or states that are not finite or constant.
    """
    from safetensors.numpy import save_file

    found = compute_redundancy(activations, device)
    save_file({k: np.ascontiguousarray(v) for k, v in found.tables.items()}, directory / TABLES)
    note = {"labels": found.labels, "tokens": found.tokens}
    (directory / NOTE).write_text(json.dumps(note, indent=1))
    labels, layers = found.table("layer", "in", "cka-debiased", True)
    (directory / "plot.png").write_bytes(heatmap_png(layers, "input of layer", "RM (debiased linear CKA)"))
    if "module.in" in found.labels:
        _, modules = found.table("module", "in", "cka-debiased", True)
        png = heatmap_png(modules, "input of projection group, in order", "RM (debiased linear CKA)")
        (directory / "modules.png").write_bytes(png)
    redundancy = rho(layers)
    return {
        "tokens": found.tokens["centred"],
        "most_redundant_layer": int(labels[int(redundancy.argmax())]),
        "least_redundant_layer": int(labels[int(redundancy.argmin())]),
        "mean_redundancy": float(redundancy.mean() / max(1, len(labels) - 1)),
        "modules": len(found.labels.get("module.in", ())),
    }


def read_redundancy(directory: Path) -> Redundancy:
    from safetensors.numpy import load_file

    note = json.loads((directory / NOTE).read_text())
    return Redundancy(load_file(directory / TABLES), {k: tuple(v) for k, v in note["labels"].items()}, note["tokens"])


def compute_redundancy(activations: Path, device: str = "cpu") -> Redundancy:
    """All tables: those of layers from the stored states, those of modules as the pass left them."""
    from safetensors.torch import load_file

    stored = load_file(activations / HIDDEN_STATES)
    tables, tokens = _layer_tables(stored["hidden"], stored["sampled"], device)
    layers = tuple(str(i) for i in range(len(stored["hidden"]) - 1))
    labels: dict[str, tuple[str, ...]] = {"layer.in": layers, "layer.out": layers}
    modules, names, counts = load_alignment(activations)
    tables |= {f"module.{k}": v for k, v in modules.items()}
    labels |= {f"module.{k}": tuple(v) for k, v in names.items()}
    gates = [i for i, name in enumerate(names.get("out", ())) if name.endswith(GATE)]
    if gates:
        labels["layer.gate"] = tuple(names["out"][i].split(".")[0] for i in gates)
        for name in [n for n in modules if n.startswith("out.")]:
            tables[name.replace("out.", "layer.gate.", 1)] = modules[name][np.ix_(gates, gates)]
    return Redundancy(tables, labels, {k: min(tokens[k], counts.get(k, tokens[k])) for k in tokens})


def _layer_tables(hidden: Tensor, sampled: Tensor, device: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """RM of the entries and of the exits of layers, from (L+1, n, d) states of (n, 2) sampled tokens."""
    import torch

    from compression_dags.calibration.grams import LEAST_TOKENS, MODES, alignment, packed_gram
    from compression_dags.calibration.module_features import late_first, token_subset

    chosen = token_subset(len(sampled), len(hidden))
    order, late = late_first(sampled[chosen])
    if late < LEAST_TOKENS:
        raise InputError(
            f"redundancy: {late} sampled tokens past the first positions of their sequences; at least {LEAST_TOKENS} "
            "are needed (longer sequences, or more of them)"
        )
    grams = torch.stack([packed_gram(layer[chosen[order]].to(device)) for layer in hidden])
    tables = {}
    for mode in MODES:
        for token_norm in (False, True):
            count = len(chosen) if mode == "paper" else late
            found = alignment(grams, mode, token_norm=token_norm, tokens=count).float().numpy()
            name = f"{mode}.{'token' if token_norm else 'raw'}"
            tables[f"layer.in.{name}"], tables[f"layer.out.{name}"] = found[:-1, :-1], found[1:, 1:]
    return tables, {"paper": len(chosen), "centred": late}
