"""What every recipe stage has in common: options that refuse unknown keys, a version, a check before compute.

A method is a pydantic class: its fields are what a recipe may set, its docstring is what `compression-dags methods`
prints, its `version` enters the fingerprint of everything it makes. Method modules import no torch at the top.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from compression_dags.architectures import StackFacts

T = TypeVar("T")
#: What a calibrated method needs of its inputs x: nothing, the mean of x² a channel, Σ x xᵀ, max |x| a channel, or the
#: last two.
StatisticKind = Literal["none", "mean_square", "hessian", "peak", "hessian_peak"]
#: Whose outputs changed weights should give: those of the same weights on the same, already changed inputs; the dense
#: model's; or such that the residual stream after them is the dense model's.
Follows = Literal["own", "dense", "residual"]


class Track(Protocol):
    """Wraps an iterable to show progress; `silent` shows nothing."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    return items


def bar(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A live bar on standard error when that is a terminal, nothing otherwise."""
    from tqdm import tqdm

    return tqdm(items, desc=description, total=total, disable=None, leave=False, dynamic_ncols=True)


class Stage(BaseModel):
    """Options of one method. Subclasses set `stage`, `version` and the `method` literal."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    stage: ClassVar[str]
    version: ClassVar[str]
    method: str

    def check(self, facts: StackFacts) -> None:
        """Refuse what cannot work on this model, before any compute.

        Raises:
            InputError: naming the option, its value and what is allowed.
        """

    def options(self) -> dict[str, Any]:
        """All options, defaults included, as they enter the fingerprint."""
        return self.model_dump(mode="json")
