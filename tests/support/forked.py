"""Processes that start at once: children of a server that has imported everything already."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import dagster_caches

from compression_dags.paths import PROJECT

dagster_caches.install()
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


@dataclass(frozen=True)
class Done:
    """How a process ended, with the names of `subprocess.CompletedProcess`."""

    returncode: int | None
    stdout: str
    stderr: str


def server_process(target: Callable[..., None], *arguments: object):
    """A started process that calls `target`, a function of a module."""
    process = _SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def command_line(*arguments: str, environment: Mapping[str, str], code: str = "", seconds: float = 300) -> Done:
    """What `compression-dags` says and how it ends, in the project's folder and with this environment alone.

    Args:
        code: what runs instead of the command line, with `arguments` in `sys.argv[1:]`.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [str(Path(folder) / name) for name in ("out", "err")]
        process = server_process(_main, said, dict(environment), code, arguments)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{arguments} after {seconds} s: {Path(said[1]).read_text()[-2000:]}")
        return Done(process.exitcode, *(Path(path).read_text() for path in said))


def _main(said: list[str], environment: dict[str, str], code: str, arguments: tuple[str, ...]) -> None:
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    be_a_command()
    if code:
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        return
    from compression_dags.cli.main import main

    main(list(arguments))


def be_a_command() -> None:
    """Make a child of the server like a process that a person started."""
    import torch

    # the server has imported torch already: the variable says nothing to this process
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.chdir(PROJECT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


def logged(log: str, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    """The command line in a child of the server, all that it says appended to `log` at once."""
    os.environ.update(environment)
    be_a_command()
    from compression_dags.cli.main import main

    with Path(log).open("a", buffering=1) as said, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        main(list(arguments))
