"""The pass of the calibrated quantizers: every matrix is rounded for the inputs that the rounded model gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compression_dags.calibration.inputs import InputSums
from compression_dags.calibration.walk import SequentialWalk
from compression_dags.errors import IntegrityError
from compression_dags.provenance.progress import as_note, from_note
from compression_dags.quantization.schemes import QuantizeStage, projections
from compression_dags.solvers.rounding import Rounded, Scales

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint


class RoundWalk(SequentialWalk):
    """One run of a calibrated quantizer over a model.

    Attributes:
        rounded: module name → its codes and scales, in host memory.
        evidence: module name → what the ledger says beside the common columns.
    """

    def __init__(self, stage: QuantizeStage, source: Checkpoint, blocks: TokenBlocks | None, device: str, dtype: str):
        self.stage, self.wanted = stage, set(projections(source, stage))
        self.rounded: dict[str, Rounded] = {}
        self.evidence: dict[str, dict[str, float | int | str]] = {}
        super().__init__(
            source, blocks, device, dtype, name=stage.method, statistic=stage.statistic, follows=stage.follows
        )

    def change(self, index: int, held: dict[str, Tensor], seen: InputSums | None, label: str) -> list[Tensor]:
        chosen = {name: self.stored(name, weight) for name, weight in held.items() if name in self.wanted}
        if not chosen:
            return list(held.values())
        if seen is None:
            raise IntegrityError(f"{label}: no calibration tokens reached it")
        found = self.stage.round_group(chosen, seen, label)
        for name, (rounded, evidence) in found.items():
            self.rounded[name] = rounded.to("cpu")
            self.evidence[name] = {"tokens": seen.tokens, **evidence}
        return [found[n][0].dequantize(w.dtype) if n in found else w for n, w in held.items()]

    def results_state(self) -> dict[str, Tensor]:
        state = {"evidence": as_note(self.evidence)}
        for name, rounded in self.rounded.items():
            scales = rounded.scales
            parts = {"codes": rounded.codes, "scale": scales.scale, "zero": scales.zero_point}
            parts["whole"] = scales.global_scale
            state |= {f"{part}.{name}": tensor for part, tensor in parts.items() if tensor is not None}
        return state

    def restore_results(self, state: dict[str, Tensor]) -> None:
        self.evidence = from_note(state["evidence"])
        for name in self.evidence:
            scales = Scales(
                self.stage.grid(), state[f"scale.{name}"], state.get(f"zero.{name}"), state.get(f"whole.{name}")
            )
            self.rounded[name] = Rounded(state[f"codes.{name}"], scales)


def as_bytes(codes: Tensor, kind: str) -> Tensor:
    """Integer codes in int8, which holds them exactly at a quarter of float32's size."""
    return codes.to(torch.int8) if kind == "int" else codes
