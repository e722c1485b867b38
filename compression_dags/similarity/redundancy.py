"""Redundancy metrics (RM) of layers and of modules, from what the calibration pass left.

ALS (NeurIPS 2024) ends, after mutual information and a kernel estimate, at RM(X, Y) = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), which is
linear CKA without centring. What it leaves open, and what is done here:

* what a row of X is (a token or a sequence): a token;
* "feature normalisation": every token's features scaled to length 1 (`token` tables; `raw` without);
* "weight normalisation", "per-layer weights of the distance function": see `rho`, where it enters;
* which positions count: `paper` uses all sampled ones, as printed; `cka` and `cka-debiased` skip the first 4 of a
  sequence, where attention sinks sit.

Raw and uncentred, one huge token or one constant outlier channel takes RM of unrelated features to 0.999. Even
without them the plain estimate is about d / (n + d); `cka-debiased` with `token` gives 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from compression_dags.errors import InputError

if TYPE_CHECKING:
    pass

VERSION = "1"
TABLES, NOTE = "redundancy.safetensors", "redundancy.json"


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
    Frobenius norm of module j's weights over the mean of all. The paper does not say whether W or ω is meant.
    """
    held = np.maximum(matrix, 0.0) if weights is None else np.maximum(matrix, 0.0) * weights[None, :]
    return held.sum(axis=1) - np.diagonal(held)


def read_redundancy(directory: Path) -> Redundancy:
    note = json.loads((directory / NOTE).read_text())
    return Redundancy(load_file(directory / TABLES), {k: tuple(v) for k, v in note["labels"].items()}, note["tokens"])
