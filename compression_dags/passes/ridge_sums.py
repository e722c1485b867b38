"""Sums of a ridge regression over the tokens of a pass: weights of tokens, and one batch added to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression_dags.calibration.streaming import Batch
from compression_dags.solvers.ridge import Sums


def token_weights(batch: Batch, sink_positions: int, sink_weight: float) -> Tensor:
    """(b, T) float32: 0 at padding, `sink_weight` at the first positions of a sequence, else 1."""
    weight = batch.mask.float()
    weight[:, :sink_positions] *= sink_weight
    return weight


def add_batch(
    both: tuple[Sums, Sums],
    batch: Batch,
    first_held: int,
    z: Tensor,
    exit_state: Tensor,
    target: Tensor,
    weight: Tensor,
    module: Any,
) -> None:
    """Add a batch to the fitting and the held-out sums: rows from `first_held` on are held out, whatever the batch."""
    target, weight = target.float(), weight.to(target.device)
    z = z.reshape(*weight.shape, -1).float()
    held = torch.tensor([r >= first_held for r in batch.rows], device=target.device)[:, None]
    for sums, chosen in zip(both, ((weight > 0) & ~held, (weight > 0) & held), strict=True):
        if bool(chosen.any()):
            h = target[chosen]
            sums.add(z[chosen], h - exit_state.float()[chosen], h, weight[chosen], module.bias is not None)
