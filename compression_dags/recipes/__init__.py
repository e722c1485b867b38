"""Recipes: YAML files that say how to compress a model. Read and checked without Dagster and without torch."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compression_dags import yaml_reader
from compression_dags.architectures import ModelShape
from compression_dags.calibration.corpora import Calibration, check_corpus, check_size
from compression_dags.depth.stage import MergeStage
from compression_dags.errors import InputError
from compression_dags.evaluation.tasks import TaskBook
from compression_dags.paths import PROJECT, what_is
from compression_dags.planning.bounds import check_bits
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.recipes import names
from compression_dags.recipes.names import BASELINE, NAME
from compression_dags.recovery.stage import RecoverStage
from compression_dags.registry import METHODS
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import Stage

ORDER = ("merge", "recover", "sparsify", "quantize")
REPEATABLE = ("recover",)
KEYS = ("name", "description", "calibration", "stages", "evaluate")
__all__ = ["BASELINE", "NAME", "Recipe", "Recipes", "load_recipe", "load_recipes", "pick_recipes", "recipes_folder"]
logger = logging.getLogger("compression_dags")


@dataclass(frozen=True)
class Recipe:
    """One recipe, valid by construction.

    Attributes:
        name: lower-case words joined by hyphens; the asset family is `slug`, the same with underscores.
        evaluate: tasks and suites; empty means the default suite of the model.
    """

    name: str
    description: str
    calibration: Calibration
    stages: tuple[Stage, ...]
    evaluate: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        return self.name.replace("-", "_")

    def stage(self, kind: str) -> Stage | None:
        return next((s for s in self.stages if s.stage == kind), None)

    @property
    def merge(self) -> MergeStage | None:
        found = self.stage("merge")
        return found if isinstance(found, MergeStage) else None

    @property
    def recoveries(self) -> tuple[RecoverStage, ...]:
        """Recovery stages, in order: each works on the weights that the one before it left."""
        return tuple(s for s in self.stages if isinstance(s, RecoverStage))

    @property
    def sparsify(self) -> SparsifyStage | None:
        found = self.stage("sparsify")
        return found if isinstance(found, SparsifyStage) else None

    @property
    def sparsity_reads(self) -> tuple[str, ...]:
        """Shared analysis that the sparsity plan reads.

        The stored statistics are those of the base model. Weights that were merged or recovered before get a
        calibration pass of their own, from the tokens; so does whatever prunes to compare candidates.
        """
        if self.sparsify is None:
            return ()
        allocation = self.sparsify.allocation
        reads = allocation.reads_statistics or bool(allocation.needs)
        if allocation.measures or (reads and self.merge):
            return ("calibration_tokens",)
        found = ["calibration_activations"] * allocation.reads_statistics
        return (*found, *(f"similarity_{need}" for need in allocation.needs))

    @property
    def reads_tokens(self) -> bool:
        """Whether any stage needs the calibration set."""
        merges = bool(self.merge and self.merge.analysis)
        prunes = bool(self.sparsify and (self.sparsify.reads_tokens or self.sparsity_reads))
        rounds = bool(self.quantize and (self.quantize.reads_tokens or self.quantize.bits))
        return merges or bool(self.recoveries) or prunes or rounds

    @property
    def quantize(self) -> QuantizeStage | None:
        found = self.stage("quantize")
        return found if isinstance(found, QuantizeStage) else None

    def check(self, shape: ModelShape) -> None:
        """Refuse what cannot work on a model, before any compute.

        Raises:
            InputError: beginning with the recipe's name.
        """
        try:
            for stage in self.stages:
                stage.check(self._before(stage, shape))
            if self.quantize and self.quantize.bits:
                check_bits(self.quantize, self._before(self.quantize, shape))
            self._check_texts()
            context = int(shape.config.get("max_position_embeddings") or self.calibration.length)
            sequences, length = self.calibration.sequences, min(self.calibration.length, context)
            if self.reads_tokens:
                check_size(self.calibration.corpus, sequences, length)
            for stage in self.stages:
                stage.check_tokens(shape, sequences, length)
        except InputError as error:
            raise InputError(f"recipe {self.name}: {error}") from None

    def as_run(self) -> dict[str, Any]:
        """The recipe with its defaults and the versions of its methods: what handles of its assets keep."""
        versions = {name: version for stage in self.stages for name, version in stage.versions.items()}
        return {**self.describe(), "versions": versions}

    def _before(self, stage: Stage, shape: ModelShape) -> ModelShape:
        """Facts of the model that a stage changes: without the layers that were merged away, for all but recovery."""
        if self.merge is None or stage is self.merge or isinstance(stage, RecoverStage):
            return shape
        return shape.shortened(shape.layers - self.merge.removed(shape.layers))

    def check_texts(self) -> None:
        """Read every corpus that the recipe uses once, and refuse what is no text, before any compute.

        Raises:
            InputError: beginning with the recipe's name, with the file and its row.
        """
        try:
            self._check_texts()
        except InputError as error:
            raise InputError(f"recipe {self.name}: {error}") from None

    def _check_texts(self) -> None:
        if self.reads_tokens:
            check_corpus(self.calibration.corpus)
        for stage in self.stages:
            for corpus in getattr(stage, "corpora", ()):
                check_corpus(corpus)

    def describe(self) -> dict[str, Any]:
        """The recipe with every default written out, as it goes into `compression.json`."""
        return {
            "name": self.name,
            "description": self.description,
            "calibration": self.calibration.model_dump(mode="json"),
            "stages": [{s.stage: s.options()} for s in self.stages],
            "evaluate": list(self.evaluate),
        }


def options_digest(options: Mapping[str, Any]) -> str:
    """Short hash of a stage's options, the second half of an asset's code version."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


