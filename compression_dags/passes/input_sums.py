"""What is summed over the tokens that a group of projections reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compression_dags.errors import IntegrityError
from compression_dags.solvers.hessian import Hessian, add_product
from compression_dags.stage import StatisticKind


@dataclass(frozen=True)
class Reference:
    """The dense model at the same tokens: (b, T, ·) each.

    Attributes:
        x: input of the projections.
        drift: residual stream that their output is added to, minus the pruned model's; None where it is not asked for.
    """

    x: Tensor
    drift: Tensor | None = None


class InputSums:
    """Sums over the real tokens of one input x̂ (d channels), in float32 or wider.

    Attributes:
        hessian: Σ x̂ x̂ᵀ, for `kind` hessian.
        squares: (d,) float64 Σ x̂², for `kind` mean_square.
        peaks: (2, d) float64 for kinds with a peak: max |x̂| over all tokens, and Σ over sequences of the max in each.
        sequences: how many had a token.
        cross: (d, d) Σ x x̂ᵀ with the dense model's x; None without a reference.
        drift: (rows, d) Σ (r − r̂) x̂ᵀ for writers of the residual stream r; None elsewhere.
        tokens: how many were added.
    """

    def __init__(self, kind: StatisticKind, channels: int, device: torch.device):
        self.kind, self.tokens = kind, 0
        self.hessian = Hessian.empty(channels, device) if kind.startswith("hessian") else None
        self.peaks = torch.zeros(2, channels, dtype=torch.float64, device=device) if kind.endswith("peak") else None
        self.sequences = 0
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self.cross: Tensor | None = None
        self.drift: Tensor | None = None

    def add(self, x: Tensor, mask: Tensor | None, reference: Reference | None = None) -> None:
        """Add (b, T, d) inputs; `mask` (b, T) is False at padding, None if there is none."""
        rows = _rows(x, mask)
        self.tokens += len(rows)
        if self.peaks is not None and len(rows):
            own = x.abs() if mask is None else x.abs().masked_fill(~mask[..., None], 0)
            own = own.amax(1).double()  # keeps a NaN
            self.peaks = torch.stack([torch.maximum(self.peaks[0], own.amax(0)), self.peaks[1] + own.sum(0)])
            self.sequences += len(x) if mask is None else int(mask.any(1).sum())
        if self.hessian is None and self.peaks is not None:
            return
        if self.hessian is None:
            # one read of the inputs, no float32 copy
            self.squares += torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
            return
        self.hessian.add(rows)
        if reference is not None:
            self.cross = self._product(self.cross, reference.x, rows, mask)
            if reference.drift is not None:
                self.drift = self._product(self.drift, reference.drift, rows, mask)

    @staticmethod
    def _product(total: Tensor | None, left: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        left = _rows(left, mask)
        if total is None:
            total = torch.zeros(left.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
        return add_product(total, left.to(rows.dtype), rows)

    def peak(self, label: str, over: Literal["all", "sequence"] = "all") -> Tensor:
        """(d,) float32: max |x̂| over all tokens, or its mean over sequences of the largest in each.

        Raises:
            IntegrityError: an input was not finite.
        """
        if self.peaks is None or not bool(torch.isfinite(self.peaks).all()):
            raise IntegrityError(f"{label}: activations are not finite; nothing can be decided by them")
        return (self.peaks[0] if over == "all" else self.peaks[1] / max(1, self.sequences)).float()

    def mean_square(self, label: str) -> Tensor:
        """(d,) float64.

        Raises:
            IntegrityError: an input was not finite.
        """
        if not bool(torch.isfinite(self.squares).all()):
            raise IntegrityError(f"{label}: activations are not finite; nothing can be decided by them")
        return self.squares / max(1, self.tokens)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1)]
