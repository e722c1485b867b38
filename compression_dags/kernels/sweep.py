"""One block of the column sweep as one Triton kernel: a program walks the block's columns for a tile of rows.

Rows are independent within a block, so a tile's weights stay in registers from the first column to the last, and are
read and written once. N:M groups choose their mask inside the walk, from the updated weights.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compression_dags.solvers.sweep import Groups

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # CPU wheels of torch come without it
    AVAILABLE = False

TILE = 16

if AVAILABLE:

    @triton.jit
    def _walk(
        w_ptr,
        kept_ptr,
        upper_ptr,
        zeros_ptr,
        error_ptr,
        rows,
        w_stride,
        kept_stride,
        width: tl.constexpr,
        TILE: tl.constexpr,
        WIDTH: tl.constexpr,
        M: tl.constexpr,
    ):
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * w_stride + column[None, :]
        place_kept = row.to(tl.int64)[:, None] * kept_stride + column[None, :]
        w = tl.load(w_ptr + place, mask=inside, other=0.0)
        kept = tl.load(kept_ptr + place_kept, mask=inside, other=1).to(tl.int32)
        diagonal = tl.load(upper_ptr + column * width + column, mask=column < width, other=1.0)
        error = tl.zeros([TILE, WIDTH], dtype=tl.float32)
        if M > 0:
            zeros = tl.load(zeros_ptr + row, mask=row < rows, other=-1)
        for j in range(0, width):
            if M > 0:  # noqa: SIM102 (M is known when the kernel is compiled, j is not)
                if j % M == 0:
                    scaled = w / diagonal[None, :]
                    score = scaled * scaled
                    rank = tl.zeros([TILE, WIDTH], dtype=tl.int32)
                    for k in range(0, M):
                        other = tl.sum(tl.where(column[None, :] == j + k, score, 0.0), axis=1)[:, None]
                        less = other < score
                        tie = (other == score) & (column[None, :] > j + k)
                        rank += (less | tie).to(tl.int32)
                    group = (column >= j) & (column < j + M)
                    choose = group[None, :] & (zeros >= 0)[:, None]
                    kept = tl.where(choose, (rank >= zeros[:, None]).to(tl.int32), kept)
            here = (column == j)[None, :]
            now = tl.sum(tl.where(here, w, 0.0), axis=1)
            stay = tl.sum(tl.where(here, kept, 0), axis=1)
            stored = tl.where(stay != 0, now, 0.0)
            factor = tl.load(upper_ptr + j * width + column, mask=(column > j) & (column < width), other=0.0)
            own = tl.sum(tl.where(column == j, diagonal, 0.0), axis=0)
            e = (now - stored) / own
            w = tl.where(here, stored[:, None], w - e[:, None] * factor[None, :])
            error = tl.where(here, e[:, None], error)
        tl.store(w_ptr + place, w, mask=inside)
        tl.store(kept_ptr + place_kept, kept.to(tl.int8), mask=inside)
        place_error = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(error_ptr + place_error, error, mask=inside)


def walk_block(w: Tensor, kept: Tensor, upper: Tensor, groups: Groups | None) -> Tensor:
    """As `sweep.walk_block`, for float32; the width is at most a block."""
    rows, width = w.shape
    errors = torch.empty(rows, width, dtype=torch.float32, device=w.device)
    as_bytes = kept.view(torch.int8)
    zeros = groups.zeros if groups else as_bytes
    _walk[(triton.cdiv(rows, TILE),)](
        w,
        as_bytes,
        upper,
        zeros,
        errors,
        rows,
        w.stride(0),
        kept.stride(0),
        width=width,
        TILE=TILE,
        WIDTH=triton.next_power_of_2(width),
        M=groups.m if groups else 0,
        num_warps=4,
    )
    return errors
