"""The one reader of YAML that people write: recipes, `evaluation.yaml`, `{method: …}` of the command line.

It takes YAML's plain part: mappings with words as keys, lists, text, numbers, true and false. Whatever two readers of
YAML may understand differently, and whatever makes a small file large, is refused with its line.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from compression_dags.errors import InputError
from compression_dags.paths import what_is

#: Bytes of a file. Planned recipes of deep models take some 50 KB.
MAX_BYTES = 1 << 20
MAX_DEPTH = 24
Keys = tuple[str | int, ...]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
#: Not finite, or a number to one version of YAML and text or another number to the next.
_ODD = re.compile(
    r"[-+]?(\.(inf|Inf|INF|nan|NaN|NAN)|0[xob][0-9a-fA-F_]+|0[0-9_]+|[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?"
    r"|[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?)"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: word[0] in "tT" for word in ("true", "True", "TRUE", "false", "False", "FALSE")
}
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 80


@dataclass(frozen=True)
class Document:
    """A mapping and where its parts stand.

    Attributes:
        name: what messages call it, most often the file.
        values: the mapping; numbers are finite, keys are text (`3:` too).
        lines: path of keys → line, counted from 1.
    """

    name: str
    values: dict[str, Any]
    lines: dict[Keys, int] = field(repr=False)

    def line(self, keys: Keys) -> int:
        """Line of the deepest part on the way to `keys`."""
        return next(self.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.lines)

    def fail(self, keys: Keys, message: str) -> InputError:
        """`name:line: key: message`, in one line."""
        where = ".".join(map(str, keys))
        return InputError(f"{self.name}:{self.line(keys)}: {where + ': ' if where else ''}{' '.join(message.split())}")


def shown(value: Any) -> str:
    """A value for a message: its repr, shortened."""
    return _shown.repr(value)


def read_file(path: Path, *, max_bytes: int = MAX_BYTES) -> Document:
    """The mapping in a file.

    Raises:
        InputError: not a readable regular file of at most `max_bytes`, or what `read_mapping` refuses.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: {what_is(path)}, not a file")
        with path.open("rb") as handle:
            data = handle.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return read_mapping(data, str(path), max_bytes=max_bytes)


def read_mapping(
    text: str | bytes,
    name: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    odd_numbers: Literal["refuse", "text"] = "refuse",
) -> Document:
    """The mapping that a text holds.

    Plain words are text except null, true and false (`no` and `on` are words), dates are text. `odd_numbers` says what
    becomes of `0x10`, `010`, `1_000`, `1:30`, `.nan`, `.inf` and numbers too large for a float.

    Raises:
        InputError: `name:line: …`: not UTF-8, too large, not YAML, no mapping, more than one document, nested deeper
            than `max_depth`, a key twice or one that is no text, an anchor, an alias, a tag, or an odd number.
    """
    content = _decoded(text, name, max_bytes)
    reader = _Reader(name, max_depth, odd_numbers)
    try:
        values = reader.document(yaml.parse(content, Loader=_LOADER))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = mark.line + 1 if mark else 1
        raise InputError(f"{name}:{line}: is not YAML: {' '.join(problem.split())[:200]}") from None
    return Document(name, values, reader.lines)


def _decoded(text: str | bytes, name: str, max_bytes: int) -> str:
    if len(text) > max_bytes:
        raise InputError(f"{name}: is larger than {max_bytes:,} bytes")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise InputError(f"{name}:{line}: byte 0x{text[error.start]:02x} is not UTF-8 text") from None
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise InputError(f"{name}:{line}: character U+{ord(found[0]):04X} is not allowed in YAML")
    return text


class _Reader:
    """Builds values from the parser's events and remembers lines; it goes no deeper than it may."""

    def __init__(self, name: str, max_depth: int, odd_numbers: str):
        self.name, self.max_depth, self.odd = name, max_depth, odd_numbers
        self.lines: dict[Keys, int] = {(): 1}

    def fail(self, event: Any, keys: Keys, message: str) -> InputError:
        where = ".".join(map(str, keys))
        return InputError(f"{self.name}:{event.start_mark.line + 1}: {where + ': ' if where else ''}{message}")

    def document(self, events: Iterator[Any]) -> dict[str, Any]:
        values: Any = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.fail(event, (), "a second document begins here (`---`); one is allowed")
            elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent, yaml.AliasEvent)):
                values = self.value(event, events, ())
                if not isinstance(values, dict):
                    raise self.fail(event, (), f"must be a mapping (`key: value`), not {shown(values)}")
        if values is None:
            raise InputError(f"{self.name}:1: is empty; it must be a mapping (`key: value`)")
        return values

    def value(self, event: Any, events: Iterator[Any], keys: Keys) -> Any:
        self.plain(event, keys)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, keys)
        if len(keys) >= self.max_depth:
            raise self.fail(event, (), f"is nested deeper than {self.max_depth} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(events, keys)
        return self.mapping(events, keys)

    def sequence(self, events: Iterator[Any], keys: Keys) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            own = (*keys, len(found))
            self.lines[own] = event.start_mark.line + 1
            found.append(self.value(event, events, own))
        return found

    def mapping(self, events: Iterator[Any], keys: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            self.plain(event, keys)
            if not isinstance(event, yaml.ScalarEvent):
                raise self.fail(event, keys, "a key must be text, not a list or mapping")
            key = self.scalar(event, (*keys, event.value))
            if isinstance(key, int) and not isinstance(key, bool):  # `3: 0.5`, a layer
                key = str(key)
            if not isinstance(key, str):
                raise self.fail(event, keys, f"the key {shown(event.value)} must be text; put it in quotes")
            own = (*keys, key)
            if key in found:
                raise self.fail(event, own, f"is given twice; first in line {self.lines[own]}")
            self.lines[own] = event.start_mark.line + 1
            found[key] = self.value(next(events), events, own)
        return found

    def plain(self, event: Any, keys: Keys) -> None:
        """Refuse what points elsewhere or names a type."""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self.fail(event, keys, "anchors and aliases (& and *) are not allowed; write the value, or quote it")
        if event.tag is not None:
            raise self.fail(event, keys, f"tags are not allowed, here {shown(event.tag)}; write the plain value")

    def scalar(self, event: Any, keys: Keys) -> Any:
        text = event.value
        if event.style in ("'", '"', "|", ">"):  # quoted, or a block of text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if len(text) <= 64 and _ODD.fullmatch(text):  # of longer ones it would backtrack for minutes
            return self.unclear(event, keys)
        if _INTEGER.fullmatch(text):
            return int(text) if len(text) < 20 else self.unclear(event, keys)
        if _FLOAT.fullmatch(text):
            return value if math.isfinite(value := float(text)) else self.unclear(event, keys)
        return text

    def unclear(self, event: Any, keys: Keys) -> str:
        if self.odd == "text":
            return event.value
        said = f"{shown(event.value)} is not a plain finite number; write one such as 16, 0.5 or 1e-3, or quote text"
        raise self.fail(event, keys, said)
