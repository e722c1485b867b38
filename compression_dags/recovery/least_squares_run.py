"""Least squares at every gap, one after another, on the student's own states."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import Batch, DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.plan import MergePlan
from compression_dags.passes.ridge_sums import add_batch, token_weights
from compression_dags.passes.scored_rows import loss_sum
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import ResumePoint, as_note, from_note
from compression_dags.provenance.wording import apart, number
from compression_dags.recovery.least_squares import LeastSquares
from compression_dags.recovery.results import Recovery, write_recovered
from compression_dags.solvers.ridge import Fit, Sums, best_fit
from compression_dags.stage import Progress, silent


def recover(
    options: LeastSquares,
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
    """The recovered checkpoint: every gap of `plan` is fitted in turn, on the student's own (already recovered)
    states."""
    options.check_tokens(teacher.shape, len(blocks.lengths), int(blocks.tokens // len(blocks.lengths)))
    run = _Run(options, teacher, student, plan, blocks, device, dtype)
    fitted, decisions = run.all_positions(resume, progress)
    return Recovery(write_recovered(student, fitted, directory), fitted, decisions)


class _Run:
    def __init__(
        self,
        options: LeastSquares,
        teacher: Checkpoint,
        student: Checkpoint,
        plan: MergePlan,
        blocks: TokenBlocks,
        device: str,
        dtype: str,
    ):
        self.options, self.plan = options, plan
        # A teacher layer is run once and never again, so keeping it would only cost memory.
        self.teacher: DecoderStream = DecoderStream(teacher, device=device, dtype=dtype, resident=False)
        self.student: DecoderStream = DecoderStream(student, device=device, dtype=dtype)
        self.t_batches: list[Batch] = self.teacher.batches(blocks)
        self.s_batches: list[Batch] = self.student.batches(blocks)
        self.held = options.held_out(len(blocks.lengths))
        self.rows = len(blocks.lengths)
        self.loss: float | None = None  # held-out loss of the student as it stands

    def all_positions(self, resume: ResumePoint | None, progress: Progress) -> tuple[dict[str, Tensor], list[Decision]]:
        gaps = self.plan.gaps()
        if not gaps:
            return {}, []
        last = gaps[-1] if self.options.scope == "gaps" else len(self.plan.layers) - 1
        first, fitted, decisions = self._restore(resume)
        exact = self.plan.slots[0] == 0 and all(self._same_layer(p) for p in range(min(first, gaps[0])))
        for position in progress(range(first, last + 1), "least squares (layers)"):
            self._advance_teacher(position)
            exact = exact and position < gaps[0] and self._same_layer(position)
            if exact:
                for ours, theirs in zip(self.s_batches, self.t_batches, strict=True):
                    ours.hidden = theirs.hidden
                continue
            with self.student.layer(position) as layer:
                if position in gaps or self.options.scope == "sweep":
                    for writer in self.options.writers(self.student.checkpoint.shape):
                        decisions.append(self._fit(position, layer, writer, fitted, len(decisions)))
                for batch in self.s_batches:
                    batch.hidden = self.student.apply(layer, position, batch)
            if resume:
                resume.save_if_due(position + 1, lambda: self._state(fitted, decisions))
        return fitted, decisions

    def _same_layer(self, position: int) -> bool:
        """Whether the student's layer is the teacher's, bit for bit: its states need not be run then."""
        ours, theirs = self.student.checkpoint, self.teacher.checkpoint
        names = theirs.layer(self.plan.layers[position].slot)
        pairs = [(name, names[local]) for local, name in ours.layer(position).items()]
        return all(torch.equal(ours.tensor(a), theirs.tensor(b)) for a, b in pairs)

    def _advance_teacher(self, position: int) -> None:
        with torch.inference_mode():
            for index in self.plan.covered(position):
                with self.teacher.layer(index) as layer:
                    for batch in self.t_batches:
                        batch.hidden = self.teacher.apply(layer, index, batch)

    def _fit(self, position: int, layer: nn.Module, writer: str, fitted: dict[str, Tensor], step: int) -> Decision:
        """Choose ΔW for one projection, write it into `layer` and `fitted` if it is accepted, and say so."""
        name = self.student.checkpoint.architecture.layer_prefix(position) + writer
        module = layer.get_submodule(writer)
        fit, held = self._sums(position, layer, module)
        best = self._best(fit, held, module, name)
        before, after, accepted = self._accept(position, layer, module, name, best, held)
        evidence = {
            "covers": list(self.plan.covered(position)),
            "held_out_before": held.error / held.target,
            "held_out_after": best.held_after / held.target if best else None,
            "form": best.form if best else None,
            "alpha": best.alpha if best else None,
            "tried": best.tried if best else {},
            "fit_tokens": fit.tokens,
            "held_out_tokens": held.tokens,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
        }
        if accepted and best is not None:
            fitted.update(_named(best, name))
        sources = list(self.plan.layers[position].sources)
        value = best.held_after / held.error if best else None
        action = "recover" if accepted else "reject"
        unit = "held-out error after / before"
        reason = _reason(action, evidence, self.options.accept)
        return Decision("recover", self.options.method, step, name, action, sources, value, unit, reason, evidence)

    def _accept(
        self, position: int, layer: nn.Module, module: nn.Module, name: str, best: Fit | None, held: Sums
    ) -> tuple[float | None, float | None, bool]:
        """Install the candidate in `layer` if it passes; return the held-out loss before and after, and the verdict."""
        if best is None or best.held_after >= held.error:
            return self.loss, self.loss, False
        if self.options.accept == "error":
            _install(module, _named(best, name))
            return None, None, True
        before = self._held_out_loss(position, layer) if self.loss is None else self.loss
        old = _install(module, _named(best, name))
        after = self._held_out_loss(position, layer)
        if after >= before:
            _install(module, old)
        self.loss = min(before, after)
        return before, after, after < before

    def _held_out_loss(self, position: int, layer: nn.Module) -> float:
        """Mean next-token loss (nats) of the student on the held-out rows, from the entry of layer `position` on."""
        held = [h for b in self.s_batches if (h := b.rows_from(self.rows - self.held)) is not None]
        with torch.inference_mode():
            for batch in held:
                batch.hidden = self.student.apply(layer, position, batch)
            for index in range(position + 1, self.student.num_layers):
                with self.student.layer(index) as later:
                    for batch in held:
                        batch.hidden = self.student.apply(later, index, batch)
            sums = [loss_sum(self.student, batch, batch.hidden) for batch in held]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    def _sums(self, position: int, layer: nn.Module, module: nn.Module) -> tuple[Sums, Sums]:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        channels = weight.shape[1] + (module.bias is not None)
        fit, held = (Sums.empty(channels, weight.shape[0], weight.device) for _ in range(2))
        seen: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.inference_mode():
            for ours, theirs in zip(self.s_batches, self.t_batches, strict=True):
                exit_state = self.student.apply(layer, position, ours).float()
                weights = token_weights(ours, self.options.sink_positions, self.options.sink_weight)
                first_held = self.rows - self.held
                add_batch((fit, held), ours, first_held, seen.pop(), exit_state, theirs.hidden, weights, module)
        hook.remove()
        return fit, held

    def _best(self, fit: Sums, held: Sums, module: Any, name: str) -> Fit | None:
        forms = ("fold", "refit") if self.options.form == "auto" else (self.options.form,)
        student = self.student.checkpoint
        bias = module.bias
        dtypes = (
            student.tensor(f"{name}.weight").dtype,
            student.tensor(f"{name}.bias").dtype if bias is not None else None,
        )
        return best_fit(fit, held, module.weight, bias, dtypes, forms, self.options.alphas)

    def _state(self, fitted: dict[str, Tensor], decisions: list[Decision]) -> dict[str, Tensor]:
        return {
            "teacher": torch.cat([b.hidden.cpu() for b in self.t_batches]),
            "student": torch.cat([b.hidden.cpu() for b in self.s_batches]),
            "loss": torch.tensor([float("nan") if self.loss is None else self.loss], dtype=torch.float64),
            "decisions": as_note([asdict(d) for d in decisions]),
            **{f"fitted.{k}": v for k, v in fitted.items()},
        }

    def _restore(self, resume: ResumePoint | None) -> tuple[int, dict[str, Tensor], list[Decision]]:
        saved = resume.load() if resume else None
        if saved is None:
            return 0, {}, []
        step, tensors = saved
        for name, batches in (("teacher", self.t_batches), ("student", self.s_batches)):
            for batch in batches:
                batch.hidden = tensors[name][batch.rows.start : batch.rows.stop].to(batch.hidden)
        loss = float(tensors["loss"])
        self.loss = None if loss != loss else loss
        rows = from_note(tensors["decisions"])
        fitted = {k.removeprefix("fitted."): t for k, t in tensors.items() if k.startswith("fitted.")}
        return step, fitted, [Decision.from_saved(row) for row in rows]


def _reason(action: str, evidence: dict[str, Any], accept: str) -> str:
    """Why a refit was accepted or rejected, by the numbers of its row."""
    if evidence["form"] is None:
        skipped = "; ".join(f"{form} {why}" for form, why in evidence["tried"].items())
        return f"rejected: no refit was possible ({skipped or 'no system of equations could be solved'})"
    before, after = apart(evidence["held_out_before"], evidence["held_out_after"])
    fit = f"{evidence['form']} with α {number(evidence['alpha'])}"
    if evidence["held_out_after"] >= evidence["held_out_before"]:
        return (
            f"rejected: even the best refit, {fit}, does not lower the held-out error ({before} before, {after} after)"
        )
    fell = f"the held-out error fell from {before} to {after} by {fit}"
    if accept == "error":
        return f"recovered: {fell}"
    loss, new = apart(evidence["held_out_loss_before"], evidence["held_out_loss_after"])
    if action == "recover":
        return f"recovered: {fell}, and the held-out loss from {loss} to {new} nats"
    return f"rejected: {fell}, but the held-out loss did not fall from {loss} nats, it became {new}"


def _install(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a projection other parameters (never in place: the old ones may be views of the file); return the old."""
    old = {}
    for name, tensor in tensors.items():
        part = name.rsplit(".", 1)[1]
        now = getattr(module, part)
        old[name] = now.data
        setattr(module, part, torch.nn.Parameter(tensor.to(now.device, now.dtype), requires_grad=False))
    return old


def _named(fit: Fit, name: str) -> dict[str, Tensor]:
    parts = {f"{name}.weight": fit.weight} | ({f"{name}.bias": fit.bias} if fit.bias is not None else {})
    return {key: tensor.contiguous().cpu() for key, tensor in parts.items()}
