"""GPTQ's sweep over the columns of matrices that read one input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression_dags.passes.input_sums import InputSums
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.gptq import GPTQ
from compression_dags.quantization.rounding_pass import RoundedGroup, as_bytes
from compression_dags.quantization.smoothing import Fold
from compression_dags.solvers.factor import Factor, inverse_factor
from compression_dags.solvers.hessian import energy
from compression_dags.solvers.refit import propagated_target, propagation
from compression_dags.solvers.round_sweep import round_sweep
from compression_dags.solvers.rounding import Rounded
from compression_dags.solvers.sweep import row_spans


def round_folded(
    options: GPTQ, weights: dict[str, Tensor], seen: InputSums, choice: Choice, label: str, fold: Fold | None
) -> RoundedGroup:
    """The matrices as the sweep rounds them; their input is not scaled, so `fold` is not used."""
    return sweep_group(options, weights, seen, choice, label)


def sweep_group(
    stage: GPTQ,
    weights: dict[str, Tensor],
    seen: InputSums,
    choice: Choice,
    label: str,
    columns: Tensor | None = None,
) -> RoundedGroup:
    """GPTQ of matrices (out_i, in) that read one input. With `columns` s (in,) of W diag(s), whose input is x / s."""
    assert seen.hessian is not None
    seen.hessian.require_finite(label)
    hessian = seen.hessian.matrix
    stack = torch.cat([w.float() for w in weights.values()])
    spans = row_spans(weights.values())
    kept = stack != 0 if stage.keep_zeros else None
    moved = hessian if columns is None else hessian / torch.outer(columns, columns)
    order = moved.diagonal().argsort(descending=True, stable=True) if stage.act_order else None
    factor = inverse_factor(moved if order is None else moved[order][:, order], stage.damping, label)
    target, aim = stack, "own"
    if seen.cross is not None:
        aim = "dense" if seen.drift is None else "residual"
        target = _propagated(stage, stack, seen, None if columns is not None else factor, order)
    if columns is not None:
        target = target * columns
    stored = next(iter(weights.values())).dtype
    swept = round_sweep(target, factor, choice.grid(), spans, stored=stored, order=order, kept=kept, name=label)
    found: dict[str, tuple[Rounded, dict[str, Any]]] = {}
    for (a, b), name, part in zip(spans, weights, swept.parts, strict=True):
        lost, whole = swept.error[a:b].double().sum(), energy(target[a:b], moved)
        error = float((lost / whole).sqrt()) if whole > 0 else 0.0
        rounded = Rounded(as_bytes(part.codes, choice.format.kind), part.scales)
        found[name] = (rounded, {"output_error": error, "target": aim, **factor.evidence})

    def again(name: str, rows: Tensor | None) -> Rounded:
        """Rows are rounded independently: one that is divided keeps its codes."""
        rounded = found[name][0]
        return rounded if rows is None else rounded.divided_rows(rows, name)

    own = choice.grid().scaling == "stored" and choice.grid().block_rows == 1
    return RoundedGroup(found, columns, again if own else None)


def _propagated(stage: GPTQ, stack: Tensor, seen: InputSums, factor: Factor | None, order: Tensor | None) -> Tensor:
    """What the stack (rows, d) is rounded for, by the sweep's own factor where it is of this input, unscaled.

    float32 is enough there: on SmolLM2 it moves a target by at most 2e-4 of what following the dense model does.
    """
    assert seen.hessian is not None and seen.cross is not None
    if factor is None:
        return propagated_target(stack, seen.hessian.matrix, seen.cross, stage.damping, seen.drift)
    shift, upper = propagation(stack, seen.hessian.matrix, seen.cross, seen.drift), factor.upper
    if order is None:
        return stack + (shift @ upper.T) @ upper
    target = stack.clone()
    target[:, order] += (shift[:, order] @ upper.T) @ upper
    return target
