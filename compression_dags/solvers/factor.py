"""The upper Cholesky factor of an inverse Hessian, damped.

SparseGPT and GPTQ need U with H⁻¹ = UᵀU, and take three factorisations to get it (Cholesky, inverse, Cholesky). With J
the reversal of rows and columns, J H J = L Lᵀ gives H = R Rᵀ for the upper triangular R = J L J, so U = R⁻¹: one
factorisation and one triangular inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression_dags.errors import IntegrityError

#: Damping is multiplied by this after a failed factorisation, and so often; then once more in float64.
RAISE, ATTEMPTS = 10.0, 4


@dataclass(frozen=True)
class Factor:
    """U of one input, and what it took.

    Attributes:
        upper: (d, d), upper triangular, H⁻¹ = UᵀU for H damped and its dead channels set to 1.
        dead: (d,) bool, inputs that were 0 for every token.
        damping: λ over mean diag H that was used.
        attempts: 1 if the first damping did.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    attempts: int

    @property
    def evidence(self) -> dict[str, float | int]:
        return {"damping": self.damping, "attempts": self.attempts, "dead_inputs": int(self.dead.sum())}


def inverse_factor(hessian: Tensor, damping: float = 0.01, name: str = "hessian") -> Factor:
    """U of `hessian` (d, d), which is not changed.

    Where the factorisation fails, the damping grows tenfold, at most `ATTEMPTS` times, and then float64 is tried; the
    result says so. There is no silent identity.

    Raises:
        IntegrityError: not finite, or not positive definite under any of these dampings.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise IntegrityError(f"{name}: the Hessian is not finite; the model's activations overflow here")
    dead = diagonal == 0
    mean = float(diagonal.double().mean())
    if mean <= 0:
        mean = 1.0  # every input is dead: H is the identity by its dead channels alone, and all weights go
    damped, tried = damping, 0
    for dtype, times in ((hessian.dtype, ATTEMPTS), (torch.float64, ATTEMPTS)):
        for _ in range(times):
            tried += 1
            upper = _upper(hessian, dead, damped * mean, dtype)
            if upper is not None:
                return Factor(upper.to(hessian.dtype), dead, damped, tried)
            damped *= RAISE
        damped = damping
    raise IntegrityError(
        f"{name}: the Hessian is not positive definite with damping up to {damping * RAISE ** (ATTEMPTS - 1):g}; "
        "use more calibration tokens or a larger damping"
    )


def _upper(hessian: Tensor, dead: Tensor, ridge: float, dtype: torch.dtype) -> Tensor | None:
    flipped = hessian.to(dtype).flip(0, 1).contiguous()  # a copy in any case
    flipped.diagonal().add_(dead.flip(0).to(dtype)).add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    if int(failed):
        return None
    eye = torch.eye(len(lower), dtype=dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1).contiguous() if bool(torch.isfinite(inverse.diagonal()).all()) else None
