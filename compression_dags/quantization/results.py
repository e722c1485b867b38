"""What a quantizer decided, and what was made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.provenance.decisions import Decision
from compression_dags.quantization.formats import Choice
from compression_dags.solvers.rounding import Rounded

Rounder = Callable[[str], Rounded]


@dataclass(frozen=True)
class Rounding:
    """What a method decided.

    Attributes:
        choices: module → its scheme, in the order of the layers.
        rounded: module name → Ŵ on its grid.
        evidence: module → what the ledger says beside the common columns; `weight_error` there is the relative error
            of a weight that was scaled before it was rounded.
        changed: tensors of the checkpoint that are not quantized but no longer the source's (norms, biases).
    """

    choices: Mapping[str, Choice]
    rounded: Rounder = field(repr=False)
    evidence: Mapping[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class QuantizedModel:
    """What a quantizer made.

    Attributes:
        decisions: a row for every quantized matrix and for every matrix kept as it was.
        bits_per_weight: stored bits of the quantized matrices, scales and zero points included, over their weights.
        rounding: what was packed.
    """

    checkpoint: Checkpoint
    decisions: list[Decision]
    bits_per_weight: float
    rounding: Rounding = field(repr=False)
