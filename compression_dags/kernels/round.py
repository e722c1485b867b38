"""One block of GPTQ's column sweep as one Triton kernel: a program walks the block's columns for a tile of rows.

As in `sweep_triton.py`, a tile's weights stay in registers from the first column to the last. Integer grids only:
steps and zero points come expanded to columns, so that groups may lie in any order.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from compression_dags.kernels.sweep import AVAILABLE

TILE = 16

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def _walk(
        w_ptr,
        upper_ptr,
        step_ptr,
        zero_ptr,
        kept_ptr,
        dead_ptr,
        code_ptr,
        error_ptr,
        rows,
        w_stride,
        kept_stride,
        low,
        high,
        width: tl.constexpr,
        TILE: tl.constexpr,
        WIDTH: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        HAS_MASK: tl.constexpr,
    ):
        row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
        column = tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        w = tl.load(w_ptr + row[:, None] * w_stride + column[None, :], mask=inside, other=0.0)
        step = tl.load(step_ptr + place, mask=inside, other=1.0)
        zero = tl.zeros([TILE, WIDTH], dtype=tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + place, mask=inside, other=0.0)
        kept = tl.full([TILE, WIDTH], 1, dtype=tl.int32)
        if HAS_MASK:
            kept = tl.load(kept_ptr + row[:, None] * kept_stride + column[None, :], mask=inside, other=1).to(tl.int32)
        diagonal = tl.load(upper_ptr + column * width + column, mask=column < width, other=1.0)
        dead = tl.load(dead_ptr + column, mask=column < width, other=0).to(tl.int32)
        code = tl.zeros([TILE, WIDTH], dtype=tl.float32)
        error = tl.zeros([TILE, WIDTH], dtype=tl.float32)
        for j in range(0, width):
            here = (column == j)[None, :]
            now = tl.sum(tl.where(here, w, 0.0), axis=1)
            scale = tl.sum(tl.where(here, step, 0.0), axis=1)
            offset = tl.sum(tl.where(here, zero, 0.0), axis=1)
            stay = tl.sum(tl.where(here, kept, 0), axis=1)
            q = tl.minimum(tl.maximum(tl.div_rn(now, scale) + offset, low), high)
            q = (q + 12582912.0) - 12582912.0  # 1.5 · 2²³: what is left after the sum is rounded to even
            q = tl.where(stay != 0, q, offset)
            own = tl.sum(tl.where(column == j, diagonal, 0.0), axis=0)
            ignored = tl.sum(tl.where(column == j, dead, 0), axis=0)
            e = tl.where(ignored != 0, 0.0, (now - (q - offset) * scale) / own)
            factor = tl.load(upper_ptr + j * width + column, mask=(column > j) & (column < width), other=0.0)
            w = w - e[:, None] * factor[None, :]
            code = tl.where(here, q[:, None], code)
            error = tl.where(here, e[:, None], error)
        tl.store(code_ptr + place, code, mask=inside)
        tl.store(error_ptr + place, error, mask=inside)


def walk_block(
    w: Tensor,
    upper: Tensor,
    step: Tensor,
    zero: Tensor | None,
    limits: tuple[float, float],
    kept: Tensor | None,
    dead: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `round_sweep.walk_block`, for float32 and an integer grid with these limits."""
    rows, width = w.shape
    codes, errors = (torch.empty(rows, width, dtype=torch.float32, device=w.device) for _ in range(2))
    step = step.contiguous()
    zeros = step if zero is None else zero.contiguous()
    mask = (dead if kept is None else kept).view(torch.int8)
    _walk[(triton.cdiv(rows, TILE),)](
        w,
        upper,
        step,
        zeros,
        mask,
        dead.view(torch.int8),
        codes,
        errors,
        rows,
        w.stride(0),
        mask.stride(0),
        *limits,
        width=width,
        TILE=TILE,
        WIDTH=triton.next_power_of_2(width),
        HAS_ZERO=zero is not None,
        HAS_MASK=kept is not None,
        num_warps=4,
    )
    return codes, errors
