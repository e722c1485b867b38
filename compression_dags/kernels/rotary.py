"""Rotary position embedding of queries and keys, as one Triton kernel on a GPU: each value is read and written once."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from compression_dags.kernels.sweep import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def _rotate(
        x_ptr,
        cos_ptr,
        sin_ptr,
        out_ptr,
        positions,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        HEADS_UP: tl.constexpr,
        HALF_UP: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        head, channel = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, HALF_UP)[None, :]
        inside = (head < HEADS) & (channel < HALF)
        place = (token * HEADS + head) * 2 * HALF + channel
        angle = (token % positions) * 2 * HALF + channel
        first, second = tl.load(x_ptr + place, mask=inside), tl.load(x_ptr + place + HALF, mask=inside)
        near = channel < HALF
        cos_1, cos_2 = tl.load(cos_ptr + angle, mask=near), tl.load(cos_ptr + angle + HALF, mask=near)
        sin_1, sin_2 = tl.load(sin_ptr + angle, mask=near), tl.load(sin_ptr + angle + HALF, mask=near)
        kind = out_ptr.dtype.element_ty
        # both products are rounded before they are added, as eager code rounds them
        a = (first.to(tl.float32) * cos_1.to(tl.float32)).to(kind).to(tl.float32)
        b = (second.to(tl.float32) * sin_1.to(tl.float32)).to(kind).to(tl.float32)
        tl.store(out_ptr + place, (a - b).to(kind), mask=inside)
        a = (second.to(tl.float32) * cos_2.to(tl.float32)).to(kind).to(tl.float32)
        b = (first.to(tl.float32) * sin_2.to(tl.float32)).to(kind).to(tl.float32)
        tl.store(out_ptr + place + HALF, (a + b).to(kind), mask=inside)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`: x · cos + (−x₂, x₁) · sin for queries and keys x = (x₁, x₂).

    Args:
        q, k: (b, heads, T, D), each with heads of its own; or (b, T, heads, D) with `unsqueeze_dim` 2.
        cos, sin: (b or 1, T, D).

    Returns:
        Rotated queries and keys; eager code's, and memory laid out as it lays it out, wherever the kernel does not fit.
    """
    tensors = (q, k, cos, sin)
    plain = unsqueeze_dim == 1 and all(t.dtype == q.dtype for t in tensors) and not torch.is_grad_enabled()
    if AVAILABLE and plain and all(t.is_cuda for t in tensors):
        return _by_kernel(q, cos, sin), _by_kernel(k, cos, sin)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _eager(q, cos, sin), _eager(k, cos, sin)


def _eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _by_kernel(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = x.transpose(1, 2).contiguous()  # no copy of what a projection has just written
    batch, length, heads, width = rows.shape
    cos, sin = (t.expand(cos.shape[0], length, width).contiguous() for t in (cos, sin))
    out = torch.empty_like(rows)
    half = width // 2
    sizes = {"HEADS": heads, "HALF": half, "HEADS_UP": _power(heads), "HALF_UP": _power(half)}
    _rotate[(batch * length,)](rows, cos, sin, out, cos.shape[0] * length, **sizes, enable_fp_fusion=False)
    return out.transpose(1, 2)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
