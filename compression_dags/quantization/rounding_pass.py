"""The pass of the calibrated quantizers: every matrix is rounded for the inputs that the rounded model gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compression_dags.architectures import ProjectionGroup
from compression_dags.errors import IntegrityError
from compression_dags.passes.host_copies import HostCopies
from compression_dags.passes.input_sums import InputSums
from compression_dags.passes.sequential import SequentialPass
from compression_dags.provenance.resume import ResumePoint, as_note, from_note
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.results import Rounding
from compression_dags.quantization.smoothing import Fold, fold_of
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.solvers.grids import Grid
from compression_dags.solvers.rounding import Rounded, Scales
from compression_dags.stage import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint


@dataclass(frozen=True)
class RoundedGroup:
    """Matrices that read one input.

    Attributes:
        found: module → Ŵ and what the ledger says of it.
        columns: s (in,) float32 if W diag(s) was rounded, for an input that is divided by s where it is made.
        again: rounds a matrix once more, its rows divided by (out,) factors.
    """

    found: dict[str, tuple[Rounded, dict[str, Any]]]
    columns: Tensor | None = None
    again: Callable[[str, Tensor | None], Rounded] | None = None


class RoundingPass(SequentialPass):
    """One run of a calibrated quantizer over a model.

    While a layer runs, weights whose input is to be divided by s are held as Ŵ diag(1/s): the model then computes what
    it will with s folded into a norm, or into the rows of the projection before.

    Attributes:
        rounded: module name → its codes and scales, in host memory once the pass is over.
        evidence: module name → what the ledger says beside the common columns.
        changed: tensor name → what it becomes by folding.
    """

    def __init__(
        self,
        stage: QuantizeStage,
        source: Checkpoint,
        choices: Mapping[str, Choice],
        blocks: TokenBlocks | None,
        device: str,
        dtype: str,
    ):
        self.stage, self.choices = stage, choices
        self.rounded: dict[str, Rounded] = {}
        self.evidence: dict[str, dict[str, Any]] = {}
        self.changed: dict[str, Tensor] = {}
        self._copies = HostCopies()
        self._again: dict[str, Callable[[str, Tensor | None], Rounded] | None] = {}  # of the group before
        super().__init__(
            source, blocks, device, dtype, name=stage.method, statistic=stage.wanted, follows=stage.follows
        )

    def run_layers(self, resume: ResumePoint | None, progress: Progress) -> None:
        super().run_layers(resume, progress)
        self._copies.close()

    def rounding(self, device: str) -> Rounding:
        return Rounding(self.choices, lambda name: self.rounded[name].to(device), self.evidence, self.changed)

    def change(self, index: int, held: dict[str, Tensor], seen: InputSums | None, label: str) -> list[Tensor]:
        chosen = {name: self.stored(name, weight) for name, weight in held.items() if name in self.choices}
        if not chosen:
            return list(held.values())
        if seen is None:
            raise IntegrityError(f"{label}: no calibration tokens reached it")
        choice = self.choices[next(iter(chosen))]
        fold = fold_of(self.source, index, self._group(index, chosen)) if len(chosen) == len(held) else None
        if fold and fold.rows and self._again.get(f"{fold.prefix}{fold.rows}") is None:
            fold = None  # what would take the factors is not quantized, or cannot
        group = self.stage.round_folded(chosen, seen, choice, label, fold)
        for name, (rounded, evidence) in group.found.items():
            self._leave(name, rounded)
            self.evidence[name] = {"tokens": seen.tokens, **evidence}
        if group.columns is not None and fold is not None:
            self._fold(fold, group.columns)
        self._again = dict.fromkeys(chosen, group.again)
        return [self._effective(group, n, w) for n, w in held.items()]

    @staticmethod
    def _effective(group: RoundedGroup, name: str, weight: Tensor) -> Tensor:
        if name not in group.found:
            return weight
        rounded = group.found[name][0]
        if group.columns is None:
            return rounded.dequantize(weight.dtype)
        return (rounded.dequantize() / group.columns).to(weight.dtype)

    def _fold(self, fold: Fold, columns: Tensor) -> None:
        """Divide by s what makes the input."""
        if fold.norm:
            self.changed |= fold.divided_norm(columns)
            return
        name = f"{fold.prefix}{fold.rows}"
        again = self._again[name]
        assert again is not None
        self._leave(name, again(name, fold.to_rows(columns)))
        self.changed |= fold.divided_bias(columns)

    def _leave(self, name: str, rounded: Rounded) -> None:
        parts = _parts(rounded)

        def land(found: list[Tensor]) -> None:
            self.rounded[name] = _whole(rounded.scales.grid, dict(zip(parts, found, strict=True)))

        self._copies.take(list(parts.values()), land)

    def _group(self, index: int, chosen: Mapping[str, Tensor]) -> ProjectionGroup:
        local = self.source.architecture.split_name(next(iter(chosen)))[1]
        return next(g for g in self.source.architecture.groups_of(index) if local in g.projections)

    def results_state(self) -> dict[str, Tensor]:
        self._copies.settle()
        state = {"evidence": as_note(self.evidence)}
        for name, rounded in self.rounded.items():
            state |= {f"{part}.{name}": tensor for part, tensor in _parts(rounded).items()}
        return state | {f"changed.{name}": tensor.cpu() for name, tensor in self.changed.items()}

    def restore_results(self, state: dict[str, Tensor]) -> None:
        self.evidence = from_note(state["evidence"])
        self.changed = {n.removeprefix("changed."): t for n, t in state.items() if n.startswith("changed.")}
        for name in self.evidence:
            parts = {part: state[f"{part}.{name}"] for part in PARTS if f"{part}.{name}" in state}
            self.rounded[name] = _whole(self.choices[name].grid(), parts)


#: Tensors of a rounded matrix, zero points and the scale of all scales where it has them.
PARTS = ("codes", "scale", "zero", "whole")


def _parts(rounded: Rounded) -> dict[str, Tensor]:
    scales = rounded.scales
    found = zip(PARTS, (rounded.codes, scales.scale, scales.zero_point, scales.global_scale), strict=True)
    return {part: tensor for part, tensor in found if tensor is not None}


def _whole(grid: Grid, parts: Mapping[str, Tensor]) -> Rounded:
    return Rounded(parts["codes"], Scales(grid, parts["scale"], parts.get("zero"), parts.get("whole")))


def as_bytes(codes: Tensor, kind: str) -> Tensor:
    """Integer codes in int8, which holds them exactly at a quarter of float32's size."""
    return codes.to(torch.int8) if kind == "int" else codes
