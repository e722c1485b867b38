"""What every recovery stage has in common: it repairs a cut or merged model, and is never accepted if worse."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compression_dags.architectures import ModelShape
from compression_dags.provenance.decisions import Decision
from compression_dags.stage import Progress, Stage, silent
from compression_dags.step import BASE, WEIGHTS, Chain, Kind, Step

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.depth.plan import MergePlan
    from compression_dags.provenance.resume import ResumePoint

#: Closed-form fits need this many fitting tokens for every unknown of an output column.
TOKENS_PER_UNKNOWN = 10


@dataclass(frozen=True)
class Recovery:
    """The recovered checkpoint, the tensors that changed (in the stored dtype), and why."""

    checkpoint: Checkpoint
    fitted: dict[str, Tensor] = field(repr=False)
    decisions: list[Decision]
    facts: dict[str, float | int | str] = field(default_factory=dict)


class RecoverStage(Stage):
    """A stage that changes weights of the planned model, towards the base model's behaviour."""

    stage: ClassVar[str] = "recover"
    kinds: ClassVar[tuple[Kind, ...]] = tuple(
        Kind(
            "recovered_weights" + (f"_{index + 1}" if index else ""),
            f"The model after its {nth} recovery, or as it was before if that did not help.",
            (BASE, "calibration_tokens", "merge_plan", WEIGHTS),
            weights=True,
        )
        for index, nth in enumerate(("first", "second", "third"))
    )

    def steps(self, chain: Chain) -> tuple[Step, ...]:
        """`recovered_weights`, then `recovered_weights_2`, … for every further recovery."""
        return (
            Step(
                self.kinds[chain.recoveries].name,
                self.code_version,
                self.computing_options(),
                (BASE, "calibration_tokens", "merge_plan", WEIGHTS),
                "compression_dags.recovery.workers:recover",
                self,
                kind="recovered_weights",
                weights=True,
                data=self.data_digests,
            ),
        )

    def data_digests(self) -> dict[str, str]:
        """Role → digest of what is read beside the inputs of every recovery; nothing, unless a method says so.

        Raises:
            InputError: there is no such text.
        """
        return {}

    def computing_options(self) -> dict[str, Any]:
        """Options as they enter the fingerprint: all but the places of what `data_digests` stands for."""
        return self.options()

    def check_tokens(self, facts: ModelShape, sequences: int, length: int) -> None:
        """Refuse too few calibration tokens, before any compute.

        Raises:
            InputError: with the count, the need and the remedy.
        """

    def recover(
        self,
        teacher: Checkpoint,
        student: Checkpoint,
        plan: MergePlan,
        blocks: TokenBlocks,
        directory: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        resume: ResumePoint | None = None,
        progress: Progress = silent,
    ) -> Recovery:
        """Write the recovered checkpoint of `student` (whose layers are `plan`'s) into `directory`.

        A step that does not lower the held-out loss is undone and recorded as `reject`; if none helps, the checkpoint
        is the student's.
        """
        raise AssertionError(f"{type(self).__name__} must define recover")


def write_recovered(student: Checkpoint, fitted: dict[str, Tensor], directory: Path) -> Checkpoint:
    """The student's checkpoint with the tensors of `fitted` (full name → value in the stored dtype) in place."""
    from compression_dags.checkpoints.writer import PlannedTensor, unchanged, write_checkpoint

    def planned(name: str) -> PlannedTensor:
        if name not in fitted:
            return unchanged(student, name)
        info = student.tensors[name]
        return PlannedTensor(info.dtype, info.shape, lambda: fitted[name])

    return write_checkpoint(directory, student, student.config, {name: planned(name) for name in student.tensors})
