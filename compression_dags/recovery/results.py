"""What a recovery made: the checkpoint, the tensors that changed, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.writer import PlannedTensor, unchanged, write_checkpoint
from compression_dags.provenance.decisions import Decision


@dataclass(frozen=True)
class Recovery:
    """The recovered checkpoint, the tensors that changed (in the stored dtype), and why."""

    checkpoint: Checkpoint
    fitted: dict[str, Tensor] = field(repr=False)
    decisions: list[Decision]
    metadata: dict[str, float | int | str] = field(default_factory=dict)


def write_recovered(student: Checkpoint, fitted: dict[str, Tensor], directory: Path) -> Checkpoint:
    """The student's checkpoint with the tensors of `fitted` (full name → value in the stored dtype) in place."""

    def planned(name: str) -> PlannedTensor:
        if name not in fitted:
            return unchanged(student, name)
        info = student.tensors[name]
        return PlannedTensor(info.dtype, info.shape, lambda: fitted[name])

    return write_checkpoint(directory, student, student.config, {name: planned(name) for name in student.tensors})
