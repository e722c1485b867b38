"""What every recipe stage has in common: options that refuse unknown keys, a version, a check before compute.

A method is a pydantic class. Its fields are what a recipe may set, its docstring is what `compression-dags methods`
prints. Its `version` enters the fingerprint of everything it makes. It imports no torch: the worker that it names does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from compression_dags.architectures import ModelShape
from compression_dags.heartbeat import tracked
from compression_dags.options import Options
from compression_dags.step import Chain, Kind, Step, worker

T = TypeVar("T")
#: What a calibrated method needs of its inputs x: nothing, the mean of x² a channel, Σ x xᵀ, max |x| a channel, or the
#: last two.
StatisticKind = Literal["none", "mean_square", "hessian", "peak", "hessian_peak"]
#: Whose outputs changed weights should give: those of the same weights on the same, already changed inputs; the dense
#: model's; or such that the residual stream after them is the dense model's.
Target = Literal["own", "dense", "residual"]


class Progress(Protocol):
    """Wraps an iterable to show progress; `silent` shows nothing."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    return items


def bar(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A live bar on standard error when that is a terminal, a line a minute otherwise."""
    return tracked(items, description, total)


class Named(Protocol):
    """Options that name who carries them out."""

    implementation: ClassVar[str]


def implementation(options: Named) -> Callable[..., Any]:
    """The function that carries out a method, imported only now: options are read without torch, workers import it."""
    return worker(options.implementation)


class Stage(Options):
    """Options of one method. Subclasses set `stage`, `version`, the `method` literal, and who carries it out.

    `implementation` is `module:function`; its first argument is the stage. A method that needs no torch has none, and
    defines what it does itself.
    """

    stage: ClassVar[str]
    version: ClassVar[str]
    implementation: ClassVar[str] = ""
    kinds: ClassVar[tuple[Kind, ...]]
    """The artifacts that stages of this sort make, in order."""
    method: str

    def check(self, shape: ModelShape) -> None:
        """Refuse what cannot work on this model, before any compute.

        Raises:
            InputError: naming the option, its value and what is allowed.
        """

    def steps(self, chain: Chain) -> tuple[Step, ...]:
        """The artifacts that this stage makes, in order; the last one holds its weights."""
        raise AssertionError(f"{type(self).__name__} must define steps")

    @property
    def versions(self) -> dict[str, str]:
        """Method → version, of every method that this stage runs; its own first."""
        return {f"{self.stage}: {self.method}": self.version}

    @property
    def code_version(self) -> str:
        """The versions of all methods that this stage runs, as they enter fingerprints."""
        return ".".join(self.versions.values())

    def check_tokens(self, shape: ModelShape, sequences: int, length: int) -> None:
        """Refuse a calibration set that is too small, before any compute.

        Raises:
            InputError: with the count, the need and the remedy.
        """

    def options(self) -> dict[str, Any]:
        """All options, defaults included, as they enter the fingerprint."""
        return self.model_dump(mode="json")
