"""Which folders hold recipes, and what is loaded from them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from compression_dags.errors import InputError
from compression_dags.evaluation.tasks import TaskBook
from compression_dags.paths import PROJECT, what_is
from compression_dags.recipes.matrix import load_file
from compression_dags.recipes.names import BASELINE, DERIVED
from compression_dags.recipes.recipe import BASELINE_RECIPE, Recipe

#: The folder inside a recipes folder whose recipes the UI is not shown.
STUDIES = "studies"
logger = logging.getLogger("compression_dags")


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
        files: name → the file that says the recipe.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[Path, str] = {}
        self.files: dict[str, Path] = {}
        self._studies: set[str] = set()

    @property
    def studies(self) -> set[str]:
        """Names that only folders of studies hold."""
        return self._studies & self.keys()

    def join(self, other: Recipes) -> None:
        """Take over what `other` holds; of two recipes of one name its."""
        shown = self.keys() - self._studies
        self._studies = (self._studies - other.keys()) | (other.studies - shown)
        self.update(other)
        self.left_out |= other.left_out
        self.files |= other.files

    def add_studies(self, other: Recipes) -> None:
        """Take over studies, except those of names that are here already."""
        new = other.keys() - self.keys()
        self._studies |= new
        self.update({name: recipe for name, recipe in other.items() if name in new})
        self.files |= {name: other.files[name] for name in new}
        self.left_out |= other.left_out

    def leave_out(self, path: Path, error: InputError) -> None:
        """Note a file that cannot be used, and say so once a process."""
        self.left_out[path] = str(error)
        _warn_once(f"left out: {error}")

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
    """All good recipes of a folder and of its `studies`, by name; a bad file costs itself and is said once a process.

    Without a folder: the user's own, and the project's that have other names. A folder that
    `COMPRESSION_DAGS_RECIPES` names counts alone. A folder's own recipes come before those of its `studies`.

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


def shown_recipes() -> Recipes:
    """What the UI shows: all recipes but the studies; of a folder that `COMPRESSION_DAGS_RECIPES` names, all.

    Raises:
        InputError: the folder cannot be read.
    """
    found = load_recipes()
    if not os.environ.get("COMPRESSION_DAGS_RECIPES"):
        for name in found.studies:
            del found[name]
    return found


def _of_folder(folder: Path) -> Recipes:
    found = _of_files(_files(folder))
    studies = folder / STUDIES
    if os.path.lexists(studies):
        try:
            found.add_studies(_of_files(_files(studies)))
        except InputError as error:
            found.leave_out(studies, error)
    return found


def _of_files(paths: list[Path]) -> Recipes:
    found = Recipes()
    for path in paths:
        try:
            recipes = load_file(path)
            for recipe in recipes:
                if recipe.name in found:
                    first = found.files[recipe.name]
                    raise InputError(f"{path}: a second recipe is named {recipe.name!r}, after {first}")
        except InputError as error:
            found.leave_out(path, error)
            continue
        found.update({recipe.name: recipe for recipe in recipes})
        found.files |= {recipe.name: path for recipe in recipes}
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


def find_recipe(recipes: Mapping[str, Recipe], name: str) -> Recipe | None:
    """The recipe that a name means now: one that was loaded, the baseline, or one with a changed calibration.

    Raises:
        InputError: the name says a calibration set that cannot be.
    """
    if name == BASELINE:
        return BASELINE_RECIPE
    base, _, size = name.partition(DERIVED)
    if base not in recipes or not size:
        return recipes.get(name)
    said = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", size)
    found = recipes[base].with_calibration(int(said[1]), int(said[2])) if said else None
    return found if found and found.name == name else None


def pick_recipes(recipes: Mapping[str, Recipe], names: list[str]) -> list[Recipe]:
    """The recipes of these names, each once.

    Raises:
        InputError: an unknown name, with near ones; or what is wrong with the file that should hold it.
    """
    picked = {name: None if name == BASELINE else find_recipe(recipes, name) for name in names}
    for name, found in picked.items():
        if found is None:
            raise InputError(_why_not(name, recipes))
    return [found for found in picked.values() if found]


def _why_not(name: str, recipes: Mapping[str, Recipe]) -> str:
    """Why there is no recipe of this name, and what to do."""
    left_out = recipes.left_out if isinstance(recipes, Recipes) else {}
    studies = recipes.studies if isinstance(recipes, Recipes) else set()
    for path, message in left_out.items():
        if name in (path.stem, *_claimed_name(path)):
            return f"recipe {name!r} is left out: {message}"
    near = difflib.get_close_matches(name, recipes, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    known = ", ".join(n for n in recipes if n not in studies)
    more = f", and {len(studies)} of studies (`compression-dags recipes --all`)" if studies else ""
    lost = [message for path, message in left_out.items() if _may_expand_to(name, path)]
    return f"recipe {name!r} is unknown{hint} Known: {known}{more}" + "".join(f". Left out: {m}" for m in lost)


def _claimed_name(path: Path) -> list[str]:
    """The name that a bad file gives itself, if its beginning shows one."""
    found = re.search(rb"^name:[ \t]*[\"']?([^\s\"'#]+)", _beginning(path), re.MULTILINE)
    return [found[1].decode("utf-8", "replace")] if found else []


def _may_expand_to(name: str, path: Path) -> bool:
    """Whether a bad file looks like a matrix file with recipes of such names."""
    if not re.search(rb"^(for|variants):", _beginning(path), re.MULTILINE):
        return False
    forms = [".+".join(map(re.escape, re.split(r"\{[^{}]*\}", claimed))) for claimed in _claimed_name(path)]
    return any(re.fullmatch(f"{form}(-.+)?", name) for form in forms)


def _beginning(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as handle:
                return handle.read(1 << 16)
    return b""
