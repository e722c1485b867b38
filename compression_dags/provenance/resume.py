"""Checkpoints of a long stage, so that a killed run resumes at the layer it lost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from compression_dags.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class ResumePoint:
    """One resumable loop: tensors and a step number, replaced as a whole.

    Args:
        directory: scratch folder that survives a kill.
        settings: what the loop depends on. A stored state with other settings is refused, never silently reused.
        every_seconds: least time between two states; writing one costs about a pass over the hidden states.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], every_seconds: float = 20.0):
        self.directory, self.every_seconds = directory, every_seconds
        self._settings = json.loads(json.dumps(settings, sort_keys=True))
        self._last = time.monotonic()

    @property
    def _file(self) -> Path:
        return self.directory / "progress.safetensors"

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """The last whole state, or None.

        Raises:
            InputError: the state was made with other settings.
        """
        if not self._file.is_file():
            return None

        with safe_open(self._file, framework="pt") as f:
            note = json.loads(f.metadata()["progress"])
            if note["settings"] != self._settings:
                raise InputError(f"{self._file} was written with settings {note['settings']}, not {self._settings}")
            return note["step"], {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118

    def save_if_due(self, step: int, state: Callable[[], dict[str, Tensor]]) -> None:
        if time.monotonic() - self._last >= self.every_seconds:
            self.save(step, state())

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        # the store hands these points out, and imports no torch
        from safetensors.torch import save_file  # noqa: PLC0415

        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        note = json.dumps({"step": step, "settings": self._settings})
        save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, partial, metadata={"progress": note})
        os.replace(partial, self._file)
        self._last = time.monotonic()


def as_note(value: Any) -> Tensor:
    """Anything JSON can hold, as a tensor that a state can carry beside its weights."""
    # as above
    import torch  # noqa: PLC0415

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_note(note: Tensor) -> Any:
    """The inverse of `as_note`."""
    return json.loads(bytes(note.numpy()).decode())
