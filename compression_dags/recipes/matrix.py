"""Matrix files: one YAML file that expands to many recipes, each as if a file of its own said it.

`for:` names lists of values, and every combination gives a recipe. A text may hold placeholders, `{word}`. One that is
the whole text becomes the value itself, so that a number stays one; `"{word}%"` becomes its hundredth. `variants:`
maps endings of the name to further stages. The description then tells their methods and the ending.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from compression_dags import yaml_reader
from compression_dags.errors import InputError
from compression_dags.recipes import reader
from compression_dags.recipes.recipe import Recipe
from compression_dags.yaml_reader import Document, Keys, shown

#: Recipes of one file.
MAX_RECIPES = 1000
#: Values and keys of all recipes of one file together.
MAX_PARTS = 200_000
#: Characters of a value of `for:`, and of a text with its placeholders filled in.
MAX_VALUE, MAX_TEXT = 200, 10_000
KEYS = (*reader.KEYS, "for", "variants")

_HOLE = re.compile(r"\{([^{}]*)\}")
_WHOLE = re.compile(r"\{([^{}]*)\}(%?)")
_AXIS = re.compile(r"[a-z][a-z0-9_]*")
_ENDING = re.compile(r"([a-z0-9]+(-[a-z0-9]+)*)?")
Chosen = Mapping[str, Any]


def load_file(path: Path) -> tuple[Recipe, ...]:
    """The recipes of a file: one, or all of a matrix file.

    Raises:
        InputError: `file:line: key: what is wrong, and what is allowed`.
    """
    return read_recipes(yaml_reader.read_file(path))


def read_recipes(document: Document) -> tuple[Recipe, ...]:
    """The recipes that a mapping says: many if it has `for` or `variants`.

    Raises:
        InputError: as `load_file`.
    """
    if not {"for", "variants"} & document.values.keys():
        return (reader.read_recipe(document),)
    return _Matrix(document).recipes()


@dataclass(frozen=True)
class _Expanded(Document):
    """One recipe of a matrix file; its faults point into that file.

    Attributes:
        matrix: the file.
        ending: key of its variant.
        common: stages that stand before those of the variant.
    """

    matrix: Document
    ending: str
    common: int

    def fail(self, keys: Keys, message: str) -> InputError:
        if keys[:1] == ("stages",) and len(keys) > 1 and isinstance(keys[1], int) and keys[1] >= self.common:
            keys = ("variants", self.ending, keys[1] - self.common, *keys[2:])
        return self.matrix.fail(keys, f"{message} (in {shown(self.values.get('name'))})")


class _Matrix:
    """A matrix file, checked for everything that does not depend on the combination."""

    def __init__(self, document: Document):
        self.document, self.fail = document, document.fail
        for key in document.values:
            if key not in KEYS:
                raise self.fail((key,), f"unknown key; allowed: {', '.join(KEYS)}")
        for key in ("name", "description"):
            if not isinstance(text := document.values.get(key, ""), str):
                raise self.fail((key,), f"{shown(text)} must be text; put it in quotes")
        self.axes = self._axes()
        self.stages = self._stages(("stages",), document.values.get("stages") or [])
        self.variants = self._variants()
        self._check_size()

    def recipes(self) -> tuple[Recipe, ...]:
        found: dict[str, Recipe] = {}
        for values in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            for ending in self.variants:
                recipe = reader.read_recipe(self._expanded(chosen, ending))
                if recipe.name in found:
                    words = ", ".join(f"{{{axis}}}" for axis in self.axes)
                    said = f"two recipes are named {recipe.name!r}; the name needs every placeholder that varies"
                    raise self.fail(("name",), f"{said}: {words}")
                found[recipe.name] = recipe
        return tuple(found.values())

    def _axes(self) -> dict[str, list[Any]]:
        axes = self.document.values.get("for", {})
        if not isinstance(axes, dict):
            raise self.fail(("for",), f"must map words to lists, as in `amount: [10, 20]`, not {shown(axes)}")
        for axis, values in axes.items():
            if not _AXIS.fullmatch(axis):
                raise self.fail(("for", axis), "must be a lower-case word of letters, digits and underscores")
            if not isinstance(values, list) or not values:
                raise self.fail(("for", axis), f"must be a list of values, not {shown(values)}")
            for i, value in enumerate(values):
                if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                    raise self.fail(("for", axis, i), f"{shown(value)} must be text or a number")
                if len(str(value)) > MAX_VALUE:
                    raise self.fail(("for", axis, i), f"{shown(value)} has more than {MAX_VALUE} characters")
        return axes

    def _variants(self) -> dict[str, list[Any]]:
        variants = self.document.values.get("variants", {"": []})
        if not isinstance(variants, dict) or not variants:
            raise self.fail(("variants",), f"must map endings of the name to lists of stages, not {shown(variants)}")
        for ending, stages in variants.items():
            if not _ENDING.fullmatch(ending):
                allowed = "an ending must be lower-case words joined by hyphens, or empty"
                raise self.fail(("variants", ending), f"{shown(ending)}: {allowed}")
            self._stages(("variants", ending), stages)
        return variants

    def _stages(self, at: Keys, stages: Any) -> list[Any]:
        if not isinstance(stages, list):
            raise self.fail(at, f"must be a list of stages, not {shown(stages)}")
        return stages

    def _check_size(self) -> None:
        count = math.prod(map(len, self.axes.values())) * len(self.variants)
        at: Keys = ("for",) if self.axes else ("variants",)
        if count > MAX_RECIPES:
            raise self.fail(at, f"expands to {count:,} recipes; at most {MAX_RECIPES:,} are allowed in a file")
        parts = count * sum(keys[:1] != ("for",) for keys in self.document.lines)
        if parts > MAX_PARTS:
            raise self.fail(at, f"expands to {count:,} recipes of {parts:,} parts; at most {MAX_PARTS:,} are allowed")

    def _expanded(self, chosen: Chosen, ending: str) -> _Expanded:
        """What a file of its own would hold for a combination and a variant."""
        values = self.document.values
        tree = {key: self._filled(values[key], chosen, (key,)) for key in ("calibration", "evaluate") if key in values}
        name = self._text(values.get("name", ""), chosen, ("name",))
        own = self._filled(self.variants[ending], chosen, ("variants", ending))
        tree["name"] = f"{name}-{ending}" if ending else name
        tree["stages"] = [*self._filled(self.stages, chosen, ("stages",)), *own]
        tree["description"] = self._text(values.get("description", ""), chosen, ("description",))
        if ending:
            then = f", then {' and '.join(_methods(own))}" if self.stages and own else ""
            tree["description"] += f"{then} ({ending})"
        return _Expanded(self.document.name, tree, {}, self.document, ending, len(self.stages))

    def _filled(self, value: Any, chosen: Chosen, at: Keys) -> Any:
        """A value with its placeholders filled in, in texts of any depth."""
        if isinstance(value, dict):
            for key in value:
                if any(word in chosen for word in _HOLE.findall(key)):
                    raise self.fail((*at, key), "a placeholder may stand in a value, not in a key")
            return {key: self._filled(part, chosen, (*at, key)) for key, part in value.items()}
        if isinstance(value, list):
            return [self._filled(part, chosen, (*at, i)) for i, part in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _WHOLE.fullmatch(value)
        if whole is None:
            return self._text(value, chosen, at)
        found = self._value(whole[1], chosen, at)
        if not whole[2]:
            return found
        if isinstance(found, str):
            raise self.fail(at, f"{shown(value)} is a hundredth of {shown(found)}, which must be a number")
        return float(Decimal(str(found)) / 100)

    def _text(self, text: str, chosen: Chosen, at: Keys) -> str:
        if set("{}") & set(_HOLE.sub("", text)):
            raise self.fail(at, f"{shown(text)}: braces are for placeholders; {self._allowed(chosen)}")
        found = _HOLE.sub(lambda hole: str(self._value(hole[1], chosen, at)), text)
        if len(found) > MAX_TEXT:
            raise self.fail(at, f"has {len(found):,} characters; at most {MAX_TEXT:,} are allowed")
        return found

    def _value(self, word: str, chosen: Chosen, at: Keys) -> Any:
        if word not in chosen:
            raise self.fail(at, f"{shown('{' + word + '}')} is an unknown placeholder; {self._allowed(chosen)}")
        return chosen[word]

    @staticmethod
    def _allowed(chosen: Chosen) -> str:
        return f"allowed: {', '.join(f'{{{word}}}' for word in chosen) or 'none, for there is no `for:`'}"


def _methods(stages: list[Any]) -> list[str]:
    """The methods of a variant's stages, as far as they are stages."""
    options = [next(iter(stage.values()), None) for stage in stages if isinstance(stage, dict)]
    return [str(o["method"]) for o in options if isinstance(o, dict) and "method" in o]
