"""Runs on a home that a test can signal and wait for."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
from forked import logged, server_process

from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.assets.publishing import GPU_POOL
from compression_dags.cli.session import execute, session
from compression_dags.definitions import Settings
from compression_dags.resources.home import prepare_instance

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
        environment = {"COMPRESSION_DAGS_RECIPES": str(desk / "recipes"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = server_process(logged, str(self.log), environment, wanted)

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
