"""Run recipes through Dagster in this process, one run a recipe, and show what came out."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags.assets.base_models import import_base_model
from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import Place
from compression_dags.assets.publishing import outcome_of, report, say, state_of
from compression_dags.assets.recipe import register
from compression_dags.assets.scorecard import SCORECARD
from compression_dags.assets.selection import Planner, names_of_tasks, selection
from compression_dags.assets.standing import Hits, Standing
from compression_dags.assets.summary import LEADERBOARD, LEDGER
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.estimate import announce, foresee
from compression_dags.cli.lines import configure_logging
from compression_dags.cli.session import execute, session
from compression_dags.definitions import Settings, all_tasks, build
from compression_dags.errors import InputError
from compression_dags.evaluation.added import added_tasks, asked_tasks, remember
from compression_dags.evaluation.tasks import TaskBook, evaluation_book
from compression_dags.failures import WorkFailed
from compression_dags.recipes import BASELINE, BASELINE_RECIPE, Recipe, load_recipes, pick_recipes, recipes_folder
from compression_dags.recipes.kinds import WEIGHTS_KINDS
from compression_dags.reports.scorecard import scoreboard
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore, Produced
from compression_dags.resources.evaluator import Evaluator
from compression_dags.resources.model_hub import ModelHub, ModelSource
from compression_dags.resources.model_imports import check, is_gone
from compression_dags.step import BASE

if TYPE_CHECKING:
    import dagster as dg

    from compression_dags.provenance.artifacts import Artifact

logger = logging.getLogger("compression_dags")
#: Recipe → asset → metadata.
Made = dict[str, dict[str, dict[str, Any]]]
#: Of an asset's metadata, what `run --json` prints.
SAID = ("cache", "seconds", "fingerprint")


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
        size = {key: self.base.metadata[key] for key in ("bytes", "layers")}
        base = {
            "name": self.base.metadata["origin"],
            "slug": self.slug,
            "params": self.base.metadata["parameters"],
            **size,
        }
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
        hits = {name: self._hits(name) for name in self.cards}
        return scoreboard(self.slug, list(self.cards.values()), hits)

    def _hits(self, name: str) -> str:
        states = [a["cache"] for a in self.assets[name].values()]
        return f"{states.count('hit')}/{len(states)}"

    def closing(self) -> str:
        ui = "./run compression-dags ui" if (Path.cwd() / "run").is_file() else "compression-dags ui"
        home = "" if self.home == Path.cwd() / ".compression_dags" else f" --home {self.home}"
        return f"report: {self.report}\nopen the UI: {ui}{home}   ({self.seconds:.0f} s)"


@dataclass(frozen=True)
class Plan:
    """What a run verb asks for, after every check that needs no compute.

    Attributes:
        base: the imported model, where the checks had to import it.
    """

    source: ModelSource
    base: Produced | None
    recipes: list[Recipe]
    tasks: dict[str, list[str]]
    planner: Planner
    settings: Settings

    @functools.cached_property
    def definitions(self) -> dg.Definitions:
        """The graph, built where a run needs it."""
        return build(list(self.planner.tasks.values()), self.settings)


def run_recipes(
    model: str,
    names: list[str],
    settings: Settings,
    *,
    tasks: str | None = None,
    name: str | None = None,
    calibration: Mapping[str, int] | None = None,
) -> Outcome:
    """What a run has made: everything is checked first, then what is missing is materialized, one Dagster run a recipe.

    None is started where all of it is stored and Dagster knows so. A recipe that fails does not keep the others from
    being run, nor from the leaderboard.

    Raises:
        InputError: anything the user gave that cannot work, before compute where that can be known.
        WorkFailed: a stage failed; what finished before is stored.
    """
    start = time.monotonic()
    configure_logging()
    given = dict(calibration or {})
    chosen = [
        r.with_calibration(given.get("sequences"), given.get("length")) for r in pick_recipes(load_recipes(), names)
    ]
    plan = _planned(model, chosen, settings, tasks, name)
    base = plan.base or admit(plan.source, settings)
    announce(lambda: foresee(plan, base.artifact))
    with session(settings, plan.source.slug) as instance:
        report(instance, BASE, {plan.source.slug: base})
        register(instance, plan.planner.store, {r.name: r for r in plan.recipes})
        standing = Standing(instance, plan.planner, plan.source.slug, [recipe.name for recipe in plan.recipes])
        made, failed = _made(instance, plan, standing)
        if made:
            _summarize(instance, plan, standing)
    if failed:
        raise _failure(plan, failed)
    return _outcome(plan, base, made, time.monotonic() - start)


def _made(instance: dg.DagsterInstance, plan: Plan, standing: Standing) -> tuple[Made, dict[str, Exception]]:
    """Recipe → what its run materialized; recipe → why its run failed, which does not keep the others from theirs."""
    made: Made = {}
    failed: dict[str, Exception] = {}
    for recipe in plan.recipes:
        here, assets = Place(plan.source.slug, recipe.name), selection(recipe, plan.tasks[recipe.name])
        try:
            if hits := standing.recipe(recipe, plan.tasks[recipe.name]):
                made[recipe.name] = _said(hits, str(here))
            else:
                made[recipe.name] = execute(instance, plan.definitions, here.key, assets, plan.settings)
        except (InputError, WorkFailed) as error:
            failed[recipe.name] = error
            logger.info("%-9s %s", "failed", here)
    return made, failed


def _summarize(instance: dg.DagsterInstance, plan: Plan, standing: Standing) -> None:
    """Bring leaderboard and ledger of the base model up to date."""
    slug = plan.source.slug
    if hits := standing.summary():
        _said(hits, slug)
    else:
        execute(instance, plan.definitions, slug, [LEADERBOARD, LEDGER], plan.settings)


def _said(hits: Hits, partition: str) -> dict[str, dict[str, Any]]:
    """What a run would have given: asset → how it came, after the line that it would have logged."""
    for asset, produced in hits.items():
        say(asset, partition, produced)
    return {asset: outcome_of(produced) for asset, produced in hits.items()}


def _failure(plan: Plan, failed: Mapping[str, Exception]) -> Exception:
    """What is raised for recipes that failed: the first one's error; of others that are done, it says so."""
    (first, error), *others = failed.items()
    for name, other in others:
        logger.info("failed: %s: %s", Place(plan.source.slug, name), other)
    done = [r.name for r in plan.recipes if r.name not in {BASELINE, *failed}]
    if not done:
        return error
    said = f"{Place(plan.source.slug, first)}: {error}" if isinstance(error, InputError) else str(error)
    return WorkFailed(f"{said}; done: {', '.join(done)}")


