"""The best values for the weights that a mask keeps.

With the mask fixed, every row of Ŵ is a least squares problem of its own, on its own support S:

    min over ŵ_S of  (ŵ − w)(H + λI)(ŵ − w)ᵀ      ⇒      (H + λI)_SS δ_S = ((w − ŵ₀)(H + λI))_S,   ŵ = ŵ₀ + δ

H = Σ x xᵀ, λ = damping · mean diag H: the ridge pulls towards the original weights, not towards 0. Two solvers:

* Cholesky of (H + λI)_SS, many rows in one batched call, float64: Σ k³/3 flops for k kept weights a row.
* Conjugate gradients with Jacobi's preconditioner on all rows together: one (rows, d) × (d, d) product an iteration.

`cross` asks for the dense model's output although the inputs are those of the pruned one (as GPTAQ does for
quantization): min ‖Ŵ X̂ − W X‖² + λ ‖Ŵ − W‖² is the problem above with H = Σ x̂ x̂ᵀ and `propagated_target` for w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression_dags.errors import InputError, IntegrityError
from compression_dags.solvers.factor import inverse_factor

#: λ over mean diag H; the same as SparseGPT's.
DAMPING = 0.01
#: A row is done when its last `WINDOW` iterations lowered its error by less than this share of the error left.
TOLERANCE = 1e-4
WINDOW = 4
ITERATIONS = 200
#: Kept weights a row up to which `auto` takes Cholesky. CG is faster beyond: 30 times on 2 cores at 128 of 256.
FEW = 32
#: Rows of one float64 product, and numbers of one batch of Gram blocks: both bound the memory.
ROWS, BATCH = 4096, 1 << 25


@dataclass(frozen=True)
class Refitted:
    """Attributes:
    weight: (rows, d), zeros exact where the mask is False, in the dtype of the weights given.
    method: the solver used: `cholesky`, `cg`, or `cholesky+cg` where some blocks were singular.
    iterations: of CG; 0 if it did not run.
    unfinished: rows stopped by the cap on iterations; their error is lower than the start's all the same.
    kept_start: rows for which nothing better than the start was found.
    """

    weight: Tensor
    method: str
    iterations: int
    unfinished: int
    kept_start: int

    @property
    def evidence(self) -> dict[str, str | int]:
        names = ("method", "iterations", "unfinished", "kept_start")
        return {f"refit_{name}": getattr(self, name) for name in names}


def reconstruction_error(original: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """(rows,) float64: ‖(ŵ − w)X‖² of every row, summed over tokens. Differences and products are float64."""
    matrix = hessian.double()
    errors = []
    for old, new in zip(original.split(ROWS), pruned.split(ROWS), strict=True):
        change = new.double() - old.double()
        errors.append(((change @ matrix) * change).sum(1).clamp_min(0))
    return torch.cat(errors)


def refit(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor,
    *,
    cross: Tensor | None = None,
    start: Tensor | None = None,
    damping: float = DAMPING,
    method: str = "auto",
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> Refitted:
    """Refit the kept weights of a (stack of) matrices that share an input.

    Args:
        weight: (rows, d) float32 or float64: the original weights, whose output is the target.
        hessian: (d, d): Σ x xᵀ of the input that the pruned weights will see.
        mask: (rows, d) bool, True = kept.
        cross: (d, d): Σ x_dense x̂ᵀ, where x̂ is the input that `hessian` is of. The target is then W x_dense.
        start: (rows, d): values to start from and never to fall behind; `weight` masked if None. A sweep's result
            saves iterations.
        damping: λ over mean diag H.
        method: `auto`, `cholesky` (exact; for rows with few kept weights) or `cg`.
        tolerance, iterations: of `cg`; see `TOLERANCE`.

    A row whose solution is not better than its start, under the damped error, keeps the start. Inputs that were 0 for
    every token leave their weights as in the start.

    Raises:
        InputError: shapes that do not fit, an unknown method.
        IntegrityError: the Hessian or the cross sums are not finite.
    """
    if method not in {"auto", "cholesky", "cg"}:
        raise InputError(f"refit: method {method!r} is unknown; allowed: auto, cholesky, cg")
    check_shapes("refit", weight, hessian, mask)
    matrix = damped(hessian, damping, "refit").to(weight.dtype)
    first = (weight if start is None else start).to(weight.dtype) * mask
    target = weight if cross is None else propagated_target(weight, hessian, cross, damping)
    gap = torch.where(hessian.diagonal() == 0, 0, target - first)
    pull = gap @ matrix
    residual, left = pull * mask, (gap * pull).sum(1)
    counts = mask.sum(1)
    if method == "auto":
        method = "cholesky" if not len(counts) or int(counts.max()) <= FEW else "cg"
    done, unfinished, delta = 0, 0, torch.zeros_like(first)
    if method == "cholesky":
        delta, singular = _by_cholesky(matrix, mask, residual, counts)
        if len(singular):
            method = "cholesky+cg"
            delta[singular], done, unfinished = conjugate_gradients(
                matrix, mask[singular], residual[singular], left[singular], tolerance, iterations
            )
    else:
        delta, done, unfinished = conjugate_gradients(matrix, mask, residual, left, tolerance, iterations)
    gain = (delta * (2 * residual - delta @ matrix)).sum(1)
    better = gain > 0  # False for nan too
    return Refitted(
        torch.where(better[:, None], first + delta, first), method, done, unfinished, int(len(better) - better.sum())
    )


def propagated_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, damping: float = DAMPING, drift: Tensor | None = None
) -> Tensor:
    """(rows, d): dense weights which, on the inputs x̂ of `hessian`, come nearest to `weight` on the dense inputs.

        W* = W + (W (C − H) + D)(H + λI)⁻¹       C = Σ x_dense x̂ᵀ,  H = Σ x̂ x̂ᵀ

    `drift` D = Σ e x̂ᵀ (rows, d) asks for W x_dense + e.

    Every method that prunes W* for H minimises ‖Ŵ X̂ − W X‖². Solved in float64; the damping grows where the
    factorisation needs it, as `inverse_factor` does it.
    """
    upper = inverse_factor(hessian.double(), damping).upper
    shift = propagation(weight.double(), hessian.double(), cross.double(), drift)
    return (weight.double() + (shift @ upper.T) @ upper).to(weight.dtype)


def propagation(weight: Tensor, hessian: Tensor, cross: Tensor, drift: Tensor | None = None) -> Tensor:
    """(rows, d) W (C − H) + D of `propagated_target`, in the dtype of the weight.

    Raises:
        InputError: shapes that do not fit.
        IntegrityError: the cross sums are not finite.
    """
    if cross.shape != hessian.shape:
        raise InputError(f"cross sums of shape {tuple(cross.shape)} do not fit a Hessian of {tuple(hessian.shape)}")
    if not bool(torch.isfinite(cross).all()):
        raise IntegrityError("cross sums are not finite; the model's activations overflow here")
    shift = weight @ (cross - hessian)
    return shift if drift is None else shift + drift.to(shift.dtype)


def damped(hessian: Tensor, damping: float, name: str) -> Tensor:
    """(d, d) H + λI, a copy, with 1 more on the diagonal of inputs that were always 0.

    Raises:
        IntegrityError: H is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise IntegrityError(f"{name}: the Hessian is not finite; the model's activations overflow here")
    diagonal = hessian.diagonal()
    ridge = damping * float(diagonal.double().mean())
    matrix = hessian.clone()
    matrix.diagonal().add_(ridge).add_((diagonal == 0).to(matrix.dtype))
    return matrix


