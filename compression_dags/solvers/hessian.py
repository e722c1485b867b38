"""H = Σ x xᵀ of one projection input, without losing what half precision holds exactly.

A bfloat16 number has 8 significant bits and a float16 number 11, so a product of two fits float32 exactly. A half
precision matrix product with float32 output forms the same terms as SparseGPT's float32 one, several times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression_dags.errors import IntegrityError

#: Tokens of one product: float32 sums stay short, their totals are added in float32.
CHUNK = 1 << 15


class Hessian:
    """Running Σ x xᵀ over tokens.

    Attributes:
        matrix: (d, d) float32, symmetric, not scaled.
        tokens: how many were added.
    """

    def __init__(self, matrix: Tensor, tokens: int = 0):
        self.matrix, self.tokens = matrix, tokens

    @classmethod
    def empty(cls, channels: int, device: torch.device | str) -> Hessian:
        return cls(torch.zeros(channels, channels, dtype=torch.float32, device=device))

    def add(self, x: Tensor) -> None:
        """Add tokens (…, d) of any float dtype."""
        rows = x.reshape(-1, x.shape[-1])
        self.matrix = add_product(self.matrix, rows, rows)
        self.tokens += len(rows)

    def mean_square(self) -> Tensor:
        """(d,) float64: mean of x² over tokens."""
        return self.matrix.diagonal().double() / max(1, self.tokens)

    def require_finite(self, name: str) -> None:
        """
        Raises:
            IntegrityError: an activation was not finite.
        """
        if not bool(torch.isfinite(self.matrix.diagonal()).all()):
            raise IntegrityError(f"{name}: activations are not finite; no Hessian can be formed from them")


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total` (a, b) + leftᵀ right over tokens (n, a), (n, b) of one dtype; in place but for float64 inputs."""
    for x, y in zip(left.split(CHUNK), right.split(CHUNK), strict=True):
        if x.is_cuda and x.dtype in {torch.bfloat16, torch.float16}:
            total += torch.mm(x.T, y, out_dtype=torch.float32)
        elif x.dtype == torch.float64:
            total = total.double().addmm_(x.T, y)
        else:
            total.addmm_(x.float().T, y.float())
    return total


def energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """() float64: ‖W X‖² = Σ (W H) ∘ W for W (rows, d). On a GPU the product is of bfloat16 factors: to about 0.1 %."""
    if weight.is_cuda:
        product = torch.mm(weight.bfloat16(), hessian.bfloat16(), out_dtype=torch.float32)
    else:
        product = weight @ hessian
    return (product * weight).sum(dtype=torch.float64)
