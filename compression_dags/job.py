"""What a step is given when it runs: its inputs as values, a device, progress, and where to write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.provenance.artifacts import CHECKPOINT, DECISIONS, Artifact
from compression_dags.provenance.decisions import Decision, write_decisions
from compression_dags.provenance.resume import ResumePoint
from compression_dags.stage import Progress, silent
from compression_dags.step import WEIGHTS, Step


class Device(Protocol):
    """A leased device: its name for torch, and the dtype in which it computes."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Job:
    """One run of a step.

    Attributes:
        step: what is run.
        inputs: role → artifact.
        out: folder of the artifact to be.
        lease: holds a device while computing; waits for a free one.
        resume: state that survives a kill.
        progress: wraps iterables to show how far they are.
    """

    step: Step
    inputs: Mapping[str, Artifact]
    out: Path
    lease: Callable[[], contextlib.AbstractContextManager[Device]]
    resume: ResumePoint | None = None
    progress: Progress = field(default=silent)

    @property
    def stage(self) -> Any:
        """The recipe's stage that asked for the step."""
        return self.step.stage

    @property
    def target(self) -> Path:
        """Where a checkpoint goes."""
        return self.out / CHECKPOINT

    def path(self, role: str) -> Path | None:
        """Folder of an input, or None if the step has none of this role."""
        return self.inputs[role].path if role in self.inputs else None

    def checkpoint(self, role: str = WEIGHTS) -> Checkpoint:
        """The stock checkpoint of an input."""
        return Checkpoint(self.inputs[role].checkpoint)

    @contextlib.contextmanager
    def device(self) -> Iterator[dict[str, Any]]:
        """`device` and `dtype` as the methods take them, leased until the block ends."""
        with self.lease() as device:
            yield {"device": device.name, "dtype": device.dtype}

    def decide(self, rows: Sequence[Decision]) -> None:
        """Write the decision rows beside the artifact."""
        write_decisions(rows, self.out / DECISIONS)
