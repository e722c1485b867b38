"""The patches of `linear-patch`, gap by gap, on the student's own states (`linear_patch.py` says what is folded)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression_dags.architectures import Architecture
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import Batch, DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.plan import MergePlan
from compression_dags.errors import InputError
from compression_dags.passes.scored_rows import chosen_rows
from compression_dags.passes.variant_scoring import Edit, Piece, VariantScorer, as_is, placed
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.resume import ResumePoint
from compression_dags.provenance.wording import apart, number
from compression_dags.recovery.linear_patch import LinearPatch
from compression_dags.recovery.results import Recovery, write_recovered
from compression_dags.stage import Progress, silent


def recover(
    options: LinearPatch,
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
    """Patch every gap of `plan` in turn, on the student's own (already patched) states; write the checkpoint."""
    rows = len(blocks.lengths)
    options.check_tokens(teacher.shape, rows, int(blocks.lengths.max()))
    run = _Run(options, student, plan, blocks, device, dtype)
    decisions = run.all_gaps(run.exit_norms(teacher, progress), progress) if plan.gaps() else []
    prefix = student.architecture.layer_prefix
    fitted = {prefix(p) + local: t for p, piece in enumerate(run.pieces) for local, t in piece.tensors.items()}
    return Recovery(write_recovered(student, fitted, directory), fitted, decisions, {"factor": run.factor})


class _Run:
    """One gap after another. `pieces` are the student's layers as patched so far, `factor` the product of their α."""

    def __init__(
        self, options: LinearPatch, student: Checkpoint, plan: MergePlan, blocks: TokenBlocks, device: str, dtype: str
    ):
        rows = len(blocks.lengths)
        fitting = rows - options.held_out(rows)
        self.options, self.student, self.plan = options, student, plan
        self.on: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fit, self.held = chosen_rows(blocks, range(fitting)), chosen_rows(blocks, range(fitting, rows))
        self.pieces: list[Piece] = as_is(student.num_layers)
        self.factor = 1.0
        self.loss: float | None = None  # held-out loss of the student as it stands

    def exit_norms(self, teacher: Checkpoint, progress: Progress) -> dict[int, float]:
        """Position of a gap → mean norm of the teacher's states behind it."""
        wanted = {self.plan.covered(position).stop: position for position in self.plan.gaps()}
        stream = DecoderStream(teacher, **self.on)
        batches = stream.batches(self.fit)
        norms = {}
        with torch.inference_mode():
            for index in progress(range(max(wanted)), "linear patch: base model (layers)"):
                with stream.layer(index) as layer:
                    for batch in batches:
                        batch.hidden = stream.apply(layer, index, batch)
                if index + 1 in wanted:
                    norms[wanted[index + 1]] = mean_norm(batches, self.options.sink_positions)
        stream.close()
        return norms

    def all_gaps(self, exits: dict[int, float], progress: Progress) -> list[Decision]:
        stream = DecoderStream(self.student, **self.on)
        gate, batches = VariantScorer(stream, self.held), stream.batches(self.fit)
        decisions = []
        for position in progress(range(max(exits) + 1), "linear patch: student (layers)"):
            with torch.inference_mode(), placed(stream, self.pieces[position]) as layer:
                for batch in batches:
                    batch.hidden = stream.apply(layer, position, batch)
            if position in exits:
                own = mean_norm(batches, self.options.sink_positions)
                decisions.append(self._gap(position, exits[position], own, gate, len(decisions)))
        stream.close()
        return decisions

    def _gap(self, position: int, theirs: float, own: float, gate: VariantScorer, step: int) -> Decision:
        """Patch the cut behind layer `position` if that lowers the held-out loss, and say so.

        Args:
            theirs, own: mean norms of the teacher's states behind the gap, and of the student's at the cut as its
                folded weights give them: they lack the factor so far.
        """
        before = gate.loss(self.pieces) if self.loss is None else self.loss
        own *= self.factor
        alpha = theirs / max(own, 1e-30)
        scaled, why_not = self._behind(position, alpha)
        after = gate.losses(self.pieces, [Edit(position + 1, len(self.pieces), tuple(scaled))])[0] if scaled else None
        accepted = after is not None and after < before
        self.loss = after if accepted else before
        if accepted:
            self.pieces[position + 1 :] = scaled
            self.factor *= alpha
        evidence = {
            "covers": list(self.plan.covered(position)),
            "norm_behind_the_gap": theirs,
            "norm_at_the_cut": own,
            "layers_rescaled": len(scaled),
            "factor": self.factor,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            **({"why_not": why_not} if why_not else {}),
        }
        return Decision(
            "recover",
            self.options.method,
            step,
            self.student.architecture.layer_prefix(position).rstrip("."),
            "recover" if accepted else "reject",
            list(self.plan.layers[position].sources),
            alpha,
            "scale α of the residual stream behind the layer",
            _reason(alpha, before, after, why_not),
            evidence,
        )

    def _behind(self, position: int, alpha: float) -> tuple[list[Piece], str]:
        """The layers behind a cut, writing 1/(factor · α) of what they did; or none, and why."""
        if position + 1 == len(self.pieces):
            return [], "no layer is left behind the cut, and the final norm undoes any scale"
        factor = self.factor * alpha
        if not 0 < factor < math.inf:
            return [], f"the scale is {alpha:g}"
        found = [Piece(q, divided(self.student, q, factor)) for q in range(position + 1, len(self.pieces))]
        if not all(bool(torch.isfinite(t).all()) for piece in found for t in piece.tensors.values()):
            return [], "a rescaled weight is not finite in its stored dtype"
        return found, ""


