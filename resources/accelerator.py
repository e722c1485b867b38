"""The device that computes: which one, in what dtype, and a lease on it that the kernel frees when a process dies."""

import contextlib
import fcntl
import functools
import importlib.metadata
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from compression_dags.errors import InputError
from compression_dags.resources.memory import device_peaks

logger = logging.getLogger("compression_dags")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|cpu|cuda(:(?P<index>[0-9]+))?")


@dataclass(frozen=True)
class Device:
    """A leased device: torch's name for it and the compute dtype."""

    name: str
    dtype: str


class Accelerator(dg.ConfigurableResource):
    """Chooses the device. `auto`: the first free CUDA device if torch has CUDA, else the CPU.

    Dagster's `pool="gpu"` limits the queue; this lease decides who computes on which device.
    """

    home: str
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse unknown settings before anything runs.

        Raises:
            InputError: naming the setting and what is allowed.
        """
        if not _DEVICE.fullmatch(self.device):
            raise InputError(f"device {self.device!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
        if self.device.startswith("cuda") and not _cuda_visible():
            raise InputError(f"device {self.device!r} asked for, but this machine shows no CUDA device to torch")
        if ":" in self.device:
            self._indices()

    @property
    def kind(self) -> str:
        """cpu or cuda, decided without importing torch, so that a cache hit stays cheap."""
        return "cuda" if self.device.startswith("cuda") or (self.device == "auto" and _cuda_visible()) else "cpu"

    @property
    def compute_dtype(self) -> str:
        return self.dtype if self.dtype != "auto" else ("bfloat16" if self.kind == "cuda" else "float32")

    @property
    def numeric(self) -> dict[str, str]:
        """What enters fingerprints of computed results."""
        return {"device": self.kind, "dtype": self.compute_dtype}

    def _indices(self) -> Sequence[int]:
        """The CUDA devices that may be leased, in the order in which they are tried.

        Raises:
            InputError: torch can use none, or not the one that was asked for.
        """
        import torch  # noqa: PLC0415 - definitions load without it

        if not torch.cuda.is_available():
            raise InputError("a CUDA device is present but torch cannot use it; run with --device cpu")
        count = torch.cuda.device_count()
        found = _DEVICE.fullmatch(self.device)
        if found is None or found["index"] is None:
            return range(count)
        index = int(found["index"])
        if index >= count:
            raise InputError(f"device {self.device!r} asked for, but torch sees {count}: cuda:0 to cuda:{count - 1}")
        return (index,)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Device]:
        """Hold a device while computing; waits for a free one, and says so. It is torch's current device meanwhile."""
        if self.kind == "cpu":
            yield Device("cpu", self.compute_dtype)
            return
        import torch  # noqa: PLC0415 - definitions load without it

        with _first_free(Path(self.home) / "locks", self._indices()) as index:
            torch.cuda.init()  # a fresh process has no statistics to reset before this
            with torch.cuda.device(index):  # Triton and plain events go to the current device
                read, forget = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
                try:
                    with device_peaks(lambda: read(index) / 2**20, lambda: forget(index)):
                        yield Device(f"cuda:{index}", self.compute_dtype)
                finally:
                    torch.cuda.empty_cache()


#: Without the cache it reads the package's metadata anew each time.
_version = functools.cache(importlib.metadata.version)


def _cuda_visible() -> bool:
    build = _version("torch")
    return "+cpu" not in build and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and os.path.exists("/dev/nvidiactl")


@contextlib.contextmanager
def _first_free(folder: Path, indices: Sequence[int]) -> Iterator[int]:
    """The first device whose lock is free; waits for one. Says once for which, and which process holds each."""
    folder.mkdir(parents=True, exist_ok=True)
    said = False
    while True:
        holders: list[str] = []
        for index in indices:
            path = folder / f"cuda-{index}.lock"
            with path.open("a+") as lock:  # not "w": a waiting process must not wipe out the holder's id
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holders.append(f"cuda:{index} is held by process {_holder(path)} ({path})")
                    continue
                except OSError as error:
                    raise InputError(f"{path} cannot be locked ({error.strerror}); choose another --home") from None
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                yield index
                return
        if not said:
            logger.info("waiting for a device: %s", "; ".join(holders))
            said = True
        time.sleep(1.0)


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
