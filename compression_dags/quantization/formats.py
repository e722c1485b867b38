"""Which values a matrix may take and how it then lies on disk: compressed-tensors' schemes, one choice a matrix."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression_dags.errors import InputError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from compression_dags.solvers.rounding import Grid

Scheme = Literal[
    "W8A16", "W4A16", "W3A16", "W8A8", "W4A8", "FP8A16", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"
]  # fmt: skip

Layout = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Format:
    """How a scheme lies on disk.

    Attributes:
        name: compressed-tensors' name of the format.
        group_size: the default (None: one scale a channel); it may be chosen only where `free`.
        activations: bits of the inputs, rounded while the model runs; 16 leaves them.
        fallback: what a matrix gets whose inputs the fixed group size does not divide; None: it stays as it is.
        preset: compressed-tensors' name of the scheme, where it is another; `activations` of 16 then leave the inputs.
    """

    name: str
    kind: Literal["int", "fp8", "fp4"]
    bits: int
    group_size: int | None = None
    free: bool = False
    activations: int = 16
    block_rows: int = 1
    scaling: Literal["stored", "nvfp4", "mx"] = "stored"
    fallback: Scheme | None = None
    preset: str | None = None


FORMATS: dict[str, Format] = {
    "W8A16": Format("pack-quantized", "int", 8, free=True),
    "W4A16": Format("pack-quantized", "int", 4, group_size=128, free=True),
    "W3A16": Format("pack-quantized", "int", 3, group_size=128, free=True),
    "W8A8": Format("int-quantized", "int", 8, activations=8),
    "W4A8": Format("pack-quantized", "int", 4, group_size=128, free=True, activations=8),
    "FP8A16": Format("naive-quantized", "fp8", 8, preset="FP8_DYNAMIC"),
    "FP8_DYNAMIC": Format("float-quantized", "fp8", 8, activations=8),
    "FP8_BLOCK": Format("float-quantized", "fp8", 8, 128, activations=8, block_rows=128, fallback="FP8_DYNAMIC"),
    "NVFP4A16": Format("nvfp4-pack-quantized", "fp4", 4, group_size=16, scaling="nvfp4"),
    "MXFP4A16": Format("mxfp4-pack-quantized", "fp4", 4, group_size=32, scaling="mx"),
}
FREE = ", ".join(name for name, format in FORMATS.items() if format.free)
#: Smaller groups cost more bits for scales than they are worth, and no kernel reads them.
LEAST_GROUP = 16


@dataclass(frozen=True, order=True)
class Choice:
    """What one matrix is quantized to.

    Attributes:
        group_size: inputs that share a scale, None for a whole row.
    """

    scheme: str
    group_size: int | None
    symmetric: bool = True

    @classmethod
    def of(cls, scheme: str, group_size: int | None = None, symmetric: bool = True) -> Choice:
        """With the scheme's own group size where none is given.

        Raises:
            InputError: an unknown scheme; a group size or zero points where the scheme fixes them.
        """
        if scheme not in FORMATS:
            raise InputError(f"scheme {scheme!r} is unknown; allowed: {', '.join(FORMATS)}")
        format = FORMATS[scheme]
        if not format.free and group_size not in (None, format.group_size):
            fixed = format.group_size or "one scale an output channel"
            raise InputError(f"group_size {group_size}: {scheme} fixes it ({fixed}); it is free for {FREE}")
        if not (format.free or symmetric):
            raise InputError(f"symmetric false: {scheme} is always symmetric; zero points exist for {FREE}")
        return cls(scheme, group_size or format.group_size, symmetric)

    @property
    def label(self) -> str:
        """`W4A16` with its group size and zero points where they are free, for messages."""
        groups = f" in groups of {self.group_size}" if self.format.free and self.group_size else ""
        return f"{self.scheme}{groups}{'' if self.symmetric else ', asymmetric'}"

    def options(self) -> dict[str, str | int | bool]:
        """As in a recipe: what `of` needs."""
        group = {"group_size": self.group_size} if self.format.free and self.group_size else {}
        return {"scheme": self.scheme, **group, **({} if self.symmetric else {"symmetric": False})}

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme]

    @property
    def dequantize_on_load(self) -> bool:
        """Whether config.json must ask transformers to rebuild dense weights while loading (docs/methods/rtn.md).

        transformers' default path expects unpacked zero points, and leaves FP4 weights in bfloat16 in a model of
        another dtype. Only weight-only schemes may set this: it drops the rounding of activations. Nor may such a
        checkpoint hold a second scheme: transformers 5.23 rebuilds every matrix by the first one.
        """
        return not self.symmetric or self.format.kind == "fp4"

    def grid(self) -> Grid:
        from compression_dags.solvers.rounding import Grid

        f = self.format
        return Grid(f.kind, f.bits, self.group_size, self.symmetric, f.block_rows, f.scaling)

    def fits(self, columns: int) -> bool:
        """Whether groups fill the rows of a matrix of so many inputs."""
        return not self.group_size or columns % self.group_size == 0

    def smaller(self) -> Iterator[Choice]:
        """The same with fewer inputs a scale, the most first: powers of two; empty where the scheme fixes the group."""
        if self.group_size and self.format.free:
            for size in (2**k for k in range(12, 3, -1)):
                if LEAST_GROUP <= size < self.group_size:
                    yield Choice(self.scheme, size, self.symmetric)

    def fitted(self, columns: int) -> Choice | None:
        """This choice, or the nearest that fits a matrix of so many inputs; None: the matrix stays as it is.

        Where groups are free, the largest power of two that divides, else one scale a row at 8 bits; where the scheme
        fixes the group, its fallback. A scheme that is rebuilt while loading shares its checkpoint with no other, so
        there is none at 8 bits for it.
        """
        if self.fits(columns):
            return self
        if self.format.fallback:
            return Choice.of(self.format.fallback)
        if found := next((c for c in self.smaller() if c.fits(columns)), None):
            return found
        if self.dequantize_on_load:
            return None
        return Choice("W8A8" if self.format.activations == 8 else "W8A16", None)

    def common(self, widths: Iterable[int]) -> Choice:
        """This choice with the largest group that fits all of these widths (inputs), those aside that no group fits."""
        wanted = [w for w in widths if self.fitted(w)]
        return next((c for c in (self, *self.smaller()) if all(map(c.fits, wanted))), self)

    def layout(self, shape: tuple[int, ...], dtype: str) -> Layout:
        """Tensors that stand for one `weight` on disk: local name → (safetensors dtype, shape).

        Args:
            shape: (out, in) of the dense weight.
            dtype: safetensors' name of its dtype, in which integer and FP8 schemes store their scales.
        """
        rows, columns = shape
        format, groups = self.format, columns // (self.group_size or columns)
        scale: Layout = {"weight_scale": (dtype, (-(-rows // format.block_rows), groups))}
        match format.name:
            case "int-quantized" | "float-quantized" | "naive-quantized" as name:
                return {"weight": ("I8" if name == "int-quantized" else "F8_E4M3", (rows, columns)), **scale}
            case "nvfp4-pack-quantized":
                scale = {"weight_scale": ("F8_E4M3", (rows, groups)), "weight_global_scale": ("F32", (1,))}
                return {"weight_packed": ("U8", (rows, columns // 2)), **scale}
            case "mxfp4-pack-quantized":
                return {"weight_packed": ("U8", (rows, columns // 2)), "weight_scale": ("U8", (rows, groups))}
        packed: Layout = {"weight_packed": ("I32", (rows, -(-columns * format.bits // 32))), **scale}
        packed["weight_shape"] = ("I64", (2,))
        if not self.symmetric:
            packed["weight_zero_point"] = ("I32", (-(-rows * format.bits // 32), groups))
        return packed

    def compression_scheme(self, targets: tuple[str, ...] = ("Linear",)) -> QuantizationScheme:
        """compressed-tensors' own preset, with our group size and symmetry."""
        return _compression_scheme(self, targets).model_copy(deep=True)


@functools.cache
def _compression_scheme(choice: Choice, targets: tuple[str, ...]) -> QuantizationScheme:
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    scheme = preset_name_to_scheme(choice.format.preset or choice.scheme, list(targets))
    if choice.format.activations == 16:
        scheme.input_activations = None
    scheme.format = CompressionFormat(choice.format.name)
    if choice.format.free:
        group = choice.group_size
        assert scheme.weights is not None
        own = {"strategy": "group" if group else "channel", "group_size": group, "symmetric": choice.symmetric}
        scheme.weights = QuantizationArgs.model_validate({**scheme.weights.model_dump(), **own})
    return scheme