def _planned(model: str, chosen: list[Recipe], settings: Settings, tasks: str | None, name: str | None) -> Plan:
    for recipe in chosen:
        recipe.check_texts()
    book = evaluation_book(recipes_folder())
    extra = added_tasks(settings.home, book)
    folders = Evaluator(data_dirs=settings.eval_data).folders
    asked = None if tasks is None else asked_tasks(tasks, book, extra, folders)
    for recipe in chosen:
        book.check_harness(recipe.evaluate, folders)
    source = resolve(model, settings, name)
    checkpoint, base = check_model(source, chosen, settings)
    if asked is not None:
        extra = list({task.name: task for task in (*extra, *asked)}.values())
    wanted = _wanted(book, source.slug, chosen, None if asked is None else [task.name for task in asked], folders)
    known = all_tasks(book, chosen, extra)
    _check_names(book, chosen, {task.name: task for task in known})
    plan = Plan(source, base, [BASELINE_RECIPE, *chosen], wanted, Planner(known, settings.resources()), settings)
    _check_space(plan, checkpoint.nbytes if checkpoint else 0)
    if asked is not None:
        remember(settings.home, asked, book)
    return plan


def _check_space(plan: Plan, size: int) -> None:
    """Refuse a home without room for the checkpoints that are to be made, before any compute.

    Args:
        size: bytes of the base model, which no compressed one exceeds.

    Raises:
        InputError: with the bytes free and needed.
    """
    store, slug = plan.planner.store, plan.source.slug
    base = store.recall(BASE, slug)
    foreseen = [e for r in plan.recipes for e in plan.planner.foreseen(r, plan.tasks[r.name], base, slug)]
    lacking = {each.fingerprint for each in foreseen if each.asset in WEIGHTS_KINDS and not each.stored}
    store.ensure_writable(size * (len(lacking) + (base is None)))


def _wanted(
    book: TaskBook, slug: str, recipes: Sequence[Recipe], asked: list[str] | None, folders: list[Path]
) -> dict[str, list[str]]:
    """Recipe → tasks to score: those asked for, its own, or the model's default suite; the baseline's are all."""
    if asked is None:
        book.check_harness(book.default_names(slug), folders)
    found = {r.name: asked or names_of_tasks(book, r, slug) for r in recipes}
    everything = [task for names in found.values() for task in names]
    return {BASELINE: list(dict.fromkeys(everything)), **found}


