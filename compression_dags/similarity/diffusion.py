"""Diffusion-kernel embedding of hidden states, the manifold of MKA (Liu et al., EMNLP 2024).

For one layer with states x_1 … x_n and distances D_ij = ‖x_i − x_j‖₂, as the released code computes it:

    K = exp(−(D/σ)^½),  K₁ = K / (p pᵀ)^α  with p = K·1,  A = K₁ / (v vᵀ)  with v = (K₁·1)^½,
    A = U Λ Uᵀ,  Y_c = λ_{c+1}^t · U_{c+1} / U_1  for c = 1 … k.

A is similar to a Markov matrix, so λ₁ = 1 and U₁ ∝ v. The exponent ½ of a Euclidean distance keeps K positive definite.
Eigenvectors replace the released code's two singular value decompositions a layer, and only k + 1 are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from compression_dags.errors import InputError

#: Rows from which Lanczos is faster than a full eigendecomposition.
_DENSE = 128
_TOP, _GAP, _FLAT = 1e-6, 1e-8, 1e-12
#: Squared distance over squared norms up to which two states are one: about a float32 step of the norm, squared.
_COPY = 1e-14


@dataclass(frozen=True)
class Embedding:
    """Coordinates of the same n tokens on the manifold of every layer.

    Attributes:
        coordinates: (L, n, k) float64; the sign of a column makes its largest entry positive.
        sigma: (L,) float64, the bandwidth σ.
        spectrum: (L, k + 1) float64, eigenvalues of A, descending from 1.
    """

    coordinates: Tensor
    sigma: Tensor
    spectrum: Tensor


def distinct_rows(hidden: Tensor) -> np.ndarray:
    """Indices of the tokens whose state is, in every layer, not the exact copy of an earlier token's: (n',) ascending.

    Two copies (the same first tokens of two documents) are one point of the manifold, at distance zero.
    """
    keep = np.ones(hidden.shape[1], dtype=bool)
    for layer in hidden:
        raw = np.ascontiguousarray(layer.cpu().contiguous().view(torch.uint8).numpy())
        _, first = np.unique(raw.view(np.dtype((np.void, raw.shape[1]))).ravel(), return_index=True)
        keep &= np.isin(np.arange(len(keep)), first)
    return np.flatnonzero(keep)


def check_states(hidden: Tensor) -> None:
    """Refuse states from which no similarity follows: (L, n, d).

    Raises:
        InputError: naming the first layer that is not finite, or whose states are all the same.
    """
    for index, layer in enumerate(hidden):
        if not bool(torch.isfinite(layer).all()):
            raise InputError(f"layer {index}: its sampled states are not finite; check the model or its compute dtype")
        if bool((layer == layer[:1]).all()):
            raise InputError(
                f"layer {index}: its {len(layer)} sampled states are all the same; a constant layer has no similarity "
                "to any other (is the model collapsed, or the calibration text one repeated token?)"
            )


def diffusion_embedding(
    hidden: Tensor,
    *,
    sigma: Literal["median"] | float = "median",
    alpha: float = 0.5,
    time: float = 0.0,
    dimensions: int = 2,
    floor: float = 0.0,
    device: str = "cpu",
) -> Embedding:
    """Embed the n states of each of L layers: (L, n, d) → coordinates (L, n, k) float64.

    Args:
        sigma: bandwidth; "median" takes the median distance of two distinct tokens, layer by layer. The released code
            has 8 for every layer, which mixes similarity with the norm of the residual stream.
        alpha: exponent α of the anisotropic normalisation.
        time: diffusion time t; 0 is MKA.
        dimensions: k.
        floor: least entry of A (the released code has 1e-12).

    Raises:
        InputError: naming the layer, for non-finite or constant states, λ₁ off 1 by more than 1e-6, a spectral gap
            λ₁ − λ₂ of at most 1e-8 (the tokens fall into unconnected parts) or λ_{k+1} of at most 1e-12 (they lie in
            fewer than k dimensions).
    """
    check_states(hidden)
    found = []
    for index, layer in enumerate(hidden):
        distance = pairwise_distances(layer.to(device))
        width = _median(index, distance) if sigma == "median" else float(sigma)
        operator = diffusion_operator(distance, width, alpha, floor)
        values, vectors = _leading(operator, dimensions + 1)
        _check_spectrum(index, values, width)
        vectors = vectors[:, 1:] / vectors[:, :1] * np.maximum(values[1:], 0.0) ** time
        peak = vectors[np.abs(vectors).argmax(axis=0), np.arange(dimensions)]
        found.append((vectors * np.sign(peak), width, values))
    coordinates, widths, spectra = (torch.from_numpy(np.stack(x).astype(np.float64)) for x in zip(*found, strict=True))
    return Embedding(coordinates, widths, spectra)


def pairwise_distances(states: Tensor) -> Tensor:
    """(n, d) → Euclidean distances (n, n) float64, symmetric, from one product.

    Centred first: distances are small beside norms that a few large channels dominate. A square below the rounding of
    that product is a copy's, and becomes 0: the kernel's square roots would make 1e-4 of it.
    """
    x = states.double()
    x = x - x.mean(dim=0)
    gram = x @ x.T
    norms = gram.diagonal()
    norms = norms[:, None] + norms[None, :]
    square = norms - (gram + gram.T)
    return square.masked_fill_(square <= _COPY * norms, 0.0).sqrt_()


def diffusion_operator(distance: Tensor, sigma: float, alpha: float = 0.5, floor: float = 0.0) -> Tensor:
    """A (n, n) float64, symmetric, from distances (n, n)."""
    kernel = (distance / sigma).sqrt_().neg_().exp_()
    thinned = kernel.sum(dim=0) ** -alpha
    scale = thinned / (thinned * (kernel @ thinned)).sqrt()  # p^−α / v, as K₁ itself is not needed
    operator = kernel.mul_(scale[:, None]).mul_(scale[None, :])
    return ((operator + operator.T) / 2).clamp_min_(floor)


def _median(index: int, distance: Tensor) -> float:
    count = len(distance)
    upper = torch.triu_indices(count, count, 1, device=distance.device)
    if (width := float(distance[upper[0], upper[1]].median())) <= 0.0:
        raise InputError(f"layer {index}: the median distance of its {count} states is {width}; most are copies")
    return width


def _leading(operator: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues, descending, and their vectors as columns."""
    matrix = operator.cpu().numpy()
    if len(matrix) <= max(_DENSE, count + 1):
        values, vectors = np.linalg.eigh(matrix)
        return values[::-1][:count], vectors[:, ::-1][:, :count]

    start = np.cos(np.arange(len(matrix)))  # fixed, and not an eigenvector
    try:
        values, vectors = eigsh(matrix, k=count, v0=start, which="LA")
    except ArpackNoConvergence:  # clustered eigenvalues; the full decomposition shows which rule they break
        values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(values)[::-1][:count]
    return values[order], vectors[:, order]


def _check_spectrum(index: int, values: np.ndarray, sigma: float) -> None:
    says = f"layer {index}: the diffusion kernel (σ = {sigma:.4g}) has eigenvalues {_listed(values)}"
    if not np.isfinite(values).all() or abs(values[0] - 1.0) > _TOP:
        raise InputError(f"{says}, the first of which must be 1 ± {_TOP:g}")
    if values[0] - values[1] <= _GAP:
        raise InputError(
            f"{says}, a spectral gap of {values[0] - values[1]:.2g}; more than {_GAP:g} is needed, or the tokens fall "
            "into unconnected parts: use σ = median, or more tokens"
        )
    if values[-1] <= _FLAT:
        raise InputError(
            f"{says}: the states lie in fewer than {len(values) - 1} dimensions (more than {_FLAT:g} is needed)"
        )


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{v:.6g}" for v in values)
