"""The evaluation harness as a resource: where data lies, and one loaded model for all tasks of a family."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from compression_dags.evaluation.known import check_dense
from compression_dags.evaluation.samples import continuations, has_tokenizer
from compression_dags.evaluation.tasks import HarnessTask, PerplexityTask, Task, data_digest
from compression_dags.paths import PROJECT
from compression_dags.resources.accelerator import Accelerator, Device
from compression_dags.stage import bar


class Evaluator(dg.ConfigurableResource):
    """Scores checkpoints.

    `data_dirs` are folders of the shape `<folder>/<task>/<split>.jsonl`, separated by the path separator; the
    project's own `data/eval` comes last. A task found in none of them comes from the hub.
    """

    data_dirs: str = ""

    @property
    def folders(self) -> list[Path]:
        given = [Path(d) for d in self.data_dirs.split(os.pathsep) if d]
        return [*given, PROJECT / "data" / "eval"]

    def data_digest(self, task: Task) -> str:
        return data_digest(task, self.folders)

    @contextlib.contextmanager
    def session(
        self, checkpoint: Path, missing: list[Task], accelerator: Accelerator, *, generate: bool = False
    ) -> Iterator["Session"]:
        """Hold the device while there is something to score or to generate; without it nothing is loaded."""
        if not missing and not generate:
            yield Session(checkpoint, missing, self.folders, Device("cpu", "float32"))
            return
        with accelerator.lease() as device:
            yield Session(checkpoint, missing, self.folders, device)


class Session:
    """One checkpoint under evaluation; the model is loaded at the first score and shared by all."""

    def __init__(self, checkpoint: Path, tasks: list[Task], folders: list[Path], device: Device):
        self.checkpoint, self.tasks, self.folders, self.device = checkpoint, tasks, folders, device

    @functools.cached_property
    def model(self) -> Any:
        from compression_dags.checkpoints.gate import load_stock  # noqa: PLC0415 - torch, where something is scored

        return load_stock(self.checkpoint, device=self.device.name, dtype=self.device.dtype)

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # noqa: PLC0415 - definitions load without it

        return AutoTokenizer.from_pretrained(self.checkpoint, local_files_only=True)

    @functools.cached_property
    def harness_scores(self) -> dict[str, dict[str, float]]:
        """All lm-eval tasks in one call."""
        from compression_dags.evaluation.harness import run_harness  # noqa: PLC0415 - lm-eval takes seconds

        tasks = [t for t in self.tasks if isinstance(t, HarnessTask)]
        return run_harness(self.model, self.tokenizer, tasks, self.folders)

    def score(self, task: Task, directory: Path) -> dict[str, float]:
        """Metrics of one task; a perplexity's per-window losses go into `directory`."""
        if isinstance(task, PerplexityTask):
            from compression_dags.evaluation.perplexity import perplexity  # noqa: PLC0415 - torch

            result = perplexity(
                self.model,
                self.tokenizer,
                task.read(),
                window=task.window,
                max_windows=task.max_windows,
                device=self.device.name,
                progress=functools.partial(_labelled, bar, task.name),
            )
            result.frame().to_parquet(directory / "windows.parquet", index=False)
            return result.metrics
        return self.harness_scores[task.name]

    def samples(self) -> list[str] | None:
        """Continuations of the fixed prompts; None of a model without a tokenizer."""
        return continuations(self.model, self.tokenizer) if has_tokenizer(self.checkpoint) else None

    def guard(self, slug: str, task: Task, metrics: dict[str, float]) -> None:
        """Stop the run when a known dense model scores far from its known value."""
        check_dense(slug, task.name, metrics)


def _labelled(bar, name, items, description, total=None):
    return bar(items, f"{name}: {description}", total)
