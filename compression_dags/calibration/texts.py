"""The one reader of texts, for calibration, distillation and evaluation: .txt, .jsonl, .jsonl.xz and .parquet.

Only strings count: whatever else stands where a text should be is refused with its file and row. A file is checked
whole before anything is computed (`check`), once a process while it stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from compression_dags.errors import InputError
from compression_dags.paths import what_is

SUFFIXES = (".txt", ".jsonl", ".jsonl.xz", ".parquet")
#: Bytes of a line of JSON; a longer one is no row of text but a file of another form.
MAX_LINE = 1 << 28
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}

Identity = tuple[str, int, int, int, int, int]
#: Files that were read to their end → whether they hold any text but white space.
_checked: dict[Identity, bool] = {}
_digests: dict[Identity, str] = {}


def is_text_file(name: str) -> bool:
    """Whether a name ends like a file of texts."""
    return name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """The file's name without its ending, `.jsonl.xz` counted as one."""
    ending = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(ending)]


def rows(path: Path) -> Iterator[str]:
    """The texts of a file in order, empty ones included. A .txt is one text; blank lines of JSONL are no rows.

    Line ends of a .txt become \\n, and a mark of UTF-8 at the beginning of a file is not part of it.

    Raises:
        InputError: `file:row: …`, with rows of a parquet file and lines of the others counted from 1.
    """
    regular(path)
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(".txt"):
            with path.open("rb") as handle:
                yield _text(path, handle)
        else:
            with lzma.open(path, "rb") if name.endswith(".xz") else path.open("rb") as handle:
                yield from _json_lines(path, handle)
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: is no whole .xz file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def check(path: Path) -> bool:
    """Whether there is any text. Every row is read once, so that a bad one is named before anything is computed.

    Raises:
        InputError: as `rows`.
    """
    identity = _identity(path)
    if identity not in _checked:
        filled = False
        for text in rows(path):
            filled = filled or bool(text.strip())
        _checked[identity] = filled
    return _checked[identity]


def digest(path: Path) -> str:
    """sha256 of the file's bytes, hex; of an unchanged file it is computed once a process.

    Raises:
        InputError: no regular file, or it cannot be read.
    """
    identity = _identity(path)
    if identity not in _digests:
        try:
            with path.open("rb") as handle:
                _digests[identity] = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return _digests[identity]


def regular(path: Path) -> None:
    """Refuse what is no regular file (a pipe would block for ever), no file of texts, or not readable.

    Raises:
        InputError: saying what it is, and what is allowed.
    """
    if not path.is_file():
        raise InputError(f"{path}: {what_is(path)}; give a file that ends in {', '.join(SUFFIXES)}")
    if not is_text_file(path.name):
        raise InputError(f"{path}: must be one of {', '.join(SUFFIXES)}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read: Permission denied")


def _identity(path: Path) -> Identity:
    regular(path)
    stat = path.stat()
    return (str(path.absolute()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _text(path: Path, handle: IO[bytes]) -> str:
    data = handle.read()
    _not_utf16(path, data)
    text = _decoded(path, data.removeprefix(_BOM), lambda at: data.count(b"\n", 0, at) + 1)
    if (at := text.find("\0")) >= 0:
        raise InputError(f"{path}:{text.count(chr(10), 0, at) + 1}: holds a NUL byte; it is no plain text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_lines(path: Path, handle: IO[bytes]) -> Iterator[str]:
    # lines end at \n alone: JSON strings may hold U+2028 and the like unescaped
    for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE), b""), 1):
        if number == 1:
            _not_utf16(path, line)
            line = line.removeprefix(_BOM)
        if len(line) == MAX_LINE:
            raise InputError(f"{path}:{number}: is longer than {MAX_LINE:,} bytes; a row is one line")
        if line.strip():
            yield _json_row(path, number, line)


def _json_row(path: Path, number: int, line: bytes) -> str:
    where = f"{path}:{number}"
    text = _decoded(path, line, lambda _: number)
    try:
        # numbers are not wanted; those with more than 4,300 digits would not parse
        row = json.loads(text, object_pairs_hook=_Pairs, parse_int=_number, parse_float=_number)
    except ValueError as error:
        said = f"{error.msg.lower()}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where}: is not a JSON object with a `text`: {said}") from None
    except RecursionError:
        raise InputError(f"{where}: is not a JSON object with a `text`: nested too deeply") from None
    if not isinstance(row, _Pairs):
        raise InputError(f"{where}: is not a JSON object with a `text`, but {_kind(row)}")
    found = [value for key, value in row.pairs if key == "text"]
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(key for key, _ in row.pairs))[:200]
        raise InputError(
            f"{where}: has `text` twice" if found else f"{where}: needs a `text` column; it has {names or 'nothing'}"
        )
    return checked_text(found[0], where)


class _Pairs:
    """An object of JSON with its keys as they stand, repetitions included."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        self.pairs = pairs


def _number(_: str) -> float:
    return 0.0


def checked_text(value: Any, where: str) -> str:
    """`value`, if it is text that UTF-8 can hold.

    Raises:
        InputError: beginning with `where`.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: `text` must be a string, not {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{where}: `text` holds half of a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    if isinstance(value, _Pairs):
        return _KINDS[dict]
    return _KINDS.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _decoded(path: Path, data: bytes, line_at: Callable[[int], int]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise InputError(f"{path}:{line_at(error.start)}: byte 0x{byte:02x} is not UTF-8 text") from None


def _not_utf16(path: Path, data: bytes) -> None:
    if data.startswith(_UTF16):
        raise InputError(f"{path}:1: is UTF-16; texts must be UTF-8")


def _parquet(path: Path) -> Iterator[str]:
    # a tenth of a second that only parquet files need
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    if path.stat().st_size == 0:
        raise InputError(f"{path}: is an empty file, not parquet")
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _one_text_column(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                column = batch.column(0)
                for value in column.cast(pa.large_string()) if pa.types.is_dictionary(column.type) else column:
                    number += 1
                    yield _parquet_text(value, f"{path}: row {number}")
    except InputError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        place = f" after row {number}" if number else ""
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is no readable parquet file{place}: {said}") from None


def _one_text_column(path: Path, schema: Any) -> None:
    # a tenth of a second that only parquet files need
    import pyarrow as pa  # noqa: PLC0415

    at = schema.get_all_field_indices("text")
    if len(at) != 1:
        said = "has two columns `text`" if at else f"needs a `text` column; it has {', '.join(schema.names)[:200]}"
        raise InputError(f"{path}: {said}")
    kind = schema.field(at[0]).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)):
        raise InputError(f"{path}: the column `text` must hold strings, not {kind}")


def _parquet_text(value: Any, where: str) -> str:
    try:
        return checked_text(value.as_py(), where)
    except UnicodeDecodeError:
        raise InputError(f"{where}: `text` is not UTF-8") from None
