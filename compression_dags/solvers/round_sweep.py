"""GPTQ's column sweep (Frantar et al., ICLR 2023), on the factor that SparseGPT's uses.

Weights are rounded column by column; the columns to come make up for the error e_j = (w_j − ŵ_j) / U_jj of each:

    w_k ← w_k − e_j U_jk   for k > j          H⁻¹ = UᵀU

Within a block the update is exact, later blocks get it as one product. Scales of a group are found when the sweep
reaches the group, from its weights as they are then (`static` ones before anything is rounded: needed when columns are
taken in another order, and for scales that depend on the whole matrix).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression_dags.errors import InputError
from compression_dags.kernels.round import walk_block as triton_walk
from compression_dags.kernels.sweep import AVAILABLE
from compression_dags.solvers.factor import Factor
from compression_dags.solvers.grids import Grid
from compression_dags.solvers.rounding import Rounded, Scales, find_scales, snap

BLOCK = 128


@dataclass(frozen=True)
class RoundSwept:
    """Attributes:
    parts: every matrix of the stack on its grid.
    error: (rows,) Σ_j e_j²: the row's output error, in the units of the damped H.
    """

    parts: list[Rounded]
    error: Tensor


def round_sweep(
    weight: Tensor,
    factor: Factor,
    grid: Grid,
    spans: Sequence[tuple[int, int]],
    *,
    stored: torch.dtype,
    order: Tensor | None = None,
    kept: Tensor | None = None,
    name: str = "weight",
    backend: str = "auto",
) -> RoundSwept:
    """A stack of matrices that share an input, rounded.

    Args:
        weight: (rows, d) float32 or float64; not changed.
        factor: of the Hessian with its channels in `order`.
        spans: rows [start, stop) of each matrix; they cover the stack.
        stored: dtype in which scales are stored.
        order: (d,) in which columns are rounded, the first first; None: as they are. Scales are then static.
        kept: (rows, d) bool: weights that are not become the code of 0.
        backend: `torch`, `triton`, or `auto` (Triton for integer grids on a GPU where it is installed). Codes differ
            only where rounding of float32 decides.

    Raises:
        InputError: a group size that does not divide d, spans that do not cover the rows.
        IntegrityError: weights or scales that are not finite.
    """
    rows, d = weight.shape
    size = grid.group_size or d
    if d % size:
        raise InputError(f"{name}: group size {size} does not divide {d} inputs")
    if [a for a, _ in spans] != [0, *(b for _, b in spans)][:-1] or spans[-1][1] != rows:
        raise InputError(f"{name}: spans {list(spans)} do not cover {rows} rows in order")
    whole = grid.group_size is None or grid.kind == "fp4" or order is not None
    table = _Table.static(weight, grid, spans, stored, name) if whole else _Table.empty(rows, d // size, grid, stored)
    columns = torch.arange(d, device=weight.device) if order is None else order
    groups = columns // size
    w = weight[:, columns].clone()
    keep = None if kept is None else kept[:, columns]
    codes = torch.empty(rows, d, dtype=torch.float32, device=w.device)
    error = torch.zeros(rows, dtype=w.dtype, device=w.device)
    walk = _walker(w, grid, backend)
    # a block never ends inside a group whose scales are found on the way
    block = BLOCK if whole or BLOCK % size == 0 else max(size, BLOCK // size * size)
    for start in range(0, d, block):
        stop = min(start + block, d)
        if not whole:
            table.find(w[:, start:stop], start // size, stored, name)
        own = slice(start, stop)
        upper = factor.upper[own, own].contiguous()
        step, zero = table.of(groups[own])
        held = None if keep is None else keep[:, own]
        codes[:, own], errors = walk(w[:, own], upper, step, zero, grid, held, factor.dead[own])
        error += errors.square().sum(1)
        if stop < d:
            w[:, stop:].addmm_(errors, factor.upper[own, stop:], alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    return RoundSwept([Rounded(codes[a:b], table.scales(a, b)) for a, b in spans], error)


def _walker(weight: Tensor, grid: Grid, backend: str):
    if backend not in {"auto", "torch", "triton"}:
        raise InputError(f"sweep: backend {backend!r} is unknown; allowed: auto, torch, triton")

    fits = weight.dtype == torch.float32 and grid.kind == "int"
    if backend == "torch" or (backend == "auto" and not (AVAILABLE and weight.is_cuda and fits)):
        return walk_block
    if not fits:
        raise InputError(f"sweep: the Triton kernel rounds float32 to integers, not {weight.dtype} to {grid.kind}")

    return lambda w, upper, step, zero, grid, kept, dead: triton_walk(w, upper, step, zero, grid.range, kept, dead)


@dataclass
class _Table:
    """Scales of a stack: (rows, groups) each, in their stored dtypes; `whole` is a row's global scale (fp4)."""

    grid: Grid
    scale: Tensor
    zero: Tensor | None
    whole: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, groups: int, grid: Grid, stored: torch.dtype) -> _Table:
        zero = None if grid.symmetric else torch.zeros(rows, groups, dtype=torch.int8)
        return cls(grid, torch.zeros(rows, groups, dtype=stored), zero)

    @classmethod
    def static(
        cls, weight: Tensor, grid: Grid, spans: Sequence[tuple[int, int]], stored: torch.dtype, name: str
    ) -> _Table:
        found = [find_scales(weight[a:b], grid, name, stored) for a, b in spans]
        zero = None if grid.symmetric else torch.cat([s.zero_point for s in found if s.zero_point is not None])
        whole = [
            s.global_scale.expand(b - a) for s, (a, b) in zip(found, spans, strict=True) if s.global_scale is not None
        ]
        return cls(grid, torch.cat([s.scale for s in found]), zero, torch.cat(whole) if whole else None)

    def find(self, weight: Tensor, first: int, stored: torch.dtype, name: str) -> None:
        """Scales of the groups that begin with number `first`, from these columns."""
        found = find_scales(weight, self.grid, name, stored)
        self.scale = self.scale.to(weight.device)
        self.scale[:, first : first + found.scale.shape[1]] = found.scale
        if self.zero is not None and found.zero_point is not None:
            self.zero = self.zero.to(weight.device)
            self.zero[:, first : first + found.scale.shape[1]] = found.zero_point

    def of(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """(rows, columns) float32 step and zero point of every column, by its group."""
        step = self.scale.float()[:, groups]
        if self.whole is not None:
            step = step / self.whole[:, None]
        return step, None if self.zero is None else self.zero.float()[:, groups]

    def scales(self, start: int, stop: int) -> Scales:
        rows = slice(start, stop)
        zero = None if self.zero is None else self.zero[rows]
        return Scales(self.grid, self.scale[rows], zero, None if self.whole is None else self.whole[start : start + 1])


def walk_block(
    w: Tensor,
    upper: Tensor,
    step: Tensor,
    zero: Tensor | None,
    grid: Grid,
    kept: Tensor | None,
    dead: Tensor,
) -> tuple[Tensor, Tensor]:
    """One block of columns, rounded.

    Args:
        w: (rows, width), not changed; step, zero, kept: likewise.
        upper: (width, width) U of the block.
        dead: (width,) inputs that are always 0: rounded like others, but their error does not matter to any output.

    Returns:
        codes (rows, width) float32 and errors e (rows, width).
    """
    columns = w.T.contiguous()  # a column is then a row: contiguous for every step
    steps = step.T.contiguous()
    zeros = None if zero is None else zero.T.contiguous()
    codes, errors = torch.empty_like(columns, dtype=torch.float32), torch.empty_like(columns)
    diagonal, low_high = upper.diagonal(), grid.range
    for j in range(len(columns)):
        now, offset = columns[j], 0.0 if zeros is None else zeros[j]
        q = snap((now.float() / steps[j] + offset).clamp(*low_high), grid.kind)
        if kept is not None:
            q = torch.where(kept[:, j], q, offset * torch.ones_like(q))
        codes[j] = q
        errors[j] = torch.where(dead[j], 0, (now - (q - offset) * steps[j]) / diagonal[j])
        if j + 1 < len(columns):
            columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return codes.T, errors.T.contiguous()
