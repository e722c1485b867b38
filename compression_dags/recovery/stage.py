"""What every recovery stage has in common: it repairs a cut or merged model, and is never accepted if worse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compression_dags.architectures import ModelShape
from compression_dags.stage import Progress, Stage, implementation, silent
from compression_dags.step import BASE, WEIGHTS, Chain, Kind, Step

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.depth.plan import MergePlan
    from compression_dags.provenance.resume import ResumePoint
    from compression_dags.recovery.results import Recovery


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

    def check_tokens(self, shape: ModelShape, sequences: int, length: int) -> None:
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
        """The recovered checkpoint of `student` (whose layers are `plan`'s), written into `directory`.

        A step that does not lower the held-out loss is undone and recorded as `reject`; if none helps, the checkpoint
        is the student's.
        """
        return implementation(self)(
            self,
            teacher,
            student,
            plan,
            blocks,
            directory,
            device=device,
            dtype=dtype,
            resume=resume,
            progress=progress,
        )


#: Recoveries that one recipe may have: each is an asset of its own.
MOST_RECOVERIES = len(RecoverStage.kinds)
