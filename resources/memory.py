"""Peak memory of one piece of work: what this process held meanwhile, and what the devices that it leased held."""

import contextlib
import resource
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

_PROCESS = Path("/proc/self")


@dataclass
class PeakMemory:
    """Highest resident memory of the process and highest allocation on a leased device, both in MiB."""

    host_mb: float = 0.0
    device_mb: float = 0.0


_measured: ContextVar[tuple[PeakMemory, ...]] = ContextVar("measured", default=())


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Peaks of the body, complete when it has ended; the bodies that enclose it count them too.

    Where the kernel does not let a process forget its high-water mark, `host_mb` is the peak since the process began.
    """
    around = _measured.get()
    _host_peak(around)
    _forget_high_water()
    own = PeakMemory()
    token = _measured.set((*around, own))
    try:
        yield own
    finally:
        _measured.reset(token)
        _host_peak((*around, own))


def device_peak(megabytes: float) -> None:
    """Count the peak of a lease that ends now, in MiB, for every body that is measured."""
    for peak in _measured.get():
        peak.device_mb = max(peak.device_mb, megabytes)


def _host_peak(measured: tuple[PeakMemory, ...]) -> None:
    megabytes = _high_water()
    for peak in measured:
        peak.host_mb = max(peak.host_mb, megabytes)


def _high_water() -> float:
    with contextlib.suppress(OSError, StopIteration):
        lines = (_PROCESS / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _forget_high_water() -> None:
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")
