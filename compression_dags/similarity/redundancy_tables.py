"""The redundancy tables of a model, computed from what the calibration pass left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from compression_dags.calibration.grams import LEAST_TOKENS, MODES, alignment, packed_gram
from compression_dags.calibration.module_features import late_first, token_subset
from compression_dags.calibration.statistics import HIDDEN_STATES, load_alignment
from compression_dags.errors import InputError
from compression_dags.provenance.plots import heatmap_png
from compression_dags.similarity.redundancy import NOTE, TABLES, Redundancy, rho

GATE = ".mlp.gate_proj"


def write_redundancy(activations: Path, directory: Path, device: str = "cpu") -> dict[str, Any]:
    """Metadata of `redundancy.safetensors`, `redundancy.json` (labels, tokens) and two heat maps, which it writes.

    Layers are compared by the residual stream at their entry (`in`) and exit (`out`), which the calibration pass keeps,
    and by the output of their gate projection where they have one. Modules are compared by the tables of the pass.

    Raises:
        InputError: fewer than 4 sampled tokens past the first positions, or states that are not finite or constant.
    """
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


def compute_redundancy(activations: Path, device: str = "cpu") -> Redundancy:
    """All tables: those of layers from the stored states, those of modules as the pass left them."""
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
