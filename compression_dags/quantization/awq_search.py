"""AWQ's searches: factors of the inputs, then shares of the ranges, by the output error that H = Σ x xᵀ gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression_dags.passes.input_sums import InputSums
from compression_dags.quantization.awq import AWQ
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.nearest import nearest_group
from compression_dags.quantization.rounding_pass import RoundedGroup
from compression_dags.quantization.smoothing import Fold
from compression_dags.solvers.hessian import energy
from compression_dags.solvers.rounding import Rounded, find_scales, round_codes


def round_folded(
    options: AWQ, weights: dict[str, Tensor], seen: InputSums, choice: Choice, label: str, fold: Fold | None
) -> RoundedGroup:
    """The matrices at the scales and ranges of least output error; see `QuantizeStage.round_folded`."""
    assert seen.hessian is not None
    seen.hessian.require_finite(label)
    hessian, stack = seen.hessian.matrix, torch.cat([w.float() for w in weights.values()])
    stored = next(iter(weights.values())).dtype
    nearest = _rounded(options, weights, hessian, choice, None, clip=False)
    if nearest[1] <= options.least_error**2 * float(energy(stack, hessian)):
        for _, evidence in nearest[0].found.values():
            evidence |= {"alpha": 0.0, "search": f"no: rounding to nearest loses less than {options.least_error:g}"}
        return nearest[0]
    columns, facts = _search(options, stack, hessian, seen.tokens, choice, stored, fold)
    best = _rounded(options, weights, hessian, choice, columns, options.clip)
    if columns is not None and options.clip:  # clipping may make up for what scaling brings
        plain = _rounded(options, weights, hessian, choice, None, options.clip)
        if plain[1] < best[1]:
            best, facts = plain, {"alpha": 0.0, "duo": False}
    for _, evidence in best[0].found.values():
        evidence |= facts
    return best[0]


def _rounded(
    options: AWQ, weights: dict[str, Tensor], hessian: Tensor, choice: Choice, columns: Tensor | None, clip: bool
) -> tuple[RoundedGroup, float]:
    """The group with these factors, clipped or not, and its output error ‖ΔW X‖²."""
    moved = hessian if columns is None else hessian / torch.outer(columns, columns)
    shares: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if clip and not name.endswith(("q_proj", "k_proj")):
            scaled = weight.float() if columns is None else weight.float() * columns
            shares[name] = _clipped(options, scaled, moved, choice, weight.dtype)
    group, total = nearest_group(weights, choice, columns, shares), 0.0
    for name, weight in weights.items():
        rounded, evidence = group.found[name]
        left = rounded.dequantize() if columns is None else rounded.dequantize() / columns
        whole, lost = energy(weight.float(), hessian), energy(left - weight.float(), hessian)
        evidence["output_error"] = float((lost / whole).clamp(min=0).sqrt()) if whole > 0 else 0.0
        if name in shares:
            evidence["mean_clip"] = float(shares[name].double().mean())
        total += float(lost)
    return group, total


def _search(
    options: AWQ, stack: Tensor, hessian: Tensor, tokens: int, choice: Choice, stored: Any, fold: Fold | None
) -> tuple[Tensor | None, dict[str, Any]]:
    """The best s (in,) of the grid, or None for s = 1, and what the ledger says of it."""
    if fold is None:
        return None, {"alpha": 0.0, "smoothed": "no: nothing before it takes the factors"}

    def lost(columns: Tensor | None) -> float:
        scaled = stack if columns is None else stack * columns
        scales = find_scales(scaled, choice.grid(), stored=stored)
        off = Rounded(round_codes(scaled, scales), scales).dequantize() - scaled
        return float(energy(off if columns is None else off / columns, hessian))

    rms = fold.even(hessian.diagonal().double() / max(1, tokens)).clamp(min=0).sqrt().float()
    mean = fold.even(stack.abs().mean(0))
    best, columns, facts = lost(None), None, {"alpha": 0.0, "duo": False}
    for duo in {"both": (False, True), "on": (True,), "off": (False,)}[options.duo]:
        for alpha in torch.linspace(0, 1, options.grid + 1)[0 if duo else 1 :].tolist():
            tried = rms.pow(alpha) / (mean.pow(1 - alpha) if duo else 1)
            tried = torch.where((rms > 0) & (mean > 0), tried, torch.ones_like(tried)).clamp(min=1e-4)
            tried = fold.exact(tried / (tried.max() * tried.min()).sqrt())
            error = lost(tried)
            if error < best:
                best, columns, facts = error, tried, {"alpha": round(alpha, 6), "duo": duo}
    return columns, facts


def _clipped(options: AWQ, weight: Tensor, hessian: Tensor, choice: Choice, stored: Any) -> Tensor:
    """(rows, groups) float32 share of every group's range, by the error of its own inputs' outputs; 1 everywhere
    if that is better over all inputs together."""

    def off(share: Tensor | float) -> Tensor:
        scales = find_scales(weight, choice.grid(), stored=stored, share=share)
        return Rounded(round_codes(weight, scales), scales).dequantize() - weight

    size = choice.group_size or weight.shape[1]
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])
    ones = torch.ones(len(weight), len(blocks), device=weight.device)
    best, shares = torch.full_like(ones, torch.inf), ones.clone()
    for share in torch.linspace(1, options.least_clip, options.clip_grid).tolist():
        parts = off(share).unflatten(1, (-1, size)).transpose(0, 1)  # (groups, rows, size)
        error = (torch.bmm(parts, blocks) * parts).sum(-1).T
        shares = torch.where(error < best, share, shares)
        best = torch.minimum(best, error)
    return shares if energy(off(shares), hessian) < energy(off(1.0), hessian) else ones
