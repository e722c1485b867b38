"""When a part of a distillation stops: it is scored on held-out windows, and its best weights are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compression_dags.provenance.wording import apart, counted

if TYPE_CHECKING:
    from compression_dags.recovery.distillation.run import DistillRun


def why(evidence: dict[str, Any], target: str) -> str:
    """Why what was trained was accepted or rejected, by the numbers of its row."""
    before, after = apart(evidence["held_out_loss_before"], evidence["held_out_loss_after"])
    goal = "the base model's logits" if target == "logits" else "the base model's hidden states"
    trained = f"{counted(evidence['steps'], 'training step')} towards {goal}"
    if evidence["held_out_loss_after"] < evidence["held_out_loss_before"]:
        return f"recovered: {trained} lowered the held-out loss from {before} to {after} nats"
    return f"rejected: {trained} did not lower the held-out loss, {before} nats before and {after} at best after"


class Watch:
    """Scores a part under way, keeps its best state, stops it in time, and lets it resume where it was killed."""

    def __init__(self, run: DistillRun, positions: list[int]):
        self.run, self.positions = run, positions
        self.best, self.loss = run.student.tensors(positions), run.loss
        self.loss_before, self.waited = run.loss, 0

    def check(self, taken: int, optimizer: torch.optim.Optimizer) -> bool:
        """Score the weights as they would be stored; False when nothing got better for `patience` checks."""
        run = self.run
        masters = run.student.tensors(self.positions)
        run.student.round(self.positions)
        loss = run._held_out_loss()
        if loss < self.loss:
            self.best, self.loss, self.waited = run.student.tensors(self.positions), loss, 0
        else:
            self.waited += 1
        run.student.install(masters)
        self._save(taken, optimizer, masters)
        return self.waited < run.options.patience

    def _save(self, taken: int, optimizer: torch.optim.Optimizer, masters: dict[str, Tensor]) -> None:
        if self.run.resume is None:
            return
        moments = {
            f"{kind}.{name}": state[kind]
            for name, state in zip(masters, optimizer.state.values(), strict=True)
            for kind in ("exp_avg", "exp_avg_sq")
        }
        best = {f"best.{name}": t for name, t in self.best.items()}
        now = {f"now.{name}": t for name, t in masters.items()}
        note = {"taken": taken, "loss": self.loss, "loss_before": self.loss_before, "waited": self.waited}
        self.run._save(self.run.parts_done, note, {**moments, **best, **now})

    def resume(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> int:
        """Put back what `_save` kept; the steps taken so far."""
        note, tensors = self.run.under_way
        if note is None:
            return 0
        self.run.under_way = (None, {})
        self.loss, self.loss_before, self.waited = note["loss"], note["loss_before"], note["waited"]
        named = self.run.student.named(self.positions)
        device = next(iter(named.values())).device
        self.best = {name: tensors[f"best.{name}"].to(device) for name in named}
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[f"now.{name}"])
                moments = {kind: tensors[f"{kind}.{name}"].to(device) for kind in ("exp_avg", "exp_avg_sq")}
                step = torch.tensor(float(note["taken"]), device=device if device.type == "cuda" else "cpu")
                optimizer.state[parameter] = {"step": step, **moments}
        rates = [
            group["initial_lr"] * f(note["taken"])
            for group, f in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.last_epoch = note["taken"]
        return int(note["taken"])


def share_of_peak(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine to a tenth."""
    rise = max(1, int(warmup * total))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return 0.1 + 0.9 * 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))
