"""Run recipes through Dagster in this process (the CLI's run verbs), and show what came out."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags import failures
from compression_dags.errors import InputError
from compression_dags.failures import WorkFailed
from compression_dags.paths import PROJECT
from compression_dags.provenance.escaping import visible
from compression_dags.recipes import BASELINE, Recipe, load_recipes, pick_recipes, recipes_folder
from compression_dags.statefile import replace_text

if TYPE_CHECKING:
    import dagster as dg

    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.definitions import Graph, Settings
    from compression_dags.evaluation.tasks import TaskBook
    from compression_dags.provenance.artifacts import Artifact
    from compression_dags.resources.artifact_store import ArtifactStore, Produced
    from compression_dags.resources.model_hub import ModelSource

#: The daemon of a UI on this home neither ends such a run after a day nor starts it again: this process sees to both.
RUN_TAGS = {"dagster/max_runtime": "0", "dagster/max_retries": "0"}


#: Where the template of `dagster.yaml` finds its database, if it has one.
POSTGRES_URL = "DAGSTER_POSTGRES_URL"


@dataclass(frozen=True)
class Outcome:
    """What a run of recipes on one model came to."""

    slug: str
    home: Path
    base: Artifact
    weights: dict[str, Artifact]
    cards: dict[str, dict[str, Any]]
    assets: dict[str, dict[str, dict[str, Any]]]
    report: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that `run --json` prints; its keys are stable."""
        size = {key: self.base.facts[key] for key in ("bytes", "layers")}
        base = {"name": self.base.facts["origin"], "slug": self.slug, "params": self.base.facts["parameters"], **size}
        return {
            "base_model": base,
            "baseline": {"scores": self.cards[BASELINE]["scores"]},
            "recipes": {
                name: {
                    "checkpoint": str(self.weights[name].checkpoint),
                    "layers": card["layers"],
                    "params": card["parameters"],
                    "bytes": card["bytes"],
                    "scores": card["scores"],
                    "assets": self.assets[name],
                }
                for name, card in self.cards.items()
                if name != BASELINE
            },
        }

    def scoreboard(self) -> str:
        from compression_dags.reports.scorecard import scoreboard

        hits = {name: self._hits(name) for name in self.cards}
        return scoreboard(self.slug, list(self.cards.values()), hits)

    def _hits(self, name: str) -> str:
        states = [a["cache"] for a in self.assets[name].values()]
        return f"{states.count('hit')}/{len(states)}"

    def closing(self) -> str:
        ui = "./run compression-dags ui" if (Path.cwd() / "run").is_file() else "compression-dags ui"
        home = "" if self.home == Path.cwd() / ".compression_dags" else f" --home {self.home}"
        return f"report: {self.report}\nopen the UI: {ui}{home}   ({self.seconds:.0f} s)"


def prepare_instance(home: Path) -> Path:
    """The Dagster home below `home`, with the template of `dagster.yaml` (telemetry and pop-ups off).

    A URL of a Postgres database gets the driver that dagster-postgres is written for: SQLAlchemy 2.1 takes another.
    """
    file, template = home / "dagster" / "dagster.yaml", (PROJECT / "dagster.yaml").read_text(encoding="utf-8")
    held = file.read_text(encoding="utf-8") if file.is_file() else ""
    if held != template and template.startswith(held):  # none yet, or a copy that was cut off
        replace_text(file, template)
    if url := os.environ.get(POSTGRES_URL):
        os.environ[POSTGRES_URL] = re.sub("^postgres(ql)?://", "postgresql+psycopg2://", url)
    return file.parent


