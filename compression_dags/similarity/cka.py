"""Debiased linear centred kernel alignment (CKA) of every two layers.

CKA_ij = HSIC₁(K_i, K_j) / √(HSIC₁(K_i, K_i) HSIC₁(K_j, K_j)) with K = X Xᵀ over sampled tokens and the unbiased
estimate HSIC₁ of Song et al. 2012, as Nguyen et al. 2021 use it: for K̃ with a zero diagonal,

    HSIC₁ = [ tr(K̃ L̃) + 1ᵀK̃1 · 1ᵀL̃1 / ((n−1)(n−2)) − 2 · 1ᵀK̃L̃1 / (n−2) ] / (n(n−3)).

The plain estimate (Kornblith et al. 2019) tends to 1 for unrelated states when d is not small beside n; this one to 0.
Unlike `npib` it is linear, and a few tokens of very large norm (attention sinks) can dominate it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compression_dags.errors import InputError
from compression_dags.similarity.diffusion import check_states
from compression_dags.similarity.resampling import half_samples, interval

#: The first that HSIC₁ is defined for.
LEAST_TOKENS = 4


def cka(hidden: Tensor, device: str = "cpu") -> Tensor:
    """(L, n, d) → (L, L) float64, symmetric, 1 on the diagonal, at most 1, near 0 (or just below) for unrelated states.

    Holds L·n² float64 numbers: 270 MB for L = 32, n = 1024.

    Raises:
        InputError: fewer than 4 tokens, or a layer (named) that is not finite, constant or without structure.
    """
    return _cka(_grams(hidden, device))


def bootstrap(
    hidden: Tensor, sequences: np.ndarray, *, resamples: int = 20, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """CKA and its 5 % and 95 % bounds over prompts: (L, L) each.

    Args:
        sequences: (n,), the sequence of every token.
    """
    grams = _grams(hidden, device)
    value = _cka(grams)
    halves = []
    for half in half_samples(sequences, resamples, seed):
        rows = torch.from_numpy(np.flatnonzero(half)).to(grams.device)
        if len(rows) >= LEAST_TOKENS:
            halves.append(_cka(grams[:, rows][:, :, rows]).numpy())
    low, high = interval(value.numpy(), np.asarray(halves), len(np.unique(sequences)), -1.0, 1.0)
    return value, low, high


def _grams(hidden: Tensor, device: str) -> Tensor:
    """K̃ of every layer: (L, n, n) float64, centred states of mean square 1, zero diagonal."""
    check_states(hidden)
    layers, count, _ = hidden.shape
    if count < LEAST_TOKENS:
        raise InputError(f"cka: n = {count} tokens; at least {LEAST_TOKENS} are needed")
    grams = torch.empty(layers, count, count, dtype=torch.float64, device=device)
    for index, layer in enumerate(hidden):
        x = layer.to(device).double()
        x = x - x.mean(dim=0)
        x = x / x.square().sum(dim=1).mean().sqrt()
        grams[index] = (x @ x.T).fill_diagonal_(0.0)
    return grams


def _cka(grams: Tensor) -> Tensor:
    layers, count, _ = grams.shape
    flat, rows = grams.reshape(layers, -1), grams.sum(dim=2)
    total = rows.sum(dim=1)
    hsic = flat @ flat.T + torch.outer(total, total) / ((count - 1) * (count - 2)) - 2 * rows @ rows.T / (count - 2)
    own = hsic.diagonal()
    if bad := torch.nonzero(own <= 0).flatten().tolist():
        raise InputError(
            f"layer {bad[0]}: HSIC₁ of its {count} states with themselves is not positive; use more calibration tokens"
        )
    similarity = hsic / torch.outer(own, own).sqrt()
    return ((similarity + similarity.T) / 2).clamp_max(1.0).fill_diagonal_(1.0).cpu()
