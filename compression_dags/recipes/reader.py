"""YAML → valid Recipe. Every fault is one line with file, line, value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compression_dags import yaml_reader
from compression_dags.calibration.corpora import Calibration
from compression_dags.errors import InputError
from compression_dags.recipes import names
from compression_dags.recipes.recipe import Recipe
from compression_dags.registry import METHODS
from compression_dags.stage import Stage

ORDER = tuple(METHODS)
REPEATABLE = ("recover",)
KEYS = ("name", "description", "calibration", "stages", "evaluate")


def load_recipe(path: Path) -> Recipe:
    """The recipe of a file that holds one.

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


def recipe_of(described: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.describe` or `Recipe.as_run` described; the versions of the latter are not looked at.

    Raises:
        InputError: beginning with the recipe's name: a key, method or value that is not known here.
    """
    values = {key: value for key, value in described.items() if key != "versions"}
    return _Reader(_Described(str(values.get("name")), values, {})).described()


@dataclass(frozen=True)
class _Described(yaml_reader.Document):
    """A described recipe in place of a file: faults have the recipe's name for their place."""

    def fail(self, keys: yaml_reader.Keys, message: str) -> InputError:
        where = ".".join(map(str, keys))
        return InputError(f"recipe {self.name}: {where}: {' '.join(message.split())}")


class _Reader:
    """Turns a YAML tree into a Recipe and every fault into one line with its place."""

    def __init__(self, document: yaml_reader.Document):
        self.document, self.fail = document, document.fail

    def recipe(self) -> Recipe:
        self.check_keys()
        name = self.document.values.get("name")
        self.check_name(name)
        return self.named(name)

    def described(self) -> Recipe:
        """The recipe, which may have a derived name or be the baseline."""
        self.check_keys()
        tree = self.document.values
        name = tree.get("name")
        if not isinstance(name, str):
            raise self.fail(("name",), f"must be text, not {yaml_reader.shown(name)}")
        base, derived, _ = name.partition(names.DERIVED)
        if name != names.BASELINE:
            self.check_name(base)
        elif tree.get("stages") != []:
            raise self.fail(("stages",), f"must be an empty list: {names.BASELINE} is the uncompressed model")
        recipe = self.named(name)
        size = recipe.calibration.sequences, recipe.calibration.length
        if derived and name != (right := names.derived_name(base, *size)):
            raise self.fail(("name",), f"{yaml_reader.shown(name)} does not say the calibration; it must be {right}")
        return recipe

    def check_keys(self) -> None:
        for key in self.document.values:
            if key not in KEYS:
                raise self.fail((key,), f"unknown key; allowed: {', '.join(KEYS)}")

    def check_name(self, name: Any) -> None:
        if fault := names.fault(name):
            raise self.fail(("name",), f"{yaml_reader.shown(name)} {fault}")

    def named(self, name: Any) -> Recipe:
        tree = self.document.values
        evaluate = tree.get("evaluate") or []
        evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        if not isinstance(evaluate, list) or not all(isinstance(t, str) for t in evaluate):
            raise self.fail(("evaluate",), "must be a task, a suite, or a list of them")
        description = tree.get("description") or ""
        if not isinstance(description, str):
            raise self.fail(("description",), f"{yaml_reader.shown(description)} must be text; put it in quotes")
        calibration = self.validate(Calibration, tree.get("calibration") or {}, ("calibration",))
        stages = () if name == names.BASELINE else self.stages(tree.get("stages"))
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
