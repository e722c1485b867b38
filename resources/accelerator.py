"""The device that computes: which one, in what dtype, and a lease on it that the kernel frees when a process dies."""

import contextlib
import fcntl
import importlib.metadata
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from compression_dags.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        if self.device not in {"auto", "cpu", "cuda"} and not self.device.removeprefix("cuda:").isdigit():
            raise InputError(f"device {self.device!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
        if self.device.startswith("cuda") and not _cuda_visible():
            raise InputError(f"device {self.device!r} asked for, but this machine shows no CUDA device to torch")

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

    @contextlib.contextmanager
    def lease(self) -> Iterator[Device]:
        """Hold a device while computing; waits for a free one."""
        if self.kind == "cpu":
            yield Device("cpu", self.compute_dtype)
            return
        import torch

        if not torch.cuda.is_available():
            raise InputError("a CUDA device is present but torch cannot use it; run with --device cpu")
        wanted = range(torch.cuda.device_count())
        if ":" in self.device:
            wanted = range(int(self.device[5:]), int(self.device[5:]) + 1)
        with _first_free(Path(self.home) / "locks", wanted) as index:
            torch.cuda.reset_peak_memory_stats(index)
            yield Device(f"cuda:{index}", self.compute_dtype)
            torch.cuda.empty_cache()


def _cuda_visible() -> bool:
    build = importlib.metadata.version("torch")
    return "+cpu" not in build and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and os.path.exists("/dev/nvidiactl")


@contextlib.contextmanager
def _first_free(folder: Path, indices: range) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for index in indices:
            with (folder / f"cuda-{index}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                yield index
                return
        time.sleep(1.0)
