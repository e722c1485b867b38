"""What a layer loses without one of its MLP channels or KV groups, and which of them a merge keeps.

A unit writes into the residual stream through one column of a projection W (out × in). With a its activation:

* `l1`: s_j = E_t|a_tj| · Σ_i |W_ij|, CoMe's sensitivity (arXiv 2510.15304; `L1_Correlation` in its code);
* `l2`: s_j = sqrt(E_t a_tj²) · ‖W_·j‖₂, the root mean square error that dropping channel j alone causes, exactly.

A KV group's score is the mean over the g · head_dim columns of its query heads. Both are in units of the residual
stream, so channels of different layers can be ranked together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compression_dags.architectures import ModelShape
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError, IntegrityError

Score = Literal["l1", "l2"]
STATISTIC: dict[str, str] = {"l1": "mean_abs", "l2": "mean_square"}


@dataclass(frozen=True)
class Sensitivity:
    """Scores of one layer's units: `channels` (I,) and `heads` (n_kv,), float64 on the CPU."""

    channels: Tensor
    heads: Tensor


def column_scores(weight: Tensor, statistic: Tensor, score: Score) -> Tensor:
    """Score of every input channel of a projection.

    Args:
        weight: (out, in).
        statistic: (in,) mean |a| for `l1`, mean a² for `l2`.

    Returns:
        (in,) float64 on the weight's device.
    """
    order, size = (1, statistic) if score == "l1" else (2, statistic.sqrt())
    return torch.linalg.vector_norm(weight, ord=order, dim=0, dtype=torch.float32).double() * size.to(weight.device)


def sensitivity(
    weights: tuple[Tensor, Tensor], statistics: tuple[Tensor, Tensor], score: Score, shape: ModelShape
) -> Sensitivity:
    """Scores of one layer.

    Args:
        weights, statistics: of the attention's and of the MLP's output projection, as for `column_scores`.

    Raises:
        IntegrityError: a score is not finite.
    """
    heads, channels = (column_scores(w, x, score) for w, x in zip(weights, statistics, strict=True))
    found = Sensitivity(channels.cpu(), heads.reshape(shape.kv_heads, -1).mean(1).cpu())
    if not (torch.isfinite(found.channels).all() and torch.isfinite(found.heads).all()):
        raise IntegrityError("a channel's sensitivity is not finite: the model's activations or weights are not")
    return found


def layer_sensitivity(
    source: Checkpoint, statistics: Mapping[str, np.ndarray], layer: int, score: Score, device: str = "cpu"
) -> Sensitivity:
    """Scores of an original layer, from the statistics of the calibration pass and its weights.

    Raises:
        InputError: the calibration pass left no statistics of this layer.
    """
    names, found = source.layer(layer), []
    for group in ("attention_output", "mlp_output"):
        key = f"norms.layers.{layer}.{group}.{STATISTIC[score]}"
        if key not in statistics:
            raise InputError(f"the calibration statistics hold no {key}: run the calibration pass again")
        (projection,) = source.architecture.group(group)
        weight = source.tensor(names[f"{projection}.weight"]).to(device)
        found.append((weight, torch.from_numpy(np.asarray(statistics[key])).double()))
    (attention, heads), (mlp, channels) = found
    return sensitivity((attention, mlp), (heads, channels), score, source.shape)


def counts(shares: Sequence[float], total: int) -> list[int]:
    """How many of `total` units each member gives: the floor, and what remains to the largest share (the first).

    So a member whose share is below 1/total gives none, as in the released code.
    """
    found = [math.floor(share * total + 1e-9) for share in shares]
    largest = max(range(len(shares)), key=lambda i: (shares[i], -i))
    found[largest] += total - sum(found)
    return found


def strongest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores (ties: the lowest index), (count,) int32 ascending."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values.int()


def strongest_of_all(scores: Sequence[Tensor], total: int) -> list[Tensor]:
    """The `total` largest scores of all members together: the indices within each member, int32 ascending.

    The shares are then an outcome. Ties go to the first member and the lowest index.
    """
    kept = strongest(torch.cat(list(scores)), total)
    found, start = [], 0
    for each in scores:
        inside = kept[(kept >= start) & (kept < start + len(each))] - start
        found.append(inside.int())
        start += len(each)
    return found
