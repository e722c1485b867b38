"""The command line in processes that start at once: children of a server that has imported everything already."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compression_dags.paths import PROJECT

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "accelerate",
        "compressed_tensors.quantization",
        "compression_dags.cli_run",
        "compression_dags.definitions",
        "dagster._core.storage.sqlite_storage",
        "matplotlib.figure",
        "pandas",
        "pyarrow.parquet",
        "scipy.stats",
        "sympy",
        "transformers.models.llama.modeling_llama",
        __name__,
    ]
)

TEXT = "Once upon a time there was a little cat who liked to play in the garden with a red ball. " * 60
CHAIN = """name: chain
calibration: {sequences: 16, length: 64}
stages:
  - merge: {method: shortgpt, ratio: 0.20}
  - recover: {method: least-squares}
  - sparsify: {method: sparsegpt, sparsity: 0.5}
  - quantize: {method: gptq, scheme: W4A16, group_size: 16}
"""


class Run:
    """One `compression-dags` process on `desk/home`; what it says on standard error goes to `log`."""

    def __init__(self, desk: Path, home: str, *arguments: str):
        self.log = desk / f"log-{time.monotonic_ns()}"
        self.log.touch()
        wanted = (*arguments, "--home", str(desk / home))
        self.process = _SERVER.Process(target=_main, args=(str(desk / "recipes"), str(self.log), wanted))
        self.process.start()

    def said(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], object], seconds: float = 300) -> "Run":
        """Wait until something is so; the run must still be there."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), (self.process.exitcode, self.said()[-2000:])
            assert time.monotonic() < end, self.said()[-2000:]
            time.sleep(0.005)
        return self

    def signal(self, number: int) -> "Run":
        os.kill(self.process.pid or 0, number)
        return self

    def ends(self, seconds: float = 300) -> int | None:
        """Exit code; negative for a signal."""
        self.process.join(seconds)
        assert not self.process.is_alive(), "still running:\n" + self.said()[-2000:]
        return self.process.exitcode


def _main(recipes: str, log: str, arguments: tuple[str, ...]) -> None:
    os.environ.update(COMPRESSION_DAGS_RECIPES=recipes, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    os.chdir(PROJECT)
    sys.stderr = Path(log).open("a", buffering=1)
    sys.stdout = Path(os.devnull).open("w")
    from compression_dags.cli import main

    main(list(arguments))
