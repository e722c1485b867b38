"""The two ways a run can end badly, and what each means for the caller."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Something the user gave cannot be used. Raised before compute where it can be known; the CLI exits 2.

    The message names the thing, its value and what is allowed, in one line.
    """


class IntegrityError(RuntimeError):
    """A result failed a gate (non-finite, does not reload, logits differ). The CLI exits 1 and nothing is published."""


_NOT_FINITE = re.compile(r"\b(not|non)[- ]finite|no .* is finite|overflow", re.IGNORECASE)
_REMEDIES = {
    "float16": "computed in float16, which ends at 65504; try --dtype bfloat16 or --dtype float32",
    "bfloat16": "computed in bfloat16; try --dtype float32",
    "float32": "computed in float32: a weight or an earlier step is at fault, not the dtype",
}


def naming_dtype(error: InputError | IntegrityError, dtype: str | None) -> InputError | IntegrityError:
    """The error with the compute dtype and the remedy in its text, if it is about values that are not finite."""
    text = str(error)
    if dtype not in _REMEDIES or "--dtype" in text or not _NOT_FINITE.search(text):
        return error
    return type(error)(f"{text} ({_REMEDIES[dtype]})")
