"""A home's Dagster instance as the command line opens it, and runs of assets in this process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.execution.plan.objects import ErrorSource
from dagster._core.utils import make_new_run_id

from compression_dags import failures
from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.assets.registration import register_home
from compression_dags.cli.lines import configure_logging
from compression_dags.failures import WorkFailed
from compression_dags.recipes import load_recipes
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.home import prepare_instance, running, working
from compression_dags.resources.instance import closed, opened
from compression_dags.resources.model_hub import ModelHub

if TYPE_CHECKING:
    from compression_dags.definitions import Settings

#: The daemon of a UI on this home neither ends such a run after a day nor starts it again: this process sees to both.
RUN_TAGS = {"dagster/max_runtime": "0", "dagster/max_retries": "0"}


def reap_runs(home: Path) -> None:
    """Mark runs whose process is gone as failed, before a UI shows them at work for ever."""
    configure_logging()
    os.environ["DAGSTER_HOME"] = str(prepare_instance(home))
    with opened(home):
        pass


@contextlib.contextmanager
def prepared_ui(home: Path, read_only: bool) -> Iterator[Callable[[], None]]:
    """What a UI needs of a home: dead runs are marked, its base models and recipes become partitions (if it may write).

    Returns:
        What waits until the partitions are known. A home's first start stores and reports every recipe, beside which
        the code server can start.

    Raises:
        InputError: the recipes folder cannot be read.
    """
    if read_only:
        reap_runs(home)
        yield lambda: None
        return
    configure_logging()
    load_recipes()  # refuses a folder before anything is started
    os.environ["DAGSTER_HOME"] = str(prepare_instance(home))
    with working(home), opened(home) as instance:  # opening marks the dead runs
        ended: Future[Any] = Future()

        def register() -> None:
            try:
                ended.set_result(register_home(instance, ArtifactStore(home=str(home)), ModelHub(home=str(home))))
            except BaseException as error:  # whoever waits is told
                ended.set_exception(error)

        # a daemon thread: Ctrl-C need not wait, and what was not registered comes with the next start
        threading.Thread(target=register, daemon=True).start()

        def wait() -> None:
            ended.result()

        yield wait


@contextlib.contextmanager
def session(settings: Settings, base_model: str) -> Iterator[dg.DagsterInstance]:
    """The instance of a home with a base model's partition; the home is shared meanwhile, so that nothing is pruned."""
    os.environ["DAGSTER_HOME"] = str(prepare_instance(settings.home))
    with working(settings.home), opened(settings.home, BASE_MODELS.name or "", base_model) as instance:
        yield instance


def execute(
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    partition: str,
    assets: Sequence[str],
    settings: Settings,
) -> dict[str, dict[str, Any]]:
    """Asset → metadata of each materialization of one run.

    Raises:
        InputError: an asset refused what it was given.
        WorkFailed: an asset failed; what finished before is stored.
        KeyboardInterrupt: the run was interrupted.
    """
    run_id = make_new_run_id()
    with running(settings.home, run_id), closed(instance, run_id):
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            run_id=run_id,
            partition_key=partition,
            asset_selection=[dg.AssetKey(name) for name in assets],
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            tags=RUN_TAGS,
        )
    if not result.success:
        _raise_first_failure(result, partition)
    return {
        e.asset_key.to_user_string(): {name: value.value for name, value in e.materialization.metadata.items()}
        for e in result.all_events
        if e.is_step_materialization and e.asset_key is not None
    }


def _raise_first_failure(result: dg.ExecuteInProcessResult, partition: str) -> None:
    if _interrupted(result):
        raise KeyboardInterrupt
    for event in result.all_events:
        if event.is_step_failure:
            whole = error = event.step_failure_data.error
            chain: list[tuple[str, str]] = []  # outermost first
            while error is not None:
                chain.append((error.cls_name or "", error.message))
                error = error.cause
            if failures.debugging() and whole is not None:
                print(whole.to_string(), file=sys.stderr)
            raise failures.explain_step(f"{event.step_key} {partition}", chain, result.run_id)
    raise WorkFailed(f"run {result.run_id} failed without a failed step")


def _interrupted(result: dg.ExecuteInProcessResult) -> bool:
    """Whether Ctrl-C or SIGTERM ended the run: Dagster turns both into an event."""
    ends = [e.job_failure_data.error for e in result.all_events if e.is_job_failure]
    named = any(error and error.cls_name in {"DagsterExecutionInterruptedError", "KeyboardInterrupt"} for error in ends)
    sources = [e.step_failure_data.error_source for e in result.all_events if e.is_step_failure]
    return named or ErrorSource.INTERRUPT in sources
