"""Recipes: YAML files that say how to compress a model. Read and checked without Dagster and without torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compression_dags.architectures import StackFacts
from compression_dags.calibration.corpora import Calibration, resolve_corpus
from compression_dags.errors import InputError
from compression_dags.merging.plan import MergeStage
from compression_dags.merging.recovery import RecoverStage
from compression_dags.paths import PROJECT
from compression_dags.quantization.schemes import QuantizeStage
from compression_dags.registry import METHODS
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stages import Stage

ORDER = ("merge", "recover", "sparsify", "quantize")
REPEATABLE = ("recover",)
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KEYS = ("name", "description", "calibration", "stages", "evaluate")
BASELINE = "baseline"


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

    def check(self, facts: StackFacts) -> None:
        """Refuse what cannot work on a model, before any compute.

        Raises:
            InputError: beginning with the recipe's name.
        """
        try:
            for stage in self.stages:
                stage.check(facts)
            if self.reads_tokens:
                resolve_corpus(self.calibration.corpus)
            context = int(facts.config.get("max_position_embeddings") or self.calibration.length)
            for stage in self.recoveries:
                stage.check_tokens(facts, self.calibration.sequences, min(self.calibration.length, context))
        except InputError as error:
            raise InputError(f"recipe {self.name}: {error}") from None

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


def recipes_folder() -> Path:
    """`COMPRESSION_DAGS_RECIPES`, else `recipes/` of the working directory, else the project's own."""
    if given := os.environ.get("COMPRESSION_DAGS_RECIPES"):
        return Path(given)
    local = Path.cwd() / "recipes"
    return local if local.is_dir() else PROJECT / "recipes"


def load_recipes(folder: Path | None = None) -> dict[str, Recipe]:
    """All recipes of a folder, by name.

    Raises:
        InputError: an invalid recipe, or two of one name.
    """
    folder = folder or recipes_folder()
    if not folder.is_dir():
        raise InputError(f"recipes folder {folder} does not exist")
    found: dict[str, Recipe] = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name == "evaluation.yaml":
            continue
        recipe = load_recipe(path)
        if recipe.name in found:
            raise InputError(f"{path}: a second recipe is named {recipe.name!r}; names must differ")
        found[recipe.name] = recipe
    return found


def pick_recipes(recipes: dict[str, Recipe], names: list[str]) -> list[Recipe]:
    for name in names:
        if name not in recipes:
            near = difflib.get_close_matches(name, recipes, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise InputError(f"recipe {name!r} is unknown{hint} Known: {', '.join(recipes)}")
    return [recipes[name] for name in dict.fromkeys(names)]


def load_recipe(path: Path) -> Recipe:
    """One recipe file.

    Raises:
        InputError: `file:line: key: what is wrong, and what is allowed`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}"
        ) from None
    return _Reader(path, root).recipe(tree)


class _Reader:
    """Turns a YAML tree into a Recipe and every fault into one line with its place."""

    def __init__(self, path: Path, root: yaml.Node | None):
        self.path, self.root = path, root

    def fail(self, keys: tuple[str | int, ...], message: str) -> InputError:
        where = ".".join(map(str, keys))
        return InputError(f"{self.path}:{self.line(keys)}: {where + ': ' if where else ''}{message}")

    def line(self, keys: tuple[str | int, ...]) -> int:
        """Line of the deepest node on the way to `keys`."""
        node, line = self.root, 1
        for key in keys:
            if isinstance(node, yaml.MappingNode):
                pair = next(((k, v) for k, v in node.value if k.value == str(key)), None)
                if pair is None:
                    return line
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
                line = node.start_mark.line + 1
        return line

    def recipe(self, tree: Any) -> Recipe:
        if not isinstance(tree, dict):
            raise self.fail((), f"a recipe is a mapping with the keys {', '.join(KEYS)}")
        for key in tree:
            if key not in KEYS:
                raise self.fail((key,), f"unknown key; allowed: {', '.join(KEYS)}")
        name = tree.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == BASELINE:
            raise self.fail(("name",), f"{name!r} must be lower-case words joined by hyphens, and not {BASELINE!r}")
        evaluate = tree.get("evaluate") or []
        evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        if not isinstance(evaluate, list) or not all(isinstance(t, str) for t in evaluate):
            raise self.fail(("evaluate",), "must be a task, a suite, or a list of them")
        calibration = self.validate(Calibration, tree.get("calibration") or {}, ("calibration",))
        stages = self.stages(tree.get("stages"))
        return Recipe(name, str(tree.get("description") or ""), calibration, stages, tuple(evaluate))

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
        if method not in METHODS[kind]:
            raise self.fail((*at, kind, "method"), f"{method!r} is unknown; allowed: {', '.join(METHODS[kind])}")
        return self.validate(METHODS[kind][method], options, (*at, kind))

    def validate(self, model: type[BaseModel], values: Any, at: tuple[str | int, ...]) -> Any:
        if not isinstance(values, dict):
            raise self.fail(at, f"must be a mapping, not {values!r}")
        try:
            return model.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = (*at, *first["loc"])
            if first["type"] == "extra_forbidden":
                allowed = ", ".join(model.model_fields)
                raise self.fail(where, f"unknown key; allowed: {allowed}") from None
            message = first["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(first["input"], dict) else f"{first['input']!r}: "
            raise self.fail(where, shown + message[0].lower() + message[1:]) from None