def _check_names(book: TaskBook, recipes: Sequence[Recipe], known: Mapping[str, Any]) -> None:
    for recipe in recipes:
        if any(known[task.name] != task for task in book.resolve(list(recipe.evaluate))):
            raise InputError(f"recipe {recipe.name}: another recipe calls another text by the name of one of its tasks")


def add_model(model: str, settings: Settings, name: str | None) -> Artifact:
    """Import one base model, and register it when it has passed."""
    configure_logging()
    source = resolve(model, settings, name)
    check_model(source, [], settings)
    produced = admit(source, settings)
    with session(settings, source.slug) as instance:
        report(instance, BASE, {source.slug: produced})
    return produced.artifact


def resolve(model: str, settings: Settings, name: str | None) -> ModelSource:
    """What MODEL means, after a check of its name and headers; nothing is registered."""
    ArtifactStore(home=str(settings.home)).ensure_writable()
    hub = ModelHub(home=str(settings.home))
    source = hub.resolve(model, name)
    check(hub, source)
    return source


def stored_model(source: ModelSource, settings: Settings) -> tuple[Checkpoint, Produced | None]:
    """The checkpoint whose headers tell what fits: a directory as it lies; others are imported for it."""
    if source.kind in {"embedded", "directory"}:
        copy = ArtifactStore(home=str(settings.home)).recall(BASE, source.slug) if is_gone(source) else None
        return (Checkpoint(copy.checkpoint) if copy else Checkpoint(source.location, described=False)), None
    base = admit(source, settings)
    return Checkpoint(base.artifact.checkpoint), base


def admit(source: ModelSource, settings: Settings) -> Produced:
    """Import the model if its files are new, then register it: what is refused leaves no trace."""
    home = str(settings.home)
    produced = import_base_model(ArtifactStore(home=home), ModelHub(home=home), source)
    logger.info("%-9s %s (%.1f s)", state_of(produced), f"{BASE} {source.slug}", produced.seconds)
    for note in () if produced.hit else produced.artifact.metadata.get("notes", ()):
        logger.info("note: %s", note)
    return produced


def check_model(
    source: ModelSource, recipes: list[Recipe], settings: Settings
) -> tuple[Checkpoint | None, Produced | None]:
    """Check device, architecture and recipes by the model's headers, and the disk for its copy.

    Returns:
        The model (None where it is not downloaded yet and no recipe asks), and its import where that had to come first.

    Raises:
        InputError: something cannot work; nothing was computed.
    """
    Accelerator(home=str(settings.home), device=settings.device, dtype=settings.dtype).check()
    if source.kind not in {"embedded", "directory"} and not recipes:
        return None, None
    checkpoint, base = stored_model(source, settings)
    for recipe in recipes:
        recipe.check(checkpoint.stated_shape)
    store = ArtifactStore(home=str(settings.home))
    if base is None and store.recall(BASE, source.slug) is None:
        store.ensure_writable(checkpoint.nbytes)
    return checkpoint, base


def recall(store: ArtifactStore, asset: str, partition: str) -> Artifact:
    """The artifact that a run just made.

    Raises:
        WorkFailed: it is not there.
    """
    found = store.recall(asset, partition)
    if found is None:
        raise WorkFailed(f"{asset} of {partition} is missing from the store after the run")
    return found


def _outcome(plan: Plan, base: Produced, made: Made, seconds: float) -> Outcome:
    slug, store, home = plan.source.slug, plan.planner.store, plan.settings.home
    first = {BASE: outcome_of(base)}
    assets = {
        name: {asset: {key: said[key] for key in SAID} for asset, said in {**first, **found}.items() if "cache" in said}
        for name, found in made.items()
    }
    cards = {
        name: json.loads((recall(store, SCORECARD, str(Place(slug, name))).path / "scorecard.json").read_text())
        | {"family": name}
        for name in made
    }
    report_file = home / "reports" / f"{slug}.html"
    report_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recall(store, LEADERBOARD, slug).path / "report.html", report_file)
    weights = {name: recall(store, COMPRESSED, str(Place(slug, name))) for name in made}
    return Outcome(slug, home, base.artifact, weights, cards, assets, report_file, seconds)