def _reason(alpha: float, before: float, after: float | None, why_not: str) -> str:
    """Why a patch was accepted or rejected: α, and the held-out losses before and after."""
    scale = f"scaling the stream behind the layer by {number(alpha)}"
    if after is None:
        return f"rejected: {scale} is not possible, as {why_not}"
    old, new = apart(before, after)
    if after < before:
        return f"recovered: {scale} lowered the held-out loss from {old} to {new} nats"
    return f"rejected: {scale} did not lower the held-out loss, which was {old} nats before and {new} after"


def divided(student: Checkpoint, layer: int, factor: float) -> dict[str, Tensor]:
    """What writes into the residual stream at `layer`, over `factor`: local name → value in the stored dtype."""
    found = {}
    names = student.layer(layer)
    for local, offset in writers(student.architecture):
        if local in names:
            old = student.tensor(names[local])
            found[local] = ((old.double() + offset) / factor - offset).to(old.dtype).contiguous()
    return found


def writers(architecture: Architecture) -> list[tuple[str, float]]:
    """Local names of a layer's tensors that its writes into the residual stream are proportional to.

    Each with what is added to it before it multiplies (1 for the gains of Gemma's norms). A model without biases lacks
    some of the names.
    """
    if architecture.branch_norms:
        return [(f"{norm}.weight", architecture.norm_offset) for norm in architecture.branch_norms]
    last = architecture.residual_writer
    assert last is not None  # `check` refused experts
    return [
        (f"{p}.{part}", 0.0) for p in (*architecture.group("attention_output"), last) for part in ("weight", "bias")
    ]


def mean_norm(batches: list[Batch], sink_positions: int) -> float:
    """Mean of ‖h‖₂ over the real tokens of all batches but the first positions of each sequence.

    Raises:
        InputError: no such token.
    """
    total, count = 0.0, 0
    for batch in batches:
        mask = batch.mask.clone()
        mask[:, :sink_positions] = False
        norms = batch.hidden.float().norm(dim=-1).double()
        total += float(norms.masked_fill(~mask.to(norms.device), 0).sum())
        count += int(mask.sum())
    if not count:
        raise InputError(
            f"linear-patch: no calibration token lies behind the first {sink_positions} positions of its sequence; "
            "raise calibration.length or lower sink_positions"
        )
    return total / count
