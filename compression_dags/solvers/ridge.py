"""Ridge regression of a projection's correction, from sums over tokens. Plain torch, float64.

With inputs z_t (I channels, plus 1 where the projection has a bias), targets h_t, residuals e_t and token weights w_t:

    ΔW = argmin Σ_t w_t ‖z_t ΔW − e_t‖² + λ ‖ΔW‖²,   λ = α · mean diag Σ w_t z_t z_tᵀ
    G = Σ w z zᵀ (I×I),   C = Σ w z eᵀ (I×d),   E = Σ w ‖e‖²   →   E(ΔW) = E − 2 tr ΔWᵀC + tr ΔWᵀGΔW
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression_dags.options import TOKENS_PER_UNKNOWN


@dataclass
class Sums:
    """G, C, E and Σ w ‖h‖² over some rows, float64; the last channel of z is 1 where the projection has a bias."""

    gram: Tensor
    cross: Tensor
    error: float = 0.0
    target: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, outputs: int, device: torch.device) -> Sums:
        kind = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(channels, channels, **kind), torch.zeros(channels, outputs, **kind))

    def add(self, z: Tensor, residual: Tensor, target: Tensor, weight: Tensor, bias: bool = False) -> None:
        """Add n tokens: z (n, I), e and h (n, d), w (n,), all float32. w is divided by ‖h‖² here."""
        if bias:
            z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        root = weight.sqrt()[:, None] / target.norm(dim=1, keepdim=True).clamp_min(1e-12)
        z, residual = z * root, residual * root
        self.gram += (z.T @ z).double()
        self.cross += (z.T @ residual).double()
        self.error += float(residual.double().square().sum())
        self.target += float((target * root).double().square().sum())
        self.tokens += len(target)

    def of(self, delta: Tensor) -> float:
        """Weighted squared error left by ΔW (I, d)."""
        return float(self.error - 2 * (delta * self.cross).sum() + (delta * (self.gram @ delta)).sum())


@dataclass(frozen=True)
class Fit:
    """The best correction found: form, α, held-out error, and the new W (I, d) and bias in the stored dtype."""

    form: str
    alpha: float
    held_after: float
    weight: Tensor
    bias: Tensor | None
    tried: dict[str, float | str]


def best_fit(
    fit: Sums,
    held: Sums,
    weight: Tensor,
    bias: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    forms: tuple[str, ...],
    alphas: tuple[float, ...],
) -> Fit | None:
    """The α and form whose weights, rounded to the stored dtype, have the least held-out error.

    Args:
        weight, bias: the projection as it is, (d, I) and (d,).
        dtypes: stored dtypes of the two.
        forms: `fold` restricts ΔW to W·D with D (d×d); `refit` leaves all entries free.

    Returns:
        None where every form has fewer than 10 fitting tokens an unknown, or no system could be factored.
    """
    old = weight.detach().T.double()  # (I, d)
    if bias is not None:
        old = torch.cat([old, bias.detach()[None].double()])
    best: Fit | None = None
    tried: dict[str, float | str] = {}
    for form in forms:
        unknowns = old.shape[1] if form == "fold" else old.shape[0]
        if fit.tokens < TOKENS_PER_UNKNOWN * unknowns:
            tried[form] = f"skipped: {fit.tokens} tokens for {unknowns} unknowns"
            continue
        for alpha, delta in _solutions(fit, old, form, alphas):
            new = old + delta
            stored = (new[:-1] if bias is not None else new).T.to(dtypes[0])
            stored_bias = new[-1].to(dtypes[1]) if bias is not None else None
            rounded = stored.T.double()
            if stored_bias is not None:
                rounded = torch.cat([rounded, stored_bias[None].double()])
            after = held.of(rounded - old)
            tried[f"{form} α={alpha:g}"] = after / held.error
            if best is None or after < best.held_after:
                best = Fit(form, alpha, after, stored.contiguous(), stored_bias, tried)
    return best


def _solutions(fit: Sums, old: Tensor, form: str, alphas: tuple[float, ...]) -> list[tuple[float, Tensor]]:
    """ΔW (I, d) for every α; one Cholesky each, in float64."""
    gram, cross = (old.T @ fit.gram @ old, old.T @ fit.cross) if form == "fold" else (fit.gram, fit.cross)
    scale = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found = []
    for alpha in alphas:
        factor, failed = torch.linalg.cholesky_ex(gram + alpha * scale * eye)
        if int(failed) == 0:
            solution = torch.cholesky_solve(cross, factor)
            found.append((alpha, old @ solution if form == "fold" else solution))
    return found