def run_recipes(
    model: str,
    names: list[str],
    settings: Settings,
    *,
    tasks: str | None = None,
    name: str | None = None,
    calibration: dict[str, int] | None = None,
) -> Outcome:
    """Check everything that can be checked, then materialize what is missing.

    Raises:
        InputError: anything the user gave that cannot work, before compute where that can be known.
        WorkFailed: a stage failed; what finished before is stored.
    """
    start = time.monotonic()
    configure_logging()
    recipes = load_recipes()
    chosen = pick_recipes(recipes, names)
    if calibration:
        changed = {r.name: replace(r, calibration=_changed(r, calibration)) for r in chosen}
        recipes |= changed
        chosen = list(changed.values())
    for recipe in chosen:
        recipe.check_texts()

    from compression_dags.definitions import build_graph
    from compression_dags.evaluation.added import added_tasks, asked_tasks, remember
    from compression_dags.evaluation.tasks import evaluation_book
    from compression_dags.resources.evaluator import Evaluator

    book = evaluation_book(recipes_folder())
    extra = added_tasks(settings.home, book)
    folders = Evaluator(data_dirs=settings.eval_data).folders
    asked = None if tasks is None else asked_tasks(tasks, book, extra, folders)
    for recipe in chosen:
        book.check_harness(recipe.evaluate, folders)
    source = resolve(model, settings, name)
    check_model(source, chosen, settings)
    if asked is None:
        wanted = _wanted_tasks(book, source.slug, chosen, folders)
    else:
        wanted = [task.name for task in asked]
        remember(settings.home, asked, book)
        extra = list({task.name: task for task in (*extra, *asked)}.values())
    graph = build_graph(recipes, book, settings, extra)
    for recipe in chosen:
        if recipe.name not in graph.families:
            raise InputError(f"recipe {recipe.name}: another recipe calls another text by the name of one of its tasks")
    base = admit(source, settings)
    result = execute(graph.definitions, source.slug, graph.keys([r.name for r in chosen], wanted), settings)
    return _outcome(graph, source.slug, chosen, wanted, result, settings, time.monotonic() - start, base)


def add_model(model: str, settings: Settings, name: str | None) -> Artifact:
    """Import one base model, and register it when it has passed."""
    configure_logging()
    source = resolve(model, settings, name)
    check_model(source, [], settings)
    admit(source, settings)
    from compression_dags.assets.base_models import base_model
    from compression_dags.definitions import build_graph
    from compression_dags.evaluation.tasks import evaluation_book

    graph = build_graph({}, evaluation_book(recipes_folder()), settings)
    execute(graph.definitions, source.slug, [base_model.key], settings)
    return recall(settings, base_model.key, source.slug)


def configure_logging() -> None:
    """One line an asset on standard error; Dagster's own chatter and library warnings stay in its event log."""
    logging.getLogger().handlers.clear()
    warnings.filterwarnings("ignore", message=".*(beta|preview|superseded).*")
    ours = logging.getLogger("compression_dags")
    ours.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours say for themselves when they show
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _Visible(logging.Formatter):
    """Messages in which foreign text cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _changed(recipe: Recipe, values: dict[str, int]):
    return recipe.calibration.model_copy(update=values)


def resolve(model: str, settings: Settings, name: str | None) -> ModelSource:
    """What MODEL means, after a check of its name and headers; nothing is registered."""
    from compression_dags.resources.artifact_store import ArtifactStore
    from compression_dags.resources.model_hub import ModelHub

    ArtifactStore(home=str(settings.home)).ensure_writable()
    hub = ModelHub(home=str(settings.home))
    source = hub.resolve(model, name)
    hub.check(source)
    return source


def stored_model(source: ModelSource, settings: Settings) -> Checkpoint:
    """The checkpoint whose headers tell what fits: a directory as it lies, others imported first if they were not."""
    from compression_dags.assets.base_models import base_model
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.resources.artifact_store import ArtifactStore
    from compression_dags.resources.model_imports import is_gone

    if source.kind in {"embedded", "directory"}:
        copy = ArtifactStore(home=str(settings.home)).recall(base_model.key, source.slug) if is_gone(source) else None
        return Checkpoint(copy.checkpoint if copy else source.location)
    return Checkpoint(admit(source, settings).artifact.checkpoint)


def admit(source: ModelSource, settings: Settings) -> Produced:
    """Import the model if its files are new, then register it: what is refused leaves no trace."""
    from compression_dags.assets.base_models import import_base_model
    from compression_dags.resources.artifact_store import ArtifactStore
    from compression_dags.resources.model_hub import ModelHub

    home = str(settings.home)
    produced = import_base_model(ArtifactStore(home=home), ModelHub(home=home), source)
    for note in () if produced.hit else produced.artifact.facts.get("notes", ()):
        logging.getLogger("compression_dags").info("note: %s", note)
    return produced


def check_model(source: ModelSource, recipes: list[Recipe], settings: Settings) -> None:
    """Architecture, recipes, device and disk, from the model's headers, before any compute."""
    from compression_dags.resources.accelerator import Accelerator
    from compression_dags.resources.artifact_store import ArtifactStore

    Accelerator(home=str(settings.home), device=settings.device, dtype=settings.dtype).check()
    if source.kind not in {"embedded", "directory"} and not recipes:
        return  # not downloaded yet: `base_model` checks it
    checkpoint = stored_model(source, settings)
    for recipe in recipes:
        recipe.check(checkpoint.stated_shape)
    store = ArtifactStore(home=str(settings.home))
    missing = [n for n in ("base_model", *(f"{r.slug}/scorecard" for r in recipes)) if not _stored(store, n, source)]
    store.ensure_writable(checkpoint.nbytes * len(missing))


