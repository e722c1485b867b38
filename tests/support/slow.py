"""Which cases of a test the default run takes: a few that differ most, the others with `-m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(*chosen: Any, of: Iterable[Any]) -> list[Any]:
    """The cases `of` a test; those that are not `chosen` are marked `slow`. A tuple is a case of several arguments."""
    cases = list(of)
    assert set(chosen) <= set(cases), (chosen, cases)
    return [_case(case, () if case in chosen else pytest.mark.slow) for case in cases]


def _case(case: Any, marks: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
