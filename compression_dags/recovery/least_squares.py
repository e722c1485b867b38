"""Closed-form recovery after a depth plan: ridge least squares folded into an existing projection.

Family: ReplaceMe (arXiv 2505.02819) fits a d×d map and folds it into the MLP output projection before a cut; Ghosted
Layers (2605.15491) keeps such a map as an extra matrix. Here nothing is added to the model: at every gap the residual
writer W (`down_proj`, `fc2`) of the layer before it is refitted, so that the layer's output matches the teacher's
hidden state *after* the gap.

With student states z_t (input of W, I channels, plus 1 where W has a bias), the teacher's exit state h_t, the student's
exit state s_t and e_t = h_t − s_t:

    ΔW = argmin Σ_t w_t ‖z_t ΔW − e_t‖² + λ ‖ΔW‖²,   w_t = 1/‖h_t‖²,   λ = α · mean diag Σ w_t z_t z_tᵀ

so the solution shrinks to the old weights. `fold` restricts ΔW to W·D with D (d×d), ReplaceMe's form; `refit` leaves
all I×d entries free. Both, and their error on held-out sequences, follow from the same sums

    G = Σ w z zᵀ (I×I),   C = Σ w z eᵀ (I×d),   E = Σ w ‖e‖²   →   E(ΔW) = E − 2 tr ΔWᵀC + tr ΔWᵀGΔW,

one set over fitting rows and one over held-out rows; padding has weight 0. The first positions of a sequence carry
massive activations that later layers use as attention sinks: a map that never saw them ruins them, and the model with
them, so they weigh `sink_weight` times as much as another token. α and form are chosen by the held-out error of weights
rounded to the stored dtype. The winner is accepted only if it also lowers the student's next-token loss on the held-out
sequences (from this layer on; what lies below is not run again); otherwise it is rejected and recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.errors import InputError
from compression_dags.options import Ridge
from compression_dags.passes.scored_rows import loss_sum
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import as_note, from_note
from compression_dags.provenance.wording import apart, number
from compression_dags.recovery.stage import TOKENS_PER_UNKNOWN, RecoverStage, Recovery, write_recovered
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.calibration.streaming import Batch, DecoderStream
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.depth.plan import MergePlan
    from compression_dags.provenance.resume import ResumePoint
    from compression_dags.solvers.ridge import Fit, Sums


class LeastSquares(RecoverStage):
    """Refit the output projection before every gap in closed form, so that it also does the removed layers' work.

    Accepted only where it lowers the error on held-out calibration sequences. Adds no tensor and no parameter.
    """

    version: ClassVar[str] = "1"
    method: Literal["least-squares"] = "least-squares"
    form: Literal["auto", "fold", "refit"] = Field(
        "auto", description="fold: a d×d map; refit: all I×d weights; auto: the better one on held-out tokens"
    )
    alphas: tuple[Ridge, ...] = Field((1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1, description="ridge grid α")
    holdout: float = Field(0.125, gt=0, lt=1, description="share of the calibration sequences held out")
    sink_positions: int = Field(4, ge=0, description="first positions of a sequence, where attention sinks sit")
    sink_weight: float = Field(32.0, ge=0, description="weight of a sink position against another token's")
    accept: Literal["loss", "error"] = Field(
        "loss", description="loss: also lower the held-out next-token loss; error: the held-out hidden error alone"
    )
    projections: Literal["mlp", "attention+mlp"] = Field(
        "mlp", description="mlp: the MLP's output projection; attention+mlp: the attention's output projection first"
    )
    scope: Literal["gaps", "sweep"] = Field(
        "gaps", description="gaps: only layers before a gap; sweep: also every later layer, against drift"
    )

    def check(self, shape: ModelShape) -> None:
        if shape.architecture.residual_writer is None:
            raise InputError(
                f"recover: least-squares cannot fold into {shape.architecture.model_type}: a norm or a router stands "
                "between its last projection and the residual stream; leave the stage out for this model"
            )

    def check_tokens(self, shape: ModelShape, sequences: int, length: int) -> None:
        """Refuse a fit with fewer than 10 tokens an unknown (per output column).

        Raises:
            InputError: with the count, the need and the remedy.
        """
        fit_rows = sequences - self.held_out(sequences)
        tokens = fit_rows * max(0, length - self.sink_positions)
        need = TOKENS_PER_UNKNOWN * (shape.intermediate if self.form == "refit" else shape.hidden)
        if tokens < need or not fit_rows:
            raise InputError(
                f"recover: least-squares ({self.form}) has {tokens:,} fitting tokens and needs {need:,} "
                f"({TOKENS_PER_UNKNOWN} an unknown): raise calibration.sequences (now {sequences} × {length})"
            )

    def writers(self, shape: ModelShape) -> tuple[str, ...]:
        """Projections that are refitted at a layer, in order."""
        last = shape.architecture.residual_writer
        assert last is not None  # `check` refused such models
        return (*shape.architecture.group("attention_output"), last) if self.projections != "mlp" else (last,)

    def held_out(self, sequences: int) -> int:
        return max(1, round(self.holdout * sequences))

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
        """Fit every gap of `plan` in turn, on the student's own (already recovered) states; write the checkpoint."""
        self.check_tokens(teacher.shape, len(blocks.lengths), int(blocks.tokens // len(blocks.lengths)))
        run = _Run(self, teacher, student, plan, blocks, device, dtype)
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
        from compression_dags.calibration.streaming import DecoderStream

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
        import torch

        ours, theirs = self.student.checkpoint, self.teacher.checkpoint
        names = theirs.layer(self.plan.layers[position].slot)
        pairs = [(name, names[local]) for local, name in ours.layer(position).items()]
        return all(torch.equal(ours.tensor(a), theirs.tensor(b)) for a, b in pairs)

    def _advance_teacher(self, position: int) -> None:
        import torch

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
        import torch

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
        import torch

        from compression_dags.solvers.ridge import Sums

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
        from compression_dags.solvers.ridge import best_fit

        forms = ("fold", "refit") if self.options.form == "auto" else (self.options.form,)
        student = self.student.checkpoint
        bias = module.bias
        dtypes = (
            student.tensor(f"{name}.weight").dtype,
            student.tensor(f"{name}.bias").dtype if bias is not None else None,
        )
        return best_fit(fit, held, module.weight, bias, dtypes, forms, self.options.alphas)

    def _state(self, fitted: dict[str, Tensor], decisions: list[Decision]) -> dict[str, Tensor]:
        from dataclasses import asdict

        import torch

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
    import torch

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


def token_weights(batch: Batch, sink_positions: int, sink_weight: float) -> Tensor:
    """(b, T) float32: 0 at padding, `sink_weight` at the first positions of a sequence, else 1."""
    weight = batch.mask.float()
    weight[:, :sink_positions] *= sink_weight
    return weight


def add_batch(
    both: tuple[Sums, Sums],
    batch: Batch,
    first_held: int,
    z: Tensor,
    exit_state: Tensor,
    target: Tensor,
    weight: Tensor,
    module: Any,
) -> None:
    """Add a batch to the fitting and the held-out sums: rows from `first_held` on are held out, whatever the batch."""
    import torch

    target, weight = target.float(), weight.to(target.device)
    z = z.reshape(*weight.shape, -1).float()
    held = torch.tensor([r >= first_held for r in batch.rows], device=target.device)[:, None]
    for sums, chosen in zip(both, ((weight > 0) & ~held, (weight > 0) & held), strict=True):
        if bool(chosen.any()):
            h = target[chosen]
            sums.add(z[chosen], h - exit_state.float()[chosen], h, weight[chosen], module.bias is not None)