def check_shapes(name: str, weight: Tensor, hessian: Tensor, mask: Tensor | None = None) -> None:
    """
    Raises:
        InputError: weight (rows, d) float32 or float64, hessian (d, d) and mask (rows, d) bool do not fit each other.
        IntegrityError: a weight is not finite.
    """
    if weight.dim() != 2 or hessian.shape != (weight.shape[-1], weight.shape[-1]):
        raise InputError(f"{name}: weights {tuple(weight.shape)} do not fit a Hessian {tuple(hessian.shape)}")
    if weight.dtype not in {torch.float32, torch.float64}:
        raise InputError(f"{name}: weights must be float32 or float64, not {weight.dtype}")
    if not bool(torch.isfinite(weight).all()):
        raise IntegrityError(f"{name}: the weights are not finite")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise InputError(f"{name}: a mask must be bool {tuple(weight.shape)}, not {mask.dtype} {tuple(mask.shape)}")


def _by_cholesky(matrix: Tensor, mask: Tensor, residual: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """δ (rows, d), 0 off the support, and the indices of rows whose block was not positive definite.

    Rows are taken in order of their counts, so that those of one batch are padded little.
    """
    exact = matrix.double()
    delta, singular = torch.zeros_like(residual), []
    order = counts.argsort(stable=True)
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, BATCH // max(1, int(counts[order[start]]) ** 2))]
        most = int(counts[rows[-1]])
        while len(rows) > 1 and len(rows) * most**2 > 2 * BATCH:  # the counts grow within the batch
            rows = rows[: len(rows) // 2]
            most = int(counts[rows[-1]])
        start += len(rows)
        if most:
            solved, failed = _solve_blocks(exact, mask[rows], residual[rows], most)
            delta[rows] = solved.to(delta.dtype)
            singular.append(rows[failed])
    return delta, torch.cat(singular) if singular else order[:0]


def _solve_blocks(matrix: Tensor, mask: Tensor, residual: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(b, d) solutions of rows with at most `most` kept weights, and (b,) bool where there was none (then 0)."""
    index = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]  # kept ones first, in order
    real = mask.gather(1, index)
    blocks = matrix[index[:, :, None], index[:, None, :]]
    blocks *= real[:, :, None] & real[:, None, :]
    blocks.diagonal(dim1=1, dim2=2).add_((~real).to(blocks.dtype))  # padding: 1 · δ = 0
    lower, info = torch.linalg.cholesky_ex(blocks)
    failed = info != 0
    right = (residual.gather(1, index) * real).to(matrix.dtype)
    solved = torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
    solved = torch.where(failed[:, None] | ~real, 0, solved)
    return torch.zeros_like(residual, dtype=matrix.dtype).scatter_(1, index, solved), failed


def conjugate_gradients(
    matrix: Tensor, mask: Tensor, residual: Tensor, left: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, int, int]:
    """δ that solves M_SS δ_S = r_S for all rows together, from δ = 0.

    Iteration i lowers a row's error by α_i ρ_i, exactly known. The Σ of these over the last few is what the error was
    still above its minimum some iterations ago (Hestenes & Stiefel): that is the stopping rule. Rows that are done
    leave the product when they are a fifth of it.

    Args:
        matrix: (d, d) symmetric, positive definite on every support.
        residual: (rows, d), 0 off the support.
        left: (rows,) the error at δ = 0.
        tolerance: see `TOLERANCE`.

    Returns:
        δ (rows, d); iterations done; rows that the cap on iterations stopped.
    """
    scale = 1 / matrix.diagonal()
    found = torch.zeros_like(residual)
    floor = torch.finfo(matrix.dtype).eps * left.abs()  # an error of 0 is only reached up to rounding
    rows = torch.arange(len(residual), device=residual.device)
    delta, r, error, m = torch.zeros_like(residual), residual.clone(), left.clone(), mask
    p = r * scale
    rho = (r * p).sum(1)
    gains = torch.zeros(WINDOW, len(residual), dtype=matrix.dtype, device=residual.device)
    for step in range(1, iterations + 1):
        if not len(rows):
            return found, step - 1, 0
        product = (p @ matrix) * m
        curvature = (p * product).sum(1)
        alpha = torch.where(curvature > 0, rho / curvature, 0)
        delta.addcmul_(alpha[:, None], p)
        r.addcmul_(alpha[:, None], product, value=-1)
        z = r * scale
        new = (r * z).sum(1)
        p = p.mul_(torch.where(rho > 0, new / rho, 0)[:, None]).add_(z)
        gain = alpha * rho
        gains[step % WINDOW] = gain
        error -= gain
        rho = new
        if step % WINDOW == 0:
            going = gains.sum(0) > tolerance * error.clamp_min(0) + floor
            keep = going.nonzero()[:, 0]
            if 5 * len(keep) <= 4 * len(rows):
                found[rows] = delta
                rows, delta, r, p, m = rows[keep], delta[keep], r[keep], p[keep], m[keep]
                rho, error, floor, gains = rho[keep], error[keep], floor[keep], gains[:, keep]
    found[rows] = delta
    going = gains.sum(0) > tolerance * error.clamp_min(0) + floor
    return found, iterations, int(going.sum())
