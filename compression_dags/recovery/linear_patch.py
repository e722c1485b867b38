"""Magnitude compensation at every gap, folded into weights (LinearPatch, arXiv 2505.24680; Prune&Comp, 2507.18212).

Removed layers no longer add to the residual stream, so behind the cut it is smaller than the layers there know it.
LinearPatch multiplies it by P = Q diag(s) Qᵀ, with a Hadamard matrix Q and s_c = E|h_exit Q|_c / E|h_entry Q|_c: a
matrix product of its own, which no stock checkpoint can hold. What one can hold exactly is a scalar, h → αh:

    h' = αh + f(norm(αh)) = α (h + f(norm(h))/α)

A norm does not see the scale of its input, so the scaled stream is the old one with every later write f divided by α.
The weights and biases that write into the residual stream behind the cut are therefore divided by α. (Where a norm
stands between a branch and the stream, as in Gemma 3, its gain is.) The α of several cuts multiply. Only the norms'
ε, tiny beside a mean square, tells the two apart: here it counts α² times.

α = E‖h_exit‖ / E‖s‖ with the teacher's states behind the gap and the student's own states s at the cut, patched so far.
They are what the patch meets, and they exist for merged layers too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression_dags.architectures import ModelShape
from compression_dags.architectures.uniformity import refuse_unlike
from compression_dags.errors import InputError
from compression_dags.recovery.stage import RecoverStage

if TYPE_CHECKING:
    pass


class LinearPatch(RecoverStage):
    """Scale the residual stream behind every gap to the teacher's magnitude, by dividing the later layers' writes.

    The scalar part of LinearPatch (NeurIPS 2025), which inserts Q diag(s) Qᵀ as an extra matrix product. A scalar folds
    into existing weights exactly (Prune&Comp's observation), so the checkpoint stays stock. Training-free: one pass of
    the teacher and one of the student. The released code casts to float16, takes all positions and accepts always. Here
    the first positions are left out, and each gap's patch is kept only if the held-out next-token loss falls.
    """

    version: ClassVar[str] = "1"
    implementation: ClassVar[str] = "compression_dags.recovery.linear_patch_run:recover"
    method: Literal["linear-patch"] = "linear-patch"
    holdout: float = Field(0.125, gt=0, lt=1, description="share of the calibration sequences held out for the gate")
    sink_positions: int = Field(4, ge=0, description="first positions of a sequence, left out of α (attention sinks)")

    def check(self, shape: ModelShape) -> None:
        if shape.architecture.has_experts:
            raise InputError(
                f"recover: linear-patch does not fold into {shape.architecture.model_type}: its experts are not "
                "rescaled; leave the stage out for this model"
            )
        refuse_unlike(shape, "recover: linear-patch", "use least-squares, or leave the stage out for this model")

    def check_tokens(self, shape: ModelShape, sequences: int, length: int) -> None:
        """Refuse a set without fitting tokens or without a held-out sequence.

        Raises:
            InputError: with the counts and the remedy.
        """
        if sequences < 2:
            raise InputError(
                f"recover: linear-patch needs 2 calibration sequences, one to fit and one held out, not {sequences}: "
                "raise calibration.sequences"
            )
        if length <= self.sink_positions:
            raise InputError(
                f"recover: linear-patch leaves out the first {self.sink_positions} positions, but the calibration "
                f"sequences have {length} tokens: raise calibration.length or lower sink_positions"
            )

    def held_out(self, sequences: int) -> int:
        return min(sequences - 1, max(1, round(self.holdout * sequences)))
