"""What a model's small files say, read within bounds: JSON objects and safetensors headers, never a tensor."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_dags.errors import InputError

#: safetensors' own limit of a header.
HEADER_LIMIT = 100_000_000
#: Largest JSON file that is read here; indexes of the largest mixtures hold a tenth of it.
JSON_LIMIT = 100_000_000
#: Bits of one number, by safetensors' name of its type.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8, "I8": 8, "U8": 8, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F32": 32, "I32": 32, "U32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, known from the file's header alone."""

    name: str
    file: str
    dtype: str  # safetensors' name: F16, BF16, F32, I32, F8_E4M3, …
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0  # first byte, counted from the end of the header

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, in the order of their bytes.

    Raises:
        InputError: the file cannot be read, is truncated, or its header is not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            prefix = handle.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= size - 8:
                raise InputError(f"{path.name} is not a whole safetensors file: {size} bytes, header says {length}")
            if length > HEADER_LIMIT:
                raise InputError(
                    f"{path.name} has an unreadable safetensors header: {length} bytes, allowed are {HEADER_LIMIT}"
                )
            text = handle.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        infos = _parse(strict_json(text.decode("utf-8")), path.name)
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path.name} has an unreadable safetensors header: {one_line(error)}") from None
    expected = 8 + length + sum(info.nbytes for info in infos.values())
    if expected != size:
        raise InputError(f"{path.name} is truncated or padded: {size} bytes on disk, {expected} by its header")
    return infos


def _parse(header: dict[str, Any], file: str) -> dict[str, TensorInfo]:
    infos = [_tensor_info(n, file, entry) for n, entry in header.items() if n != "__metadata__"]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    position = 0
    for info in infos:
        if info.start != position:
            where = "overlaps another one" if info.start < position else "leaves a gap before it"
            raise ValueError(f"tensor {info.name!r} {where} (it starts at {info.start}, not at {position})")
        position += info.nbytes
    return {info.name: info for info in infos}


def _tensor_info(name: str, file: str, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name!r} is of type {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_count(n) for n in shape):
        raise ValueError(f"tensor {name!r} has shape {str(shape)[:60]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise ValueError(f"tensor {name!r} has data_offsets {str(offsets)[:60]}")
    nbytes = -(-math.prod(shape) * BITS[dtype] // 8)
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"tensor {name!r} is {dtype} of shape {shape}, which is not {offsets[1] - offsets[0]} bytes")
    return TensorInfo(name, file, dtype, tuple(shape), nbytes, offsets[0])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: it cannot be read, is not JSON in UTF-8, names a key twice, or holds something else.
    """
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise InputError(f"{path} has {path.stat().st_size} bytes; JSON files of up to {JSON_LIMIT} are read")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: it is not UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        found = strict_json(text)
    except RecursionError:
        raise InputError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def is_file(path: Path) -> bool:
    """Whether there is a regular file; False for a directory, a pipe, a link to nowhere, nothing.

    Raises:
        InputError: the folder may not be read.
    """
    try:
        return path.is_file()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def strict_json(text: str) -> Any:
    """The value of a JSON text as the standard has it.

    Raises:
        ValueError: not JSON; a key that stands twice in one object; NaN, Infinity or a number beyond float64.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice[:60]!r} stands twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value


def one_line(error: BaseException) -> str:
    """First line of an error's text, at most 300 characters; its type's name if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
