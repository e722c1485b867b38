"""Closed-form recovery after a depth plan: ridge least squares folded into an existing projection.

Family: ReplaceMe (arXiv 2505.02819) fits a d×d map and folds it into the MLP output projection before a cut. Ghosted
Layers (2605.15491) keeps such a map as an extra matrix. Here nothing is added to the model. At every gap the residual
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
sequences (from this layer on; what lies below is not run again). Otherwise it is rejected and recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import Architecture, ModelShape
from compression_dags.architectures.uniformity import refuse_shared
from compression_dags.errors import InputError
from compression_dags.options import TOKENS_PER_UNKNOWN, Ridge
from compression_dags.recovery.stage import RecoverStage

if TYPE_CHECKING:
    pass


class LeastSquares(RecoverStage):
    """Refit the output projection before every gap in closed form, so that it also does the removed layers' work.

    Accepted only where it lowers the error on held-out calibration sequences. Adds no tensor and no parameter.
    """

    version: ClassVar[str] = "1"
    implementation: ClassVar[str] = "compression_dags.recovery.least_squares_run:recover"
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
        refuse_shared(shape, "recover: least-squares", "leave the stage out for this model")
        if self.projections != "mlp" and (lacking := _without_attention_output(shape.architecture)):
            raise InputError(
                f"recover: least-squares with projections {self.projections} needs an attention output that is added "
                f"to the residual stream in every layer; {shape.architecture.model_type} has layers without one "
                f"({lacking}); take projections: mlp"
            )

    def check_tokens(self, shape: ModelShape, sequences: int, length: int) -> None:
        """Refuse a fit with fewer than 10 tokens an unknown (per output column).

        Raises:
            InputError: with the count, the need and the remedy.
        """
        fit_rows = sequences - self.held_out(sequences)
        tokens = fit_rows * max(0, length - self.sink_positions)
        need = TOKENS_PER_UNKNOWN * (_inputs_of_writer(shape) if self.form == "refit" else shape.hidden)
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


def _inputs_of_writer(shape: ModelShape) -> int:
    architecture, last = shape.architecture, shape.architecture.residual_writer
    if not architecture.kinds or last is None:
        return shape.intermediate
    return max(kind.columns(last) for kind in architecture.kinds)


def _without_attention_output(architecture: Architecture) -> str:
    """The first kind of layer whose attention's output is not added to the stream as it is; empty if there is none."""
    for kind in architecture.kinds:
        outputs = kind.members("attention_output")
        everywhere = bool(outputs) and outputs == architecture.group("attention_output")
        if not everywhere or not kind.plain_writers.issuperset(outputs):
            return kind.attention
    return ""
