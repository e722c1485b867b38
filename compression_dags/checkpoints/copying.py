"""Weights read once: every byte is hashed, checked and written in one pass, several files at a time."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from compression_dags.checkpoints.headers import TensorInfo, read_header
from compression_dags.errors import InputError
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    import numpy as np

#: Bytes that one thread holds; two such buffers a file are in flight.
CHUNK = 4 * 2**20
_READERS = 8
#: numpy type of the bits, mask of all but the sign, first pattern that is no finite number.
_PATTERNS = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
}


@dataclass(frozen=True)
class FilePlan:
    """How one weight file is copied: as it is, or without the tensors named in `dropped`."""

    source: Path
    dropped: frozenset[str]


def stamp(path: Path) -> list[int]:
    """What changes when a file's contents do: size, times of modification and change, inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def copy_weights(plans: list[FilePlan], directory: Path | None, progress: Progress = silent) -> dict[str, str]:
    """Name → sha256 of the files that are written below `directory`; None only reads.

    Raises:
        InputError: a value is NaN or infinite, naming the tensor; a file cannot be read, or changed meanwhile.
        OSError: `directory` cannot be written.
    """
    readers = max(1, min(len(plans), _READERS, os.cpu_count() or 1))
    stop = Event()
    with ThreadPoolExecutor(readers) as hashers, ThreadPoolExecutor(readers) as files:
        jobs = [files.submit(_copy, plan, directory, hashers, stop) for plan in plans]
        try:
            return dict(job.result() for job in progress(jobs, "importing weights", len(jobs)))
        finally:
            stop.set()  # after a failure or Ctrl-C the other files are given up


class _Stopped(Exception):
    """Another file failed, and its error is the one to show."""


def _copy(plan: FilePlan, directory: Path | None, hashers: ThreadPoolExecutor, stop: Event) -> tuple[str, str]:
    name, before = plan.source.name, stamp(plan.source)
    header, tensors, skip = _new_header(plan)
    digest = hashlib.sha256(header)
    target = (directory / name).open("xb") if directory else None
    try:
        if target:
            target.write(header)
        with _opened(plan.source) as source:
            source.seek(skip)
            for info, piece in _pieces(source, tensors):
                if stop.is_set():
                    raise _Stopped
                if info.name in plan.dropped:
                    continue
                hashed = hashers.submit(digest.update, piece)  # beside the check and the write below
                try:
                    if _count_non_finite(piece, info.dtype):
                        raise InputError(_complaint(plan.source, info))
                    if target:
                        target.write(piece)
                finally:
                    hashed.result()
    finally:
        if target:
            target.close()
    if stamp(plan.source) != before:
        raise InputError(f"{plan.source} changed while it was read; import it again when it is complete")
    return name, digest.hexdigest()


def _opened(path: Path) -> FileIO:
    try:
        return cast(FileIO, path.open("rb", buffering=0))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _new_header(plan: FilePlan) -> tuple[bytes, list[TensorInfo], int]:
    """(bytes before the tensors of the new file, the source's tensors by position, where they start there)."""
    with _opened(plan.source) as handle:
        prefix = handle.read(8)
        (length,) = struct.unpack("<Q", prefix)
        text = handle.read(length)
    tensors = list(read_header(plan.source).values())
    if not plan.dropped:
        return prefix + text, tensors, 8 + length
    old, new, position = json.loads(text), {}, 0
    if "__metadata__" in old:
        new["__metadata__"] = old["__metadata__"]
    for info in tensors:
        if info.name not in plan.dropped:
            new[info.name] = old[info.name] | {"data_offsets": [position, position + info.nbytes]}
            position += info.nbytes
    written = json.dumps(new, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # tensors start at a multiple of 8, as safetensors writes them
    return struct.pack("<Q", len(written)) + written, tensors, 8 + length


def _pieces(source: FileIO, tensors: list[TensorInfo]) -> Iterator[tuple[TensorInfo, memoryview]]:
    """The tensors' bytes in pieces of whole numbers. A piece is overwritten when the next is asked for."""
    buffer = memoryview(bytearray(CHUNK))
    for info in tensors:
        left = info.nbytes
        while left:
            piece = buffer[: min(left, CHUNK)]
            got = 0
            while got < len(piece):
                try:
                    more = source.readinto(piece[got:])
                except OSError as error:
                    raise InputError(f"{source.name} cannot be read: {error.strerror or error}") from None
                if not more:
                    raise InputError(f"{source.name} became shorter while it was read")
                got += more
            yield info, piece
            left -= len(piece)


def _count_non_finite(piece: memoryview, dtype: str) -> int:
    """How many numbers of the piece are NaN or infinite; 0 for types that are not floating."""
    if dtype not in _PATTERNS:
        return 0
    kind, mask, limit = _PATTERNS[dtype]
    bits: np.ndarray[Any, Any] = np.frombuffer(piece, dtype=kind) & np.dtype(kind).type(mask)
    # The largest is found with vector instructions; only a bad piece is counted.
    return int((bits >= limit).sum()) if bits.size and bits.max() >= limit else 0


def _complaint(file: Path, info: TensorInfo) -> str:
    """One line with the count over the whole tensor, which is read once more."""
    with _opened(file) as source:
        _seek(source, info)
        bad = sum(_count_non_finite(piece, info.dtype) for _, piece in _pieces(source, [info]))
    return f"{file.name}: tensor {info.name} holds {bad} non-finite values (NaN or Inf) of {info.numel}"


def _seek(source: FileIO, info: TensorInfo) -> None:
    (length,) = struct.unpack("<Q", source.read(8))
    source.seek(8 + length + info.start)


def equal_bytes(first: tuple[Path, TensorInfo], second: tuple[Path, TensorInfo]) -> bool:
    """Whether two stored tensors have one type, one shape and the same bytes."""
    (one, a), (two, b) = first, second
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with _opened(one) as left, _opened(two) as right:
        _seek(left, a)
        _seek(right, b)
        pairs = zip(_pieces(left, [a]), _pieces(right, [b]), strict=True)
        return all(x == y for (_, x), (_, y) in pairs)