def _stored(store: ArtifactStore, key: str, source: ModelSource) -> bool:
    """Whether an asset of the model was made before, and with it whatever it is made of."""
    import dagster as dg

    return store.recall(dg.AssetKey(key.split("/")), source.slug) is not None


def _wanted_tasks(book: TaskBook, slug: str, recipes: list[Recipe], folders: list[Path]) -> list[str]:
    """Names of the tasks to score: the recipes' own, else the model's default suite."""
    default = book.default_names(slug)
    names = [t for r in recipes for t in (r.evaluate or default)] or default
    book.check_harness(names, folders)
    return list(dict.fromkeys(task.name for task in book.resolve(names)))


def reap_runs(home: Path) -> None:
    """Mark runs whose process is gone as failed, before a UI shows them at work for ever."""
    from compression_dags.resources.instance import opened

    configure_logging()
    os.environ["DAGSTER_HOME"] = str(prepare_instance(home))
    with opened(home):
        pass


def execute(
    definitions: dg.Definitions, slug: str, keys: list[dg.AssetKey], settings: Settings
) -> dg.ExecuteInProcessResult:
    from dagster._core.utils import make_new_run_id

    from compression_dags.assets.base_models import base_models
    from compression_dags.cli.estimate import announce
    from compression_dags.resources.home import running, working
    from compression_dags.resources.instance import closed, opened

    announce(definitions, slug, keys, settings)
    os.environ["DAGSTER_HOME"] = str(prepare_instance(settings.home))
    run_id = make_new_run_id()
    with (
        working(settings.home),
        opened(settings.home, base_models.name or "", slug) as instance,
        running(settings.home, run_id),
        closed(instance, run_id),
    ):
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            run_id=run_id,
            partition_key=slug,
            asset_selection=keys,
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            tags=RUN_TAGS,
        )
    if not result.success:
        _raise_first_failure(result)
    return result


def _raise_first_failure(result: dg.ExecuteInProcessResult) -> None:
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
            raise failures.explain_step(str(event.step_key), chain, result.run_id)
    raise WorkFailed(f"run {result.run_id} failed without a failed step")


def _interrupted(result: dg.ExecuteInProcessResult) -> bool:
    """Whether Ctrl-C or SIGTERM ended the run: Dagster turns both into an event."""
    from dagster._core.execution.plan.objects import ErrorSource

    ends = [e.job_failure_data.error for e in result.all_events if e.is_job_failure]
    named = any(error and error.cls_name in {"DagsterExecutionInterruptedError", "KeyboardInterrupt"} for error in ends)
    sources = [e.step_failure_data.error_source for e in result.all_events if e.is_step_failure]
    return named or ErrorSource.INTERRUPT in sources


def recall(settings: Settings, key: dg.AssetKey, slug: str) -> Artifact:
    from compression_dags.resources.artifact_store import ArtifactStore

    found = ArtifactStore(home=str(settings.home)).recall(key, slug)
    if found is None:
        raise WorkFailed(f"{key.to_user_string()} of {slug} is missing from the store after the run")
    return found


def _outcome(
    graph: Graph, slug: str, recipes: list[Recipe], tasks: list[str], result, settings, seconds, imported: Produced
) -> Outcome:
    import dagster as dg

    events = {
        e.asset_key: {k: e.materialization.metadata[k].value for k in ("cache", "seconds", "fingerprint")}
        for e in result.all_events
        if e.is_step_materialization and e.asset_key is not None
    }
    if not imported.hit:  # it was made before the run, in which it is a hit
        events[dg.AssetKey("base_model")] |= {"cache": "computed", "seconds": round(imported.seconds, 3)}
    names = [BASELINE, *(r.name for r in recipes)]
    families = {name: graph.families[name] for name in names}
    cards = {
        name: json.loads((recall(settings, f.scorecard, slug).path / "scorecard.json").read_text()) | {"family": name}
        for name, f in families.items()
    }
    assets = {
        name: {key.to_user_string(): events[key] for key in f.keys(tasks) if key in events}
        for name, f in families.items()
    }
    board = recall(settings, graph.SUMMARY[0], slug)
    report = settings.home / "reports" / f"{slug}.html"
    report.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(board.path / "report.html", report)
    weights = {name: recall(settings, f.weights, slug) for name, f in families.items()}
    base = recall(settings, graph.families[BASELINE].weights, slug)
    return Outcome(slug, settings.home, base, weights, cards, assets, report, seconds)
