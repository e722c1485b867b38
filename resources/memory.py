"""Peak memory of one piece of work: what this process held meanwhile, and what the devices that it leased held."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
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


#: Of each lease that is held: how its device's peak is read, in MiB, and how it is forgotten.
_leases: list[tuple[Callable[[], float], Callable[[], None]]] = []


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Peaks of the body, complete when it has ended; the bodies that enclose it count them too.

    Where the kernel does not let a process forget its high-water mark, `host_mb` is the peak since the process began.
    """
    around = _measured.get()
    _count_peaks(around)
    _forget_peaks()
    own = PeakMemory()
    token = _measured.set((*around, own))
    try:
        yield own
    finally:
        _measured.reset(token)
        _count_peaks((*around, own))


@contextlib.contextmanager
def device_peaks(read: Callable[[], float], forget: Callable[[], None]) -> Iterator[None]:
    """Count a device's memory for whatever is measured while the body holds it, around the body or within it.

    Args:
        read: the device's peak since it was last forgotten, in MiB.
    """
    lease = (read, forget)
    forget()
    _leases.append(lease)
    try:
        yield
    finally:
        _leases.remove(lease)
        _count_device(read, _measured.get())


def _count_peaks(measured: tuple[PeakMemory, ...]) -> None:
    _host_peak(measured)
    for read, _ in _leases:
        _count_device(read, measured)


def _count_device(read: Callable[[], float], measured: tuple[PeakMemory, ...]) -> None:
    megabytes = read()
    for peak in measured:
        peak.device_mb = max(peak.device_mb, megabytes)


def _forget_peaks() -> None:
    _forget_high_water()
    for _, forget in _leases:
        forget()


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
