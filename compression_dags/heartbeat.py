"""What a long piece of work says while it runs: a live bar on a terminal, a line a minute anywhere else.

`working_on` names the work and `tracked` counts its steps. A thread speaks for both, so that work without steps (a
download, a model that is loaded) is not silent either. Everything goes to standard error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
logger = logging.getLogger("compression_dags")
#: Seconds after which work that is not done is named, and seconds between two lines about it.
FIRST, EVERY = 10.0, 60.0


def spoken(seconds: float) -> str:
    """A duration as people say it: `40 s`, `3 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class Count:
    """Steps of one loop: how many of how many are done since `start` (seconds of the monotonic clock)."""

    description: str
    total: int | None
    start: float
    done: int = 0

    def said(self) -> str:
        return f"{self.description} {self.done}{f'/{self.total}' if self.total else ''}"

    def left(self, now: float) -> float | None:
        """Seconds to go at the pace so far; None while that is not known."""
        if not self.done or not self.total:
            return None
        return (now - self.start) * (self.total - self.done) / self.done


@dataclass
class Work:
    """A named piece of work, and the loops that it is in, the outermost first."""

    name: str
    start: float
    live: bool = False
    counts: list[Count] = field(default_factory=list)
    last: float | None = None

    def due(self, now: float) -> str | None:
        """The line to say now, if it is time for one. A live bar speaks for itself."""
        if now - self.start < FIRST or (self.last is not None and now - self.last < EVERY):
            return None
        if self.live and self.counts:
            return None
        first, self.last = self.last is None, now
        if not self.counts:
            so_far = "" if first else f" ({spoken(now - self.start)} so far)"
            return f"computing {self.name}{so_far}"
        said = ", ".join(count.said() for count in list(self.counts))
        left = self.counts[0].left(now)
        return f"computing {self.name}: {said}{'' if left is None else f', {spoken(left)} left'}"


_current: ContextVar[Work | None] = ContextVar("work", default=None)


@contextlib.contextmanager
def working_on(name: str) -> Iterator[None]:
    """Say what is worked on, if it takes longer than a few seconds, and how far it is."""
    work = Work(name, time.monotonic(), live=_terminal())
    token, stop = _current.set(work), threading.Event()
    speaker = threading.Thread(target=_speak, args=(work, stop), daemon=True, name="heartbeat")
    speaker.start()
    try:
        yield
    finally:
        stop.set()
        speaker.join()
        _current.reset(token)


def _speak(work: Work, stop: threading.Event) -> None:
    while not stop.wait(1.0):
        if line := work.due(time.monotonic()):
            logger.info("%s", line)


def tracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, one after another, counted for the line or the bar."""
    work = _current.get() or Work("", time.monotonic(), live=_terminal())
    total = len(items) if total is None and isinstance(items, Sized) else total
    count = Count(description, total, time.monotonic())
    work.counts.append(count)
    label = f"{work.name}: {description}" if work.name else description
    try:
        # `disable` is given, so that TQDM_DISABLE, which silences other libraries' bars, does not reach this one
        shown = tqdm(items, desc=label, total=total, disable=not work.live, leave=False, dynamic_ncols=True)
        for item in shown:
            yield item
            count.done += 1
    finally:
        work.counts.remove(count)


def _terminal() -> bool:
    return bool(getattr(sys.stderr, "isatty", lambda: False)())
