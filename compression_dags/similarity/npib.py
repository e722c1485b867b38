"""Normalized Pairwise Information Bottleneck of two layers, S_ij = I(E_i; E_j) / √(H_i H_j) (MKA, Liu et al. 2024).

E_i are the diffusion coordinates of layer i. Three estimators, all of ranks, so any monotone change of a coordinate
(the diffusion time among them) leaves S as it is:

* `binned`: entropies of the paper's definition over equal-mass bins; 0 ≤ S ≤ 1 by construction, deterministic;
* `ksg`: what the released code estimates (Kraskov et al. 2004 for I, nearest-neighbour "entropies" without their
  constants for H, both negative on ranks), S neither bounded nor normalised; kept for comparison with published logs;
* `gaussian-copula`: closed form from the correlations of normal scores; blind to dependence that is not monotone.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compression_dags.errors import InputError
from compression_dags.similarity.diffusion import diffusion_embedding, distinct_rows
from compression_dags.similarity.ksg import ksg_information, neighbour_entropies
from compression_dags.similarity.resampling import half_samples, interval

Estimator = Literal["binned", "ksg", "gaussian-copula"]

#: Bins of a coordinate tried by default, most first.
MOST_BINS = 4
#: Neighbours of the released code's mutual information and entropy.
NEIGHBOURS, ENTROPY_NEIGHBOURS = 5, 50
#: Tokens of sequence 0 that the released kernel sees with its default of 57 samples.
RELEASED_TOKENS, RELEASED_SIGMA, RELEASED_FLOOR = 57, 8.0, 1e-12
#: e in C ← (1 − e) C + e I, which bounds the information of two equal coordinates.
SHRINK = 1e-3


def npib(
    hidden: Tensor,
    estimator: Estimator = "binned",
    *,
    bins: int | None = None,
    sigma: Literal["median"] | float = "median",
    time: float = 0.0,
    device: str = "cpu",
) -> Tensor:
    """Similarity of every two layers from the states of the same n tokens: (L, n, d) → (L, L) float64, symmetric.

    Tokens that are copies of one another in some layer are counted once.

    Args:
        estimator: see the module; `binned` and `gaussian-copula` give S in [0, 1] with S_ii = 1.
        bins: b per coordinate for `binned`; None takes the most that n allows, up to 4.
        sigma, time: of the embedding; `time` scales coordinates and so changes no S.

    Raises:
        InputError: an unusable layer (named), too few tokens for the estimator, an unknown estimator.
    """
    hidden = hidden[:, torch.from_numpy(distinct_rows(hidden))]
    embedding = diffusion_embedding(hidden, sigma=sigma, time=time, device=device)
    return similarity_of(embedding.coordinates, estimator, bins=bins, device=device)


def similarity_of(
    coordinates: Tensor, estimator: Estimator = "binned", *, bins: int | None = None, device: str = "cpu"
) -> Tensor:
    """The same from embedded coordinates (L, n, k)."""
    if estimator == "binned":
        return binned(coordinates, bins, device=device)
    if estimator == "ksg":
        return ksg(coordinates)
    if estimator == "gaussian-copula":
        return gaussian_copula(coordinates, device=device)
    raise InputError(f"npib estimator {estimator!r} is unknown; allowed: binned, ksg, gaussian-copula")


def released(first_tokens: Tensor, device: str = "cpu") -> Tensor:
    """S of the released code: (L, T, d) inputs of every layer at the first T tokens of sequence 0 → (L, L) float64.

    With its default of 57 prompts the code embeds the first 57 token positions of the first prompt, whatever the other
    prompts hold, with σ = 8. Here as there copies stay. Every off-diagonal estimate depends on the tie-breaking
    jitter to about ±0.08, which is drawn from a fixed seed here.

    Raises:
        InputError: fewer than 51 tokens, or a kernel that is degenerate at σ = 8.
    """
    states = first_tokens[:, :RELEASED_TOKENS]
    if states.shape[1] <= ENTROPY_NEIGHBOURS:
        raise InputError(
            f"sequence 0 has {states.shape[1]} tokens; the released entropy needs {ENTROPY_NEIGHBOURS + 1}: raise the "
            "calibration's `length`"
        )
    embedding = diffusion_embedding(states, sigma=RELEASED_SIGMA, floor=RELEASED_FLOOR, device=device)
    return ksg(embedding.coordinates)


def rank_columns(coordinates: Tensor) -> Tensor:
    """Ranks 0 … n − 1 within every column, ties in order of appearance: (L, n, k) → (L, n, k) int64."""
    columns = coordinates.transpose(1, 2).contiguous()  # sorting a strided dimension is slow
    return columns.argsort(dim=2, stable=True).argsort(dim=2).transpose(1, 2)


# -- binned ---------------------------------------------------------------------------------------------------------


def bins_for(count: int, dimensions: int = 2) -> int:
    """The most bins b per coordinate, up to 4, for which n ≥ 2 B² with B = b^d joint states of a layer.

    Raises:
        InputError: n < 32 for d = 2: not even b = 2 is allowed.
    """
    for bins in range(MOST_BINS, 1, -1):
        if count >= 2 * bins ** (2 * dimensions):
            return bins
    check_bins(count, 2, dimensions)
    raise AssertionError("unreachable")


def check_bins(count: int, bins: int, dimensions: int = 2) -> None:
    """Refuse more bins than the tokens allow: below n = 2 B² independent layers look similar (S = 0.45 at n = 57,
    B = 16).

    Raises:
        InputError: naming n, B and the remedy.
    """
    states = bins**dimensions
    if bins < 2:
        raise InputError(f"npib: bins {bins} per coordinate; at least 2 are needed")
    if count < 2 * states**2:
        most = math.floor((count / 2) ** (1 / (2 * dimensions)) + 1e-9)
        remedy = f"use at most {most} bins, or" if most >= 2 else "use"
        raise InputError(
            f"npib: n = {count} distinct tokens are too few for B = {states} states a layer ({bins} bins in "
            f"{dimensions} dimensions), which need n ≥ 2 B² = {2 * states**2}: {remedy} more calibration tokens "
            "(`samples`, `sequences`, `length`)"
        )


def binned(coordinates: Tensor, bins: int | None = None, device: str = "cpu") -> Tensor:
    """S from equal-mass bins of ranks: (L, n, k) → (L, L) float64 in [0, 1], S_ii = 1.

    Each layer's k binned coordinates are one state of B = b^k, so information is joint, over all coordinates. One
    product of the one-hot states with themselves holds the joint table of every pair of layers. Entropies are plug-in
    with the correction of Miller & Madow, I = max(H_i + H_j − H_ij, 0), S = min(I / √(H_i H_j), 1).
    """
    codes, states = _codes(coordinates, bins)
    return _binned(codes.to(device), states).cpu()


def bootstrap(
    coordinates: Tensor,
    sequences: np.ndarray,
    *,
    bins: int | None = None,
    resamples: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """5 % and 95 % bounds of the binned S over prompts: (L, L) each. Embedding and bins stay those of all rows.

    Args:
        sequences: (n,), the sequence of every row of `coordinates`.
    """
    codes, states = _codes(coordinates, bins)
    codes = codes.to(device)
    value = _binned(codes, states).cpu().numpy()
    halves = [
        _binned(codes[:, torch.from_numpy(h)], states).cpu().numpy() for h in half_samples(sequences, resamples, seed)
    ]
    return interval(value, np.asarray(halves), len(np.unique(sequences)), 0.0, 1.0)


def _codes(coordinates: Tensor, bins: int | None) -> tuple[Tensor, int]:
    """The state of every token in every layer: (L, n) int64 in 0 … B − 1, and B."""
    _, count, dimensions = coordinates.shape
    bins = bins_for(count, dimensions) if bins is None else bins
    check_bins(count, bins, dimensions)
    place = rank_columns(coordinates) * bins // count
    weight = bins ** torch.arange(dimensions, device=place.device)
    return (place * weight).sum(dim=-1), bins**dimensions


def _binned(codes: Tensor, states: int) -> Tensor:
    layers, count = codes.shape
    # counts up to n are exact in float32
    hot = torch.nn.functional.one_hot(codes.T, states).to(torch.float32).reshape(count, layers * states)
    table = (hot.T @ hot).reshape(layers, states, layers, states).permute(0, 2, 1, 3).reshape(layers, layers, -1)
    both = _entropy(table.double(), count)
    each = _entropy(hot.sum(dim=0).reshape(layers, states).double(), count)
    information = (each[:, None] + each[None, :] - both).clamp_min(0.0)
    scale = torch.outer(each, each).sqrt().clamp_min(1e-300)
    similarity = (information / scale).clamp_max(1.0)
    return ((similarity + similarity.T) / 2).fill_diagonal_(1.0)


def _entropy(counts: Tensor, total: int) -> Tensor:
    """Plug-in entropy in nats over the last dimension, plus (m − 1) / 2n for m occupied states."""
    share = counts / total
    occupied = (counts > 0).sum(dim=-1).double()
    return -torch.special.xlogy(share, share).sum(dim=-1) + (occupied - 1) / (2 * total)


# -- Gaussian copula ------------------------------------------------------------------------------------------------


def gaussian_copula(coordinates: Tensor, shrink: float = SHRINK, device: str = "cpu") -> Tensor:
    """S = √(1 − exp(−2 I / k)) for the Gaussian copula of the ranks: (L, n, k) → (L, L) float64 in [0, 1], S_ii = 1.

    I_ij = ½ (log|C_ii| + log|C_jj| − log|C_(ij)|) over the shrunk correlations C of normal scores.
    """
    layers, count, dimensions = coordinates.shape
    scores = torch.special.ndtri((rank_columns(coordinates).to(device).double() + 0.5) / count)
    scores = scores.permute(1, 0, 2).reshape(count, layers * dimensions)
    scores = scores / scores.square().mean(dim=0).sqrt()
    eye = torch.eye(layers * dimensions, dtype=torch.float64, device=scores.device)
    correlation = (1 - shrink) * (scores.T @ scores / count) + shrink * eye
    blocks = correlation.reshape(layers, dimensions, layers, dimensions).permute(0, 2, 1, 3)
    own = blocks[torch.arange(layers), torch.arange(layers)]
    each = torch.linalg.slogdet(own).logabsdet
    rows, columns = torch.triu_indices(layers, layers, 1, device=scores.device)
    upper = torch.cat([own[rows], blocks[rows, columns]], dim=2)
    lower = torch.cat([blocks[columns, rows], own[columns]], dim=2)
    joint = torch.linalg.slogdet(torch.cat([upper, lower], dim=1)).logabsdet
    information = (0.5 * (each[rows] + each[columns] - joint)).clamp_min(0.0)
    similarity = torch.eye(layers, dtype=torch.float64, device=scores.device)
    similarity[rows, columns] = similarity[columns, rows] = (1 - torch.exp(-2 * information / dimensions)).sqrt()
    return similarity.cpu()


# -- KSG, as released -----------------------------------------------------------------------------------------------


def ksg(coordinates: Tensor, neighbours: int = NEIGHBOURS, entropy_neighbours: int = ENTROPY_NEIGHBOURS) -> Tensor:
    """The released estimate: (L, n, k) → (L, L) float64, symmetric; neither S ≤ 1 nor S_ii = 1. Always on the CPU.

    I is the mean over the k × k pairs of single coordinates, not the joint information. Unlike the released code,
    entropies are computed once a layer, and ties of the rank lattice are broken by a fixed jitter.

    Raises:
        InputError: n is at most the entropy's neighbours, or an entropy is not negative: √(H_i H_j) then means nothing.
    """
    layers, count, dimensions = coordinates.shape
    if count <= max(neighbours, entropy_neighbours):
        raise InputError(
            f"npib ksg: n = {count} tokens, but {entropy_neighbours} entropy neighbours need at least "
            f"{entropy_neighbours + 1}: use more calibration tokens, or estimator `binned`"
        )
    ranks = rank_columns(coordinates).cpu().numpy()
    entropy = neighbour_entropies(ranks / count, entropy_neighbours)
    if len(bad := np.flatnonzero(entropy >= 0)):
        raise InputError(
            f"layer {bad[0]}: the released entropy of its ranks is {entropy[bad[0]]:.3g}, not negative, so √(H_i H_j) "
            "is undefined; use estimator `binned`"
        )
    columns = ranks.transpose(0, 2, 1).reshape(layers * dimensions, count)
    pairs = ksg_information(columns, dimensions, neighbours).reshape(layers, dimensions, layers, dimensions)
    similarity = np.triu(pairs.mean(axis=(1, 3)) / np.sqrt(np.outer(entropy, entropy)))
    return torch.from_numpy(similarity + np.triu(similarity, 1).T)
