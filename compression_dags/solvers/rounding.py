"""Round to nearest on a grid: scales, zero points and codes of one weight matrix.

W (out, in) is cut along its input dimension into groups; every group has a scale s and, if asymmetric, a zero point z:

    q = clamp(round(W / s + z), q_min, q_max)        Ŵ = (q - z) · s

Conventions are compressed-tensors' (`calculate_qparams`, `fake_quantize`), so that Ŵ survives packing and loading
unchanged. Scales are found in float32 and kept in the dtype in which they are stored; codes are rounded against the
stored scale, not against the ideal one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from compression_dags.errors import IntegrityError
from compression_dags.solvers.grids import Q_MAX, Grid

FP8 = torch.float8_e4m3fn
FP4_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1
SMALLEST_FP8 = 2.0**-9


@dataclass(frozen=True)
class Scales:
    """The quantization parameters of one matrix.

    Attributes:
        scale: (out, groups), in the stored dtype: the source's, float8_e4m3fn for nvfp4, float32 for mx; equal within
            a block of rows.
        zero_point: (out, groups) int8, None if symmetric.
        global_scale: (1,) float32, nvfp4 only; the step of a group is scale / global_scale.
    """

    grid: Grid
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None

    def step(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Distance of neighbouring integer codes, (out, groups)."""
        scale = self.scale.to(dtype)
        return scale if self.global_scale is None else scale / self.global_scale

    def to(self, device: torch.device | str) -> Scales:
        zero = None if self.zero_point is None else self.zero_point.to(device)
        whole = None if self.global_scale is None else self.global_scale.to(device)
        return Scales(self.grid, self.scale.to(device), zero, whole)


@dataclass(frozen=True)
class Rounded:
    """A matrix on its grid: `codes` (out, in) holds the grid values q exactly, in float32 or, for integers, int8."""

    codes: torch.Tensor
    scales: Scales

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Ŵ (out, in), computed in `dtype` as a loader does that keeps scales in `dtype`."""
        step, zero = self.scales.step(dtype), self.scales.zero_point
        codes = _groups(self.codes.to(dtype), step.shape[1])
        if zero is not None:
            codes = codes - zero.to(dtype).unsqueeze(-1)
        return (codes * step.unsqueeze(-1)).flatten(1)

    def to(self, device: torch.device | str) -> Rounded:
        return Rounded(self.codes.to(device), self.scales.to(device))

    def divided_rows(self, factors: torch.Tensor, name: str = "weight") -> Rounded:
        """diag(1 / factors) Ŵ: the same codes, their scales divided. Rows must have scales of their own, as stored.

        Args:
            factors: (out,), above 0.

        Raises:
            IntegrityError: a scale leaves the range of its dtype.
        """
        scales = self.scales
        divided = (scales.scale.float() / factors[:, None]).to(scales.scale.dtype)
        if not bool((torch.isfinite(divided) & (divided > 0)).all()):
            raise IntegrityError(f"{name}: a scale leaves {divided.dtype} when its row is divided")
        return Rounded(self.codes, Scales(scales.grid, divided, scales.zero_point))

    def relative_error(self, weight: torch.Tensor) -> float:
        """‖W − Ŵ‖ / ‖W‖ with float64 sums; 0 for a matrix of zeros."""
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
        difference = torch.linalg.vector_norm(weight.float() - self.dequantize(), dtype=torch.float64)
        return float(difference / norm) if norm > 0 else 0.0


def round_to_nearest(weight: torch.Tensor, grid: Grid, name: str = "weight") -> Rounded:
    """RTN of one matrix.

    Args:
        weight: (out, in), float32, float16 or bfloat16; its dtype is the dtype of the stored scales.
        name: named in errors.

    Raises:
        IntegrityError: the weight or a scale is not finite.
    """
    scales = find_scales(weight, grid, name)
    return Rounded(round_codes(weight, scales), scales)


def find_scales(
    weight: torch.Tensor,
    grid: Grid,
    name: str = "weight",
    stored: torch.dtype | None = None,
    share: torch.Tensor | float = 1.0,
) -> Scales:
    """Scales from the range of every group (absmax if symmetric, min and max otherwise; zero is always inside), stored
    in the dtype of the weight or in `stored`. A `share` (out, groups) of the range is used: weights beyond are clipped.

    Raises:
        IntegrityError: the weight is not finite, or a scale overflows its stored dtype.
    """
    groups = 1 if grid.group_size is None else weight.shape[1] // grid.group_size
    low, high = torch.aminmax(_groups(weight.float(), groups), dim=-1)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise IntegrityError(f"{name} holds values that are not finite; it cannot be quantized")
    low, high = low.clamp(max=0) * share, high.clamp(min=0) * share
    low, high = _shared(low, grid, torch.amin), _shared(high, grid, torch.amax)
    if grid.scaling == "nvfp4":
        return _fp4_scales(torch.maximum(-low, high), grid)
    if grid.scaling == "mx":
        return _power_scales(weight, torch.maximum(-low, high), grid)
    q_min, q_max = grid.range
    half = (q_max - q_min) / 2
    ideal = divided(torch.maximum(-low, high), half) if grid.symmetric else divided(high - low, q_max - q_min)
    scale = _store(ideal, stored or weight.dtype)
    if not torch.isfinite(scale).all():
        raise IntegrityError(f"{name}: a scale overflows {str(stored or weight.dtype).removeprefix('torch.')}")
    if grid.symmetric:
        return Scales(grid, scale)
    zero = (q_min - low / scale.float()).clamp(q_min, q_max).round().to(torch.int8)
    return Scales(grid, scale, zero)


def divided(values: torch.Tensor, by: float) -> torch.Tensor:
    """`values / by`, to the bit the same on every device.

    By a number, CUDA multiplies by its reciprocal. The largest weight of a symmetric group lies on a tie of two codes,
    so that a last bit of the scale decides between them.
    """
    return values / torch.tensor(by, dtype=values.dtype, device=values.device)


def round_codes(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Nearest grid values, ties to even, (out, in) float32. Weights beyond the grid go to its end."""
    step = scales.step()
    q = _groups(weight.float(), step.shape[1]) / step.unsqueeze(-1)
    if scales.zero_point is not None:
        q = q + scales.zero_point.float().unsqueeze(-1)
    return snap(q.clamp(*scales.grid.range), scales.grid.kind).flatten(1)


