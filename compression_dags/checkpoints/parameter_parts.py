"""Where the tensors of a file lie in a parameter in memory, read off index tensors that went through a conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
#: Smallest size of an index tensor's axes: two rows could not tell a permutation from its inverse.
SMALLEST = 4


@dataclass(frozen=True)
class Part:
    """One box of a disk tensor, and the box of the parameter that it becomes.

    `parameter[place]` is `tensor[source]`, with its last two axes swapped if `transposed`. An empty index is the whole.
    """

    disk: str
    place: tuple[int | slice, ...] = ()
    source: tuple[slice, ...] = ()
    transposed: bool = False

    def read(self, parameter: Tensor) -> Tensor:
        """The box as it stands on disk: a view of the parameter."""
        piece = parameter[self.place]
        return piece.mT if self.transposed else piece

    def scaled(self, factor: int) -> Part:
        """The same part of tensors whose every axis is `factor` times as long."""
        place = tuple(i if isinstance(i, int) else _times(i, factor) for i in self.place)
        return Part(self.disk, place, tuple(_times(s, factor) for s in self.source), self.transposed)

    @property
    def volumes(self) -> tuple[int, int]:
        """Elements of the box in the parameter and on disk."""
        inside = math.prod(i.stop - i.start for i in self.place if isinstance(i, slice))
        return inside, math.prod(s.stop - s.start for s in self.source)


@dataclass(frozen=True)
class Made:
    """How a parameter in memory is made.

    Attributes:
        disk: names of the disk tensors, in the order of their places in the parameter.
        parts: where each lies; None where an operation mixes elements, so that no box of it is a disk tensor.
        operations: what transformers applies, in order; empty for a rename.
    """

    disk: tuple[str, ...]
    parts: tuple[Part, ...] | None
    operations: tuple[str, ...] = ()


def renamed(name: str) -> Made:
    """A parameter that is one disk tensor."""
    return Made((name,), (Part(name),))


def shrinking(shapes: Sequence[Shape]) -> int:
    """By how much all axes can be divided so that index tensors stay small; 1 where they share no such divisor."""
    common = math.gcd(*(size for shape in shapes for size in shape))
    left = next((size for size in range(SMALLEST, common + 1) if common % size == 0), common)
    return common // left


def numbered(shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """Index tensors: every element of all of them has a number of its own, and no tensor's numbers touch another's."""
    found: dict[str, np.ndarray] = {}
    first = 1  # arithmetic on the numbers leaves their range and shows
    for name, shape in shapes.items():
        count = math.prod(shape)
        found[name] = np.arange(first, first + count, dtype=np.int64).reshape(shape)
        first += count + 1
    return found


def parts_in(parameter: np.ndarray, numbers: Mapping[str, np.ndarray]) -> tuple[Part, ...] | None:
    """The boxes of which a converted index tensor consists, in order of their places; None where it is not boxes."""
    order = np.argsort(parameter, axis=None)
    values = parameter.reshape(-1)[order]
    parts, seen = [], 0
    for name, own in numbers.items():
        first = int(own.flat[0])
        low, high = np.searchsorted(values, [first, first + own.size])
        if low == high:
            continue
        inside = np.unravel_index(order[low:high], parameter.shape)
        part = _box(name, inside, np.unravel_index(values[low:high] - first, own.shape))
        if part is None:
            return None
        parts.append(part)
        seen += int(high - low)
    return tuple(sorted(parts, key=_start)) if seen == parameter.size else None


def spans(parts: Sequence[Part], shape: Shape) -> bool:
    """Whether boxes fill a parameter of this shape and are each as large as the box on disk."""
    if any(len(part.place) != len(shape) for part in parts):
        return False
    filled = sum(part.volumes[0] for part in parts) == math.prod(shape)
    fits = all(
        (i < size) if isinstance(i, int) else (i.stop <= size)
        for part in parts
        for i, size in zip(part.place, shape, strict=True)
    )
    return filled and fits and all(inside == outside for inside, outside in (part.volumes for part in parts))


def _times(old: slice, factor: int) -> slice:
    return slice(old.start * factor, old.stop * factor)


def _start(part: Part) -> list[int]:
    return [i if isinstance(i, int) else i.start for i in part.place]


def _extent(axis: np.ndarray) -> slice:
    return slice(int(axis.min()), int(axis.max()) + 1)


def _box(name: str, inside: Sequence[np.ndarray], outside: Sequence[np.ndarray]) -> Part | None:
    """The part whose elements have these coordinates in the parameter and on disk; None if they are no box."""
    source = tuple(map(_extent, outside))
    if math.prod(s.stop - s.start for s in source) != len(outside[0]):
        return None
    swapped = [*outside[:-2], outside[-1], outside[-2]] if len(outside) > 1 else None
    stacked = [None, *range(len(inside))]
    for axes in (outside, swapped):
        for axis in stacked if axes is not None else ():
            if axes is not None and (place := _placed(inside, axes, axis)) is not None:
                return Part(name, place, source, axes is swapped)
    return None


def _placed(
    inside: Sequence[np.ndarray], axes: Sequence[np.ndarray], stacked: int | None
) -> tuple[int | slice, ...] | None:
    """The index of the box, if the parameter's axes are these of the disk, but for one along which tensors stack."""
    if len(inside) != len(axes) + (stacked is not None):
        return None
    if stacked is not None and (inside[stacked] != inside[stacked][0]).any():
        return None
    others = [axis for k, axis in enumerate(inside) if k != stacked]
    if not all(np.array_equal(a - a.min(), b - b.min()) for a, b in zip(others, axes, strict=True)):
        return None
    return tuple(int(axis[0]) if k == stacked else _extent(axis) for k, axis in enumerate(inside))
