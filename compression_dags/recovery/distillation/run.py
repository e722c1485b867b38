"""One distillation run: groups on hidden states, then logits; resumable, and never accepted if worse."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.training_windows import TrainingWindows, training_windows
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.plan import MergePlan
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import ResumePoint, as_note, from_note
from compression_dags.recovery.distillation.model import (
    Student,
    WholeModel,
    hidden_loss,
    logit_divergence,
    next_token_loss,
)
from compression_dags.recovery.distillation.options import Distillation
from compression_dags.recovery.distillation.processes import in_processes
from compression_dags.recovery.distillation.watch import Watch, share_of_peak, why
from compression_dags.recovery.results import Recovery, write_recovered
from compression_dags.stage import Progress, silent

UNIT = "held-out next-token loss after / before"


class DistillRun:
    """Teacher and student in memory; the student's trained layers in float32, everything else in the compute dtype."""

    def __init__(
        self,
        options: Distillation,
        teacher: Checkpoint,
        student: Checkpoint,
        plan: MergePlan,
        device: str,
        dtype: str,
        resume: ResumePoint | None,
        progress: Progress,
    ):
        self.options, self.plan, self.resume, self.progress = options, plan, resume, progress
        self.teacher_checkpoint, self.student_checkpoint = teacher, student
        self.device, self.dtype = device, dtype
        self.decisions: list[Decision] = []
        self.trained: set[str] = set()
        self.loss = float("nan")  # held-out loss of the student as it stands
        self.parts_done = 0
        self.under_way: tuple[dict[str, Any] | None, dict[str, Tensor]] = (None, {})
        self.seen_tokens, self.seconds = 0, 0.0
        self.optimizer_bytes = self.trained_parameters = 0

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self, directory: Path) -> Recovery:
        groups = self.plan.gaps()
        if not groups:
            return Recovery(write_recovered(self.student_checkpoint, {}, directory), {}, [])
        self._prepare()
        done = self._restore()
        if not done and self.under_way[0] is None:
            self.loss = self._held_out_loss()
        parts = self._parts(groups)
        for index, part in enumerate(parts):
            if index >= done:
                part()
                self._save(index + 1)
        fitted = self.student.stored(self.trained)
        metadata = {
            "training_tokens": self.windows.tokens,
            "tokens_per_second": round(self.seen_tokens / self.seconds, 1) if self.seconds else 0.0,
            "trained_parameters": self.trained_parameters,
            "optimizer_state_bytes": self.optimizer_bytes,
        }
        if torch.device(self.device).type == "cuda":
            metadata["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20)
        checkpoint = write_recovered(self.student_checkpoint, fitted, directory)
        return Recovery(checkpoint, fitted, self.decisions, metadata)

    def _prepare(self) -> None:
        options = self.options
        torch.manual_seed(options.seed)
        tokenizer = AutoTokenizer.from_pretrained(self.teacher_checkpoint.path, local_files_only=True)
        context = int(self.teacher_checkpoint.text_config.get("max_position_embeddings") or options.length)
        self.windows: TrainingWindows = training_windows(
            options.corpora,
            tokenizer,
            length=min(options.length, context),
            tokens=options.tokens,
            held_windows=options.held_windows,
            seed=options.seed,
        )
        self.rows = max(1, options.batch_tokens // self.windows.ids.shape[1])
        if len(self.windows.order) < self.rows:
            raise InputError(
                f"recover: {options.method} has {len(self.windows.order)} training windows, less than one step of "
                f"{self.rows}: lower batch_tokens (now {options.batch_tokens}) or give more text"
            )
        self.teacher = WholeModel(self.teacher_checkpoint, self.device, self.dtype)
        self.student = Student(self.student_checkpoint, self.device)

    def _parts(self, groups: list[int]) -> list[Callable[[], None]]:
        """What is trained, in order; each with its share of the training order."""
        hidden, logit = self._shares()
        parts: list[Callable[[], None]] = []
        if self.options.inputs == "teacher":
            if len(hidden) >= self.rows:
                parts.append(partial(self._independent, groups, hidden))
        else:
            cuts = np.array_split(hidden, len(groups))
            if all(len(cut) >= self.rows for cut in cuts):
                parts += [partial(self._one_group, p, cut) for p, cut in zip(groups, cuts, strict=True)]
        if len(logit) >= self.rows:
            parts.append(partial(self._logits, groups, logit))
        if not parts:
            raise InputError(
                f"recover: {self.options.method} has too few tokens ({self.windows.tokens:,}) for {len(groups)} merged "
                f"layers in steps of {self.options.batch_tokens:,}: raise tokens or lower batch_tokens"
            )
        return parts

    def _shares(self) -> tuple[np.ndarray, np.ndarray]:
        """Training order of the hidden part and of the logit part, whole steps each."""
        order = self.windows.order
        cut = round((1 - self.options.logit_share) * len(order))
        return order[:cut], order[cut:]

    # -- parts -------------------------------------------------------------------------------------------------------

    def _one_group(self, position: int, order: np.ndarray) -> None:
        """distill-sp: one merged layer on the student's own states."""
        before = self.student.tensors([position])
        self._train([position], order, self._hidden_step([position], "student"), self.options.hidden_lr)
        self._accept(position, before, order)

    def _independent(self, groups: list[int], order: np.ndarray) -> None:
        """distill-mp: all merged layers on the base model's states; then accepted one by one, from the bottom."""
        before = self.student.tensors(groups)
        if self.options.workers > 1:
            after = in_processes(self, groups, order, _child)
            self._count(order, groups)
        else:
            self.train_independent(groups, order)
            after = self.student.tensors(groups)
        self.student.install(before)
        for position in groups:
            prefix = self.student.prefix(position)
            old = {k: t for k, t in before.items() if k.startswith(prefix)}
            self.student.install({k: t for k, t in after.items() if k.startswith(prefix)})
            self._accept(position, old, order)

    def train_independent(self, groups: list[int], order: np.ndarray) -> None:
        """Train the given groups side by side: their losses share a pass of the base model and nothing else."""
        self._train(groups, order, self._hidden_step(groups, "teacher"), self.options.hidden_lr, each=True)

    def _logits(self, groups: list[int], order: np.ndarray) -> None:
        """The student's logits towards the base model's; the best of the checked states is kept."""
        chosen = groups if self.options.logit_train == "merged" else list(range(len(self.plan.layers)))
        watch = Watch(self, chosen)
        step = self._logit_step(min(chosen))
        steps = self._train(chosen, order, step, self.options.logit_lr, watch=watch)
        self.student.install(watch.best)
        sources = sorted({s for p in chosen for s in self.plan.layers[p].sources})
        self._record("logits", sources, watch.loss_before, watch.loss, order, steps)
        if watch.loss < watch.loss_before:
            self.loss = watch.loss
            self.trained |= set(watch.best)

    def _accept(self, position: int, before: dict[str, Tensor], order: np.ndarray) -> None:
        """Round a trained layer to its stored dtype; keep it if the student's held-out loss falls."""
        self.student.round([position])
        loss, loss_before = self._held_out_loss(), self.loss
        name = self.student.prefix(position).rstrip(".")
        self._record(name, list(self.plan.layers[position].sources), loss_before, loss, order, len(order) // self.rows)
        if loss < loss_before:
            self.loss = loss
            self.trained |= set(before)
        else:
            self.student.install(before)

    def _record(
        self, target: str, sources: list[int], before: float, after: float, order: np.ndarray, steps: int
    ) -> None:
        options = self.options
        evidence = {
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "tokens": int(steps * self.rows * self.windows.ids.shape[1]),
            "steps": steps,
            "distinct_windows": len(np.unique(order)),
            "corpora_windows": self.windows.corpora,
            "inputs": options.inputs if target != "logits" else "tokens",
            "loss": options.hidden_loss if target != "logits" else "logit divergence",
            "learning_rate": options.hidden_lr if target != "logits" else options.logit_lr,
        }
        action, step = "recover" if after < before else "reject", len(self.decisions)
        reason = why(evidence, target)
        row = Decision("recover", options.method, step, target, action, sources, after / before, UNIT, reason, evidence)
        self.decisions.append(row)

    # -- training ----------------------------------------------------------------------------------------------------

    def _train(
        self,
        positions: list[int],
        order: np.ndarray,
        step: Callable[[Tensor], Tensor],
        rate: float,
        watch: Watch | None = None,
        each: bool = False,
    ) -> int:
        """AdamW with warm-up and cosine over the whole steps of `order`; returns the steps taken.

        `step` gives the loss of a batch of ids (b, T). `each` clips the gradient of every layer by itself, so that
        layers trained side by side do not know of one another.
        """
        layers = [list(self.student.named([p]).values()) for p in positions]
        parameters = [p for layer in layers for p in layer]
        total = len(order) // self.rows
        fused = torch.device(self.device).type == "cuda"
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: share_of_peak(s, total, self.options.warmup))
        for parameter in parameters:
            parameter.requires_grad_(True)
        marks = {round(total * (i + 1) / self.options.checks) for i in range(self.options.checks)}
        start = taken = watch.resume(optimizer, schedule) if watch else 0
        self._begin()
        for index in self.progress(range(start, total), f"{self.options.method} steps"):
            ids = self._batch(order[index * self.rows : (index + 1) * self.rows])
            optimizer.zero_grad(set_to_none=True)
            step(ids).backward()
            for group in layers if each else [parameters]:
                torch.nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
            schedule.step()
            taken = index + 1
            if watch and taken in marks:
                self._pause(0)
                if not watch.check(taken, optimizer):
                    break
                self._begin()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._pause(taken - start)
        self._account(optimizer, parameters)
        return taken

    def _begin(self) -> None:
        self._synchronize()
        self._clock = time.monotonic()

    def _pause(self, steps: int) -> None:
        self._synchronize()
        self.seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()
        self.seen_tokens += steps * self.rows * self.windows.ids.shape[1]

    def _synchronize(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)

    def _account(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.ndim)
        self.optimizer_bytes = max(self.optimizer_bytes, state)
        self.trained_parameters = max(self.trained_parameters, sum(p.numel() for p in parameters))

    def _count(self, order: np.ndarray, groups: list[int]) -> None:
        """What child processes trained."""
        self.trained_parameters = max(
            self.trained_parameters, sum(p.numel() for p in self.student.named(groups).values())
        )
        self.optimizer_bytes = max(self.optimizer_bytes, 8 * self.trained_parameters)

    def _batch(self, chosen: np.ndarray) -> Tensor:
        ids = torch.from_numpy(self.windows.ids[chosen]).long()
        if torch.device(self.device).type == "cuda":
            return ids.pin_memory().to(self.device, non_blocking=True)
        return ids

    def _hidden_step(self, positions: list[int], inputs: str) -> Callable[[Tensor], Tensor]:
        def step(ids: Tensor) -> Tensor:
            entries, exits = self._teacher_borders(ids, positions, inputs)
            if inputs == "student":
                entries = {positions[0]: self.student.state(ids, positions[0])}
            losses = [hidden_loss(self.student.layer(p, entries[p]), exits[p], self.options) for p in positions]
            return torch.stack(losses).sum()

        return step

    def _teacher_borders(
        self, ids: Tensor, positions: list[int], inputs: str
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The base model's states where the groups begin and end."""
        covered = {p: self.plan.covered(p) for p in positions}
        wanted = {c.stop for c in covered.values()}
        if inputs == "teacher":
            wanted |= {c.start for c in covered.values()}
        states = self.teacher.states(ids, wanted)
        return (
            {p: states[c.start] for p, c in covered.items() if c.start in states},
            {p: states[c.stop] for p, c in covered.items()},
        )

    def _logit_step(self, first: int) -> Callable[[Tensor], Tensor]:
        def step(ids: Tensor) -> Tensor:
            with torch.no_grad():
                goal = self.teacher.final(ids)
            ours = self.student.final(ids, grad_from=first)
            return logit_divergence(self.student, ours, self.teacher, goal, self.options.logit_temperature)

        return step

    # -- scoring -----------------------------------------------------------------------------------------------------

    def _held_out_loss(self) -> float:
        held = torch.from_numpy(self.windows.held).long()
        sums = [next_token_loss(self.student, rows.to(self.device)) for rows in held.split(self.rows)]
        total = sum(float(s) for s, _ in sums) / sum(n for _, n in sums)
        return total if total == total else float("inf")

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _save(self, done: int, note: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> None:
        """State after `done` parts; `note` and `tensors` are what a part under way needs besides."""
        if self.resume is None:
            return
        self.parts_done = done
        note = {
            "under_way": note,
            "decisions": [asdict(d) for d in self.decisions],
            "loss": self.loss,
            "trained": sorted(self.trained),
            "account": [self.seen_tokens, self.seconds, self.trained_parameters, self.optimizer_bytes],
        }
        text = as_note(note)
        named = self.student.named()
        held = {n: named[n].detach() for n in self.trained}
        self.resume.save(done, {"note": text, **held, **(tensors or {})})

    def _restore(self) -> int:
        saved = self.resume.load() if self.resume else None
        if saved is None:
            return 0
        done, tensors = saved
        note = from_note(tensors.pop("note"))
        self.decisions = [Decision.from_saved(row) for row in note["decisions"]]
        self.loss, self.trained = note["loss"], set(note["trained"])
        self.seen_tokens, self.seconds, self.trained_parameters, self.optimizer_bytes = note["account"]
        self.parts_done, self.under_way = done, (note["under_way"], tensors)
        self.student.install({name: t for name, t in tensors.items() if name in self.trained})
        return done


def _child(
    options: Distillation,
    plan: MergePlan,
    where: tuple[str, str],
    device: str,
    dtype: str,
    groups: list[int],
    order: np.ndarray,
) -> dict[str, np.ndarray]:
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # kernels go to the current device, which is the first one in a new process
    run = DistillRun(options, Checkpoint(where[0]), Checkpoint(where[1]), plan, device, dtype, None, silent)
    run._prepare()
    run.train_independent(groups, order)
    return {name: tensor.cpu().numpy() for name, tensor in run.student.tensors(groups).items()}


def recover(
    options: Distillation,
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
    """The student with its merged layers distilled; `blocks` is not read. Teacher and student are in memory whole."""
    options.check(teacher.shape)
    return DistillRun(options, teacher, student, plan, device, dtype, resume, progress).run(directory)
