"""The licence that a model's folder states; README.md is read within bounds and never trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compression_dags.checkpoints.headers import is_file
from compression_dags.checkpoints.model_files import describing_files, is_legal

#: Front matter of the hub's cards; the longest seen there have some 30 KB (lists of evaluation results).
_FRONT_LIMIT = 100_000
_DEEPEST = 20
_LONGEST = 100
_MOST = 10


def stated_licence(source: Path) -> str | None:
    """`license:` of README.md's front matter, else the name of a licence file, else None."""
    return read_licence(source)[0]


def read_licence(source: Path) -> tuple[str | None, str | None]:
    """(what `stated_licence` gives, why README.md was ignored).

    The licence is one line of at most 100 characters.
    """
    named, note = _card_licence(source / "README.md")
    files = (p.name for p in describing_files(source) if is_legal(p.name))
    return named or next(files, None), note


def _card_licence(card: Path) -> tuple[str | None, str | None]:
    if not is_file(card):
        return None, None
    try:
        front, whole = _front_matter(card)
        if front is None:
            return None, None if whole else f"README.md: front matter above {_FRONT_LIMIT} bytes is ignored"
        fields = _plain_mapping(front)
    except (OSError, ValueError, RecursionError) as error:
        return None, f"README.md: front matter is ignored: {' '.join(str(error).split())[:120]}"
    named = fields.get("license_name") if fields.get("license") == "other" else None
    return _short(named or fields.get("license")), None


def _front_matter(card: Path) -> tuple[str | None, bool]:
    """(text between the two lines of dashes, whether the file was read far enough to know)."""
    with card.open("rb") as handle:
        raw = handle.read(_FRONT_LIMIT + 1)
    lines = raw[:_FRONT_LIMIT].decode("utf-8", errors="replace").split("\n")
    if lines[0].rstrip() != "---":
        return None, True
    for number, line in enumerate(lines[1:], 1):
        if line.rstrip() == "---":
            return "\n".join(lines[1:number]), True
    return None, len(raw) <= _FRONT_LIMIT


def _plain_mapping(text: str) -> dict[str, Any]:
    """The YAML mapping in `text`.

    Raises:
        ValueError: not YAML, or with anchors and aliases, which can unfold to any size.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError("it is nested too deeply")  # the scanner's time grows with the square of the depth
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ValueError("it uses anchors or aliases")
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or "it is not YAML") from None
    return found if isinstance(found, dict) else {}


def _short(stated: Any) -> str | None:
    """A licence's name on one line of at most 100 characters; None for anything else."""
    parts = stated[:_MOST] if isinstance(stated, list) else [stated]
    names = [" ".join(part.split()) for part in parts if isinstance(part, str)]
    text = ", ".join(name for name in names if name)
    return text[:_LONGEST] if text.isprintable() and text else None
