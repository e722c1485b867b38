"""|W|·‖x‖ of a layer's weights, for `owl` and `dlp`: one matrix at a time, on the device of the weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compression_dags.errors import InputError, IntegrityError
from compression_dags.sparsity.allocation import AllocationProbe, Matrix, SparsityEvidence, Unit


def scored_weights(unit: Unit, evidence: SparsityEvidence) -> list[tuple[Matrix, np.ndarray]]:
    """The unit's matrices whose input norms are known, with them.

    Raises:
        InputError: none are known.
    """
    known = [(m, evidence.channel_norms(m)) for m in unit.matrices]
    found = [(m, x) for m, x in known if x is not None]
    if not found:
        raise InputError(f"{unit.name}: the calibration pass left no norms of the inputs of {unit.matrices[0].name}")
    return found


def scores(matrix: Matrix, norms: np.ndarray, probe: AllocationProbe) -> Tensor:
    """|W|·‖x‖ of one matrix: (rows, columns) float32."""
    weight = probe.weights(matrix.name)
    return weight.abs().float() * torch.from_numpy(norms).to(weight.device, torch.float32)


def mean_score(unit: Unit, evidence: SparsityEvidence, probe: AllocationProbe) -> float:
    """Mean of |W|·‖x‖ over a unit's weights, one matrix at a time."""
    total, count = 0.0, 0
    for matrix, norms in scored_weights(unit, evidence):
        found = scores(matrix, norms, probe)
        total, count = total + float(found.sum(dtype=torch.float64)), count + found.numel()
    if not np.isfinite(total):
        raise IntegrityError(f"{unit.name}: |W|·‖x‖ is not finite: the model's weights or activations are not")
    return total / count


def outlier_ratio(unit: Unit, evidence: SparsityEvidence, probe: AllocationProbe, threshold: float) -> float:
    """Percent of a unit's scores above `threshold` times their mean."""
    limit = threshold * mean_score(unit, evidence, probe)
    above, count = 0, 0
    for matrix, norms in scored_weights(unit, evidence):
        found = scores(matrix, norms, probe)
        above, count = above + int((found > limit).sum()), count + found.numel()
    return 100.0 * above / count