def own_recipes() -> Path:
    """Where a user's recipes are, and where `plan` writes: `COMPRESSION_DAGS_RECIPES`, else `./recipes`."""
    return Path(os.environ.get("COMPRESSION_DAGS_RECIPES") or Path.cwd() / "recipes")


def recipes_folder() -> Path:
    """The user's own folder where there is one, else the project's."""
    own = own_recipes()
    return own if own.is_dir() or os.environ.get("COMPRESSION_DAGS_RECIPES") else PROJECT / "recipes"


class Recipes(dict[str, Recipe]):
    """Recipes by name, and the files that hold none.

    Attributes:
        left_out: file → why it was left out, one line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[Path, str] = {}
        self.files: dict[str, Path] = {}

    def join(self, other: Recipes) -> None:
        """Take over what `other` holds; of two recipes of one name its."""
        self.update(other)
        self.left_out |= other.left_out
        self.files |= other.files

    def resolve(self, tasks: Callable[[], TaskBook]) -> None:
        """Leave out recipes whose `evaluate:` names a text that is not there, and an `evaluation.yaml` that is bad."""
        try:
            book = tasks()
        except InputError as error:
            self.left_out[Path("evaluation.yaml")] = str(error)
            return
        for name, recipe in list(self.items()):
            try:
                book.resolve(list(recipe.evaluate))
            except InputError as error:
                self.left_out[self.files[name]] = f"{self.files[name]}: evaluate: {error}"
                del self[name]


def load_recipes(folder: Path | None = None) -> Recipes:
    """All good recipes of a folder, by name; a bad file costs itself and is said once a process.

    Without a folder: the user's own, and the project's that have other names; a folder that
    `COMPRESSION_DAGS_RECIPES` names counts alone.

    Raises:
        InputError: the folder cannot be read.
    """
    if folder is not None:
        return _of_folder(folder)
    own, shipped = recipes_folder(), PROJECT / "recipes"
    if os.environ.get("COMPRESSION_DAGS_RECIPES") or (own.is_dir() and own.samefile(shipped)):
        return _of_folder(own)
    found = _of_folder(shipped)
    found.join(_of_folder(own))
    return found


def _of_folder(folder: Path) -> Recipes:
    found = Recipes()
    for path in _files(folder):
        try:
            recipe = load_recipe(path)
            if recipe.name in found:
                raise InputError(f"{path}: a second recipe is named {recipe.name!r}, after {found.files[recipe.name]}")
        except InputError as error:
            found.left_out[path] = str(error)
            _warn_once(f"left out: {error}")
            continue
        found[recipe.name], found.files[recipe.name] = recipe, path
    return found


def _files(folder: Path) -> list[Path]:
    """What a recipes folder holds that is named like a recipe; hidden names are other programs'."""
    if not folder.is_dir():
        raise InputError(f"recipes folder {folder} {what_is(folder)}")
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise InputError(f"recipes folder {folder} cannot be read: {error.strerror}") from None
    return [folder / n for n in names if n.endswith(".yaml") and not n.startswith(".") and n != "evaluation.yaml"]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def pick_recipes(recipes: Mapping[str, Recipe], names: list[str]) -> list[Recipe]:
    """The recipes of these names, each once.

    Raises:
        InputError: an unknown name, with near ones; or what is wrong with the file that should hold it.
    """
    left_out = recipes.left_out if isinstance(recipes, Recipes) else {}
    for name in names:
        if name not in recipes:
            for path, message in left_out.items():
                if name in (path.stem, _claimed_name(path)):
                    raise InputError(f"recipe {name!r} is left out: {message}")
            near = difflib.get_close_matches(name, recipes, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise InputError(f"recipe {name!r} is unknown{hint} Known: {', '.join(recipes)}")
    return [recipes[name] for name in dict.fromkeys(names)]


def _claimed_name(path: Path) -> str | None:
    """The name that a bad file gives itself, if its beginning shows one."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as handle:
                found = re.search(rb"^name:[ \t]*[\"']?([^\s\"'#]+)", handle.read(1 << 16), re.MULTILINE)
            return found[1].decode("utf-8", "replace") if found else None
    return None


def load_recipe(path: Path) -> Recipe:
    """One recipe file.

    Raises:
        InputError: `file:line: key: what is wrong, and what is allowed`.
    """
    return read_recipe(yaml_reader.read_file(path))


def read_recipe(document: yaml_reader.Document) -> Recipe:
    """The recipe that a mapping says.

    Raises:
        InputError: as `load_recipe`.
    """
    return _Reader(document).recipe()


class _Reader:
    """Turns a YAML tree into a Recipe and every fault into one line with its place."""

    def __init__(self, document: yaml_reader.Document):
        self.document, self.fail = document, document.fail

    def recipe(self) -> Recipe:
        tree = self.document.values
        for key in tree:
            if key not in KEYS:
                raise self.fail((key,), f"unknown key; allowed: {', '.join(KEYS)}")
        name = tree.get("name")
        fault = names.fault(name)
        if fault or not isinstance(name, str):
            raise self.fail(("name",), f"{yaml_reader.shown(name)} {fault}")
        evaluate = tree.get("evaluate") or []
        evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        if not isinstance(evaluate, list) or not all(isinstance(t, str) for t in evaluate):
            raise self.fail(("evaluate",), "must be a task, a suite, or a list of them")
        description = tree.get("description") or ""
        if not isinstance(description, str):
            raise self.fail(("description",), f"{yaml_reader.shown(description)} must be text; put it in quotes")
        calibration = self.validate(Calibration, tree.get("calibration") or {}, ("calibration",))
        stages = self.stages(tree.get("stages"))
        return Recipe(name, description, calibration, stages, tuple(evaluate))

    def stages(self, entries: Any) -> tuple[Stage, ...]:
        if not isinstance(entries, list) or not entries:
            raise self.fail(("stages",), f"must be a list with at least one of {', '.join(METHODS)}")
        stages = tuple(self.stage(i, entry) for i, entry in enumerate(entries))
        for i, stage in enumerate(stages):
            before = [s.stage for s in stages[:i]]
            repeated = stage.stage in before and stage.stage not in REPEATABLE
            if repeated or any(ORDER.index(b) > ORDER.index(stage.stage) for b in before):
                raise self.fail(
                    ("stages", i),
                    f"{stage.stage} after {before[-1]}; the order is {', '.join(ORDER)}, and only "
                    f"{', '.join(REPEATABLE)} may come more than once",
                )
            if stage.stage == "recover" and "merge" not in before:
                raise self.fail(("stages", i), "recover needs a merge stage before it")
        return stages

    def stage(self, index: int, entry: Any) -> Stage:
        at = ("stages", index)
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), dict):
            raise self.fail(at, "must look like `merge: {method: shortgpt, ratio: 0.2}`")
        kind, options = next(iter(entry.items()))
        if kind not in METHODS:
            raise self.fail((*at, kind), f"unknown stage; allowed: {', '.join(METHODS)}")
        method = options.get("method")
        if not isinstance(method, str) or method not in METHODS[kind]:
            raise self.fail(
                (*at, kind, "method"), f"{yaml_reader.shown(method)} is unknown; allowed: {', '.join(METHODS[kind])}"
            )
        return self.validate(METHODS[kind][method], options, (*at, kind))

    def validate(self, model: type[BaseModel], values: Any, at: tuple[str | int, ...]) -> Any:
        if not isinstance(values, dict):
            raise self.fail(at, f"must be a mapping, not {yaml_reader.shown(values)}")
        try:
            found = model.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = (*at, *first["loc"])
            if first["type"] == "extra_forbidden":
                allowed = ", ".join(model.model_fields)
                raise self.fail(where, f"unknown key; allowed: {allowed}") from None
            message = first["msg"].removeprefix("Value error, ")
            given = "" if isinstance(first["input"], dict) else f"{yaml_reader.shown(first['input'])}: "
            raise self.fail(where, given + message[0].lower() + message[1:]) from None
        for key, value in values.items():
            if isinstance(value, bool) and not isinstance(getattr(found, key), bool):  # pydantic takes true for 1
                raise self.fail((*at, key), f"{str(value).lower()} is not allowed here; it is not true or false")
        return found