def snap(q: torch.Tensor, kind: str) -> torch.Tensor:
    """The nearest grid value, ties to even, of numbers inside the range."""
    if kind == "int":
        return q.round()
    return q.to(FP8).float() if kind == "fp8" else _snap_fp4(q)


def _snap_fp4(q: torch.Tensor) -> torch.Tensor:
    grid = torch.tensor(FP4_GRID, device=q.device)
    middle = (grid[1:] + grid[:-1]) / 2
    magnitude = q.abs()
    below, above = torch.bucketize(magnitude, middle), torch.bucketize(magnitude, middle, right=True)
    # The two differ only on a tie; an even index is an even mantissa.
    return grid[torch.where(below % 2 == 0, below, above)].copysign(q)


def _fp4_scales(peak: torch.Tensor, grid: Grid) -> Scales:
    """NVFP4: the global scale maps the largest |w| onto the largest FP8 scale times the largest FP4 value.

    A group too small for FP8 gets the smallest scale there is, so that as much of it as possible survives
    (compressed-tensors would put 0.125 there and lose all of it).
    """
    whole = torch.nan_to_num(Q_MAX["fp8"] * Q_MAX["fp4"] / peak.max(), posinf=1.0).reshape(1)
    scale = (divided(peak, Q_MAX["fp4"]) * whole).clamp(SMALLEST_FP8, Q_MAX["fp8"]).to(FP8)
    return Scales(grid, scale, global_scale=whole)


def _power_scales(weight: torch.Tensor, peak: torch.Tensor, grid: Grid) -> Scales:
    """Of the powers of two that hold the peak of a group and the next smaller one, the one with the least Σ(w − ŵ)².

    (compressed-tensors rounds the exponent of the peak alone.)
    """
    exponent = torch.ceil(torch.log2(divided(peak, Q_MAX[grid.kind]))).nan_to_num(neginf=0.0).clamp(-126, 127)
    found = [Scales(grid, torch.exp2(exponent - down)) for down in (0, 1)]
    errors = []
    for scales in found:
        off = Rounded(round_codes(weight, scales), scales).dequantize() - weight.float()
        errors.append(_groups(off, peak.shape[1]).square().sum(-1))
    return Scales(grid, torch.where(errors[1] < errors[0], found[1].scale, found[0].scale))


def _shared(extreme: torch.Tensor, grid: Grid, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(out, groups): the extreme of every block of rows, at each of its rows."""
    if grid.block_rows == 1:
        return extreme
    rows = extreme.shape[0]
    padded = F.pad(extreme, (0, 0, 0, -rows % grid.block_rows))  # 0 is inside every range
    blocks = reduce(padded.unflatten(0, (-1, grid.block_rows)), dim=1)
    return blocks.repeat_interleave(grid.block_rows, dim=0)[:rows]


def _store(ideal: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the dtype they are stored in, rounded upwards; a group of zeros gets 1, which keeps its zeros.

    Rounded down, a bfloat16 scale could push the largest of 255 levels half a step out of range, and a subnormal
    float16 scale much further, or become zero.
    """
    scale = ideal.to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[scale.element_size()]
    scale = torch.where(scale.float() < ideal, (scale.view(bits) + 1).view(dtype), scale)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _groups(matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """(out, in) → (out, groups, in / groups), a view."""
    return matrix.unflatten(1, (groups, -1))
