"""What a recipe may be called: its name becomes a folder, a partition and a word of the command line."""

from __future__ import annotations

import hashlib
import re

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
#: Dagster allows 63 characters in the value of an asset's tag, where a recipe's name stands.
MAX_NAME = 63
BASELINE = "baseline"
#: Between a recipe's name and a changed calibration. No file may use it in a name.
DERIVED = "@"
#: Names of jobs (`compress_<recipe>`), groups and assets that are not a recipe's.
RESERVED = frozenset(
    ("all", "analysis", "base-model", "base-models", BASELINE, "champion", "decision-ledger", "default")  # noqa: RUF005
    + ("evaluate-all", "leaderboard", "planning", "recipe", "results", "summarise")
)


def fault(name: object) -> str | None:
    """What is wrong with a recipe's name, and what is allowed; None if it is good."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "must be lower-case words (letters and digits) joined by hyphens, and not 'baseline'"
    if len(name) > MAX_NAME:
        return f"has {len(name)} characters; at most {MAX_NAME} are allowed"
    if name in RESERVED:
        return f"is reserved; not allowed are {', '.join(sorted(RESERVED))}"
    return None


def derived_name(name: str, sequences: int, length: int) -> str:
    """The name of a recipe with another calibration: `shortgpt-20@16x256`. A derived name is derived anew."""
    return f"{name.partition(DERIVED)[0]}{DERIVED}{sequences}x{length}"


def made_name(text: str) -> str:
    """A legal name made of any text: other characters become hyphens; what is too long ends in a hash of the whole."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if fault(name) is None:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return f"{name[: MAX_NAME - 14].strip('-')}-{digest}".strip("-")
