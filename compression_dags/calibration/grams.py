"""Gram matrices of what modules read and write, and how alike two modules' features are.

For features X (n tokens × d channels) let K = X Xᵀ. The alignment of two modules is one inner product of their Gram
matrices, so widths may differ and every pair of P modules comes from one P × n² matrix product:

    paper          <K, L> / (‖K‖ ‖L‖)                       = ‖Xᵀ Y‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)   (ALS Eq. 4, uncentred)
    cka            the same of H K H, H = I − 11ᵀ/n          (linear CKA, Kornblith et al. 2019)
    cka-debiased   the same of the U-centred K               (unbiased HSIC, Song et al. 2012)

The U-centred K has K̃_ij = K_ij − r_i/(n−2) − r_j/(n−2) + s/((n−1)(n−2)) off the diagonal and 0 on it, with row sums r
and total s of K without its diagonal; <K̃, L̃> is n(n−3) times the unbiased HSIC.

Only lower triangles are kept, row after row, so the Gram matrix of the first m tokens is the first m(m+1)/2 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from compression_dags.errors import InputError

Mode = Literal["paper", "cka", "cka-debiased"]
MODES: tuple[Mode, ...] = ("paper", "cka", "cka-debiased")
#: First positions of a sequence that the centred modes leave out: attention sinks sit there.
SKIPPED_POSITIONS = 4
#: The unbiased HSIC has n − 3 in its denominator.
LEAST_TOKENS = 4
#: Numbers of all Gram matrices that are worked on at a time.
_CHUNK = 1 << 23


def packed_gram(features: Tensor) -> Tensor:
    """(n, d) of any float dtype → (n(n+1)/2,) float32, the lower triangle of X Xᵀ by rows, on the same device.

    Products of bfloat16 or float16 numbers are exact in float32; sums are float32.
    """
    x = features.float()
    # a common factor keeps large activations inside float32 and changes no alignment
    scale = x.square().sum(1).mean().sqrt()
    x = x / torch.where(scale > 0, scale, 1.0)
    rows, columns = torch.tril_indices(len(x), len(x), device=x.device)
    return (x @ x.T)[rows, columns]


def tokens_of(packed: Tensor) -> int:
    """n of a packed triangle (…, n(n+1)/2)."""
    return int(((8 * packed.shape[-1] + 1) ** 0.5 - 1) / 2 + 0.5)


def alignment(grams: Tensor, mode: Mode, *, token_norm: bool, tokens: int | None = None) -> Tensor:
    """How alike the features of every two modules are.

    Args:
        grams: (P, n(n+1)/2) float32, from `packed_gram`.
        token_norm: every token's features have length 1 (a token of length 0 stays 0). The caller need not do it.
        tokens: use the first so many only.

    Returns:
        (P, P) float64 on the CPU, symmetric, 1 on the diagonal. `paper` and `cka` lie in [0, 1]; `cka-debiased` is
        near 0, or just below, for unrelated features. Rows of a module without structure (all features equal, or 0)
        are NaN off the diagonal.

    Raises:
        InputError: fewer than 4 tokens.
    """
    count = tokens_of(grams) if tokens is None else tokens
    if count < LEAST_TOKENS:
        raise InputError(f"redundancy: n = {count} tokens; at least {LEAST_TOKENS} are needed")
    grams = grams[:, : count * (count + 1) // 2]
    lengths = _inverse_lengths(grams, count) if token_norm else None
    centre = None if mode == "paper" else _row_terms(grams, count, lengths, mode)
    total = torch.zeros(len(grams), len(grams), dtype=torch.float64, device=grams.device)
    for rows, columns, chunk in _entries(grams, count):
        part = grams[:, chunk]
        if lengths is not None:
            part = part * lengths[:, rows] * lengths[:, columns]
        if centre is not None:
            part = part - centre[:, rows] - centre[:, columns]
        # every entry off the diagonal stands for two; the diagonal of the U-centred matrix is 0
        diagonal = 0.0 if mode == "cka-debiased" else 1.0
        part = part * torch.where(rows == columns, diagonal, 2.0**0.5)
        total += (part @ part.T).double()
    return _normalised(total, count, mode)


def _normalised(total: Tensor, count: int, mode: Mode) -> Tensor:
    own = total.diagonal().clone()
    # entries are float32 numbers of size 1: below 1e-6 each, a module's own product is rounding
    own[own <= 1e-12 * count**2] = torch.nan
    found = total / torch.outer(own, own).sqrt()
    found = ((found + found.T) / 2).clamp_max(1.0)
    return (found if mode == "cka-debiased" else found.clamp_min(0.0)).fill_diagonal_(1.0).cpu()


def _entries(grams: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Rows and columns of the packed entries, in chunks."""
    size = max(1, _CHUNK // len(grams))
    rows, columns = torch.tril_indices(count, count, device=grams.device)
    for start in range(0, grams.shape[1], size):
        chunk = slice(start, min(start + size, grams.shape[1]))
        yield rows[chunk], columns[chunk], chunk


def _diagonal(count: int, device: torch.device) -> Tensor:
    index = torch.arange(count, device=device)
    return index * (index + 3) // 2


def _inverse_lengths(grams: Tensor, count: int) -> Tensor:
    """(P, n) 1 / ‖x_t‖, 0 for a token of length 0."""
    square = grams[:, _diagonal(count, grams.device)]
    return torch.where(square > 0, square.clamp_min(1e-30).rsqrt(), 0.0)


def _row_terms(grams: Tensor, count: int, lengths: Tensor | None, mode: Mode) -> Tensor:
    """(P, n) float32 t with the centred K_ij = K_ij − t_i − t_j."""
    sums = torch.empty(len(grams), count, dtype=torch.float64, device=grams.device)
    rows, columns = torch.tril_indices(count, count, device=grams.device)
    square = torch.zeros(count, count, device=grams.device)
    for index, packed in enumerate(grams):
        square[rows, columns] = packed
        square[columns, rows] = packed
        own = square if lengths is None else square * torch.outer(lengths[index], lengths[index])
        sums[index] = own.sum(1, dtype=torch.float64)
        if mode == "cka-debiased":
            sums[index] -= own.diagonal().double()
    total = sums.sum(1, keepdim=True)
    if mode == "cka":
        return (sums / count - total / (2 * count**2)).float()
    return (sums / (count - 2) - total / (2 * (count - 1) * (count - 2))).float()


def alignment_from_features(features: Sequence[Tensor], mode: Mode, *, token_norm: bool) -> Tensor:
    """The same in float64 from the d × d cross-products ‖Xᵀ Y‖²: the definition, at d² numbers a pair.

    The unbiased form is (‖Xᵀ Y‖² − Σ_t a_t b_t + s_X s_Y / ((n−1)(n−2)) − 2 r_X · r_Y / (n−2)) of uncentred features,
    with a_t = ‖x_t‖², and r, s the row sums and total of X Xᵀ without its diagonal.

    Args:
        features: (n, d_i) each.
    """
    xs = [x.double() for x in features]
    if token_norm:
        xs = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-30) for x in xs]
    if mode == "cka":
        xs = [x - x.mean(0) for x in xs]
    found = torch.eye(len(xs), dtype=torch.float64)
    own = [_cross(x, x, mode) for x in xs]
    for i, x in enumerate(xs):
        for j in range(i):
            found[i, j] = found[j, i] = _cross(x, xs[j], mode) / (own[i] * own[j]) ** 0.5
    return found


def _cross(x: Tensor, y: Tensor, mode: Mode) -> float:
    product = (x.T @ y).square().sum()
    if mode == "cka-debiased":
        n = len(x)
        a, b = x.square().sum(1), y.square().sum(1)
        r, q = x @ x.sum(0) - a, y @ y.sum(0) - b
        product = product - a @ b + r.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (r @ q) / (n - 2)
    return float(product)
