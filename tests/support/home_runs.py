"""The command line in processes that start at once: children of a server that has imported everything already."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg

from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.assets.publishing import GPU_POOL
from compression_dags.cli.session import execute, prepare_instance, session
from compression_dags.definitions import Settings
from compression_dags.paths import PROJECT

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "accelerate",
        "compressed_tensors.linear.compressed_linear",
        "compressed_tensors.quantization",
        "compression_dags.calibration.workers",
        "compression_dags.cli.main",
        "compression_dags.cli.run",
        "compression_dags.definitions",
        "compression_dags.depth.workers",
        "compression_dags.evaluation.harness",
        "compression_dags.evaluation.perplexity",
        "compression_dags.quantization.workers",
        "compression_dags.recovery.workers",
        "compression_dags.similarity.workers",
        "compression_dags.sparsity.workers",
        "dagster._core.execution.execute_in_process",
        "dagster._core.executor.in_process",
        "dagster._core.storage.local_compute_log_manager",
        "dagster._core.storage.root",
        "dagster._core.storage.sqlite_storage",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "pandas",
        "pyarrow.dataset",
        "pyarrow.parquet",
        "scipy.stats",
        "sympy",
        "upath.implementations.local",
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


def server_process(target: Callable[..., None], *arguments: object):
    """A started process that calls `target`, a function of a module."""
    process = _SERVER.Process(target=target, args=arguments)
    process.start()
    return process


class Run:
    """One `compression-dags` process on `desk/home`; what it says on standard error goes to `log`."""

    def __init__(self, desk: Path, home: str, *arguments: str):
        self.log = desk / f"log-{time.monotonic_ns()}"
        self.log.touch()
        wanted = (*arguments, "--home", str(desk / home))
        self.process = server_process(_main, str(desk / "recipes"), str(self.log), wanted)

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
        assert self.process.pid
        os.kill(self.process.pid, number)
        return self

    def ends(self, seconds: float = 300) -> int | None:
        """Exit code; negative for a signal."""
        self.process.join(seconds)
        assert not self.process.is_alive(), "still running:\n" + self.said()[-2000:]
        return self.process.exitcode


def _main(recipes: str, log: str, arguments: tuple[str, ...]) -> None:
    import torch

    os.environ.update(COMPRESSION_DAGS_RECIPES=recipes, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)  # the server has imported it already: the variable says nothing to this process
    os.chdir(PROJECT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    from compression_dags.cli.main import main

    with Path(log).open("a", buffering=1) as said, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        main(list(arguments))


def pooled(home: Path, body: Callable[[], None] = lambda: None) -> dg.Definitions:
    """One asset in the pool `gpu` that calls `body`."""

    @dg.asset(partitions_def=BASE_MODELS, pool=GPU_POOL, required_resource_keys={"store"})
    def thing() -> None:
        body()

    return dg.Definitions(assets=[thing], resources=Settings(home).resources(), executor=dg.in_process_executor)


def run_pooled(home: Path, body: Callable[[], None] = lambda: None) -> None:
    """Run that asset as the command line runs one."""
    settings = Settings(home)
    with session(settings, "m") as instance:
        execute(instance, pooled(home, body), "m", ["thing"], settings)


def hang_in_pool(home: Path, marker: Path, old: bool) -> None:
    """Reach the inside of a pooled asset, make `marker`, and stay there. `old`: a run without lock, with a slot."""

    def body() -> None:
        marker.touch()
        time.sleep(600)

    if not old:
        run_pooled(home, body)
    os.environ["DAGSTER_HOME"] = str(prepare_instance(home))
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions(BASE_MODELS.name or "", ["m"])
        job = pooled(home, body).resolve_implicit_global_asset_job_def()
        job.execute_in_process(instance=instance, partition_key="m")
