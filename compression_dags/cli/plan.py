"""`compression-dags plan`: one budget in, one recipe file out."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from compression_dags.calibration.corpora import Calibration
from compression_dags.errors import InputError
from compression_dags.planning.bounds import Measure, check_plan
from compression_dags.planning.budget_solver import Solution, solve
from compression_dags.planning.candidates import CandidateTable
from compression_dags.planning.options import CandidateOptions
from compression_dags.planning.recipe_writer import recipe_of, recipe_text
from compression_dags.recipes import own_recipes, read_recipe
from compression_dags.recipes.names import fault, made_name
from compression_dags.statefile import replace_text
from compression_dags.yaml_reader import read_mapping, shown

if TYPE_CHECKING:
    from compression_dags.definitions import Settings
    from compression_dags.resources.model_hub import ModelSource

_THOUSANDS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
#: Units of a measure, in lower case. Bytes may end in B or iB; a B of parameters is a billion; bits have no unit.
_UNITS: dict[Measure, dict[str, float]] = {
    "bytes": {
        **{k + b: v for k, v in _THOUSANDS.items() for b in ("", "b")},
        **{f"{k}i{b}": 2.0**n for k, n in (("k", 10), ("m", 20), ("g", 30)) for b in ("", "b")},
    },
    "parameters": {**_THOUSANDS, "b": 1e9},
    "bits": {"": 1.0},
}
_EXAMPLES: dict[Measure, str] = {
    "bytes": "a unit; e.g. 120MB, 1.5GiB",
    "parameters": "K, M or B (a billion); e.g. 90M",
    "bits": "no unit; e.g. 4.5",
}
MADE = "# Made by `compression-dags plan`."


@dataclass(frozen=True)
class Planned:
    """A solved budget and its recipe file."""

    name: str
    path: Path
    solution: Solution
    measure: Measure
    budget: float
    cached: bool

    def to_json(self) -> dict[str, Any]:
        s = self.solution
        found = {"recipe": self.name, "file": str(self.path), "measure": self.measure, "budget": self.budget}
        found |= {"predicted_kl": s.cost, "bytes": s.bytes, "parameters": s.parameters, "bits_per_weight": s.bits}
        return found | {"layers_removed": s.removed, "dense_bytes": s.dense_bytes, "bank": self._bank}

    @property
    def _bank(self) -> str:
        return "hit" if self.cached else "computed"

    def line(self) -> str:
        s = self.solution
        return (
            f"{self.name}: {s.bytes / 1e6:.1f} MB of {s.dense_bytes / 1e6:.1f}, {s.bits:.2f} bits a weight, "
            f"{s.removed} layers fewer, predicted KL {s.cost:.4f} nats a token → {self.path}"
        )


def parse_budget(text: str, measure: Measure = "bytes") -> float:
    """`120MB`, `1.5GiB`, `90M`, `4.5` → a number.

    Raises:
        InputError: not a positive finite number with one of the measure's units.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    unit = _UNITS[measure].get(found[2].lower()) if found else None
    value = float(found[1]) * unit if found and unit else 0.0
    if not 0 < value < math.inf:
        raise InputError(f"budget {text!r} is not a positive number with {_EXAMPLES[measure]} ({measure})")
    return value


def method_of(text: str) -> dict[str, Any]:
    """`gptq`, or `{method: gptq, act_order: false}` → options.

    Raises:
        InputError: neither a name nor a mapping with one.
    """
    if re.fullmatch(r"\s*[\w.-]+\s*", text):
        return {"method": text.strip()}
    try:
        options = read_mapping(text, "options", max_bytes=1 << 16).values
    except InputError as error:
        said = "give its name, or options as in a recipe: {method: NAME, …}"
        raise InputError(f"{shown(text)} is no method: {said} ({error})") from None
    if not isinstance(options.get("method"), str):
        raise InputError(f"{shown(text)} is no method: give its name as `method` in {{method: NAME, …}}")
    return options


def _validated(model: type[BaseModel], options: dict[str, Any], label: str) -> Any:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        where, value = ".".join(map(str, first["loc"])), "" if isinstance(first["input"], dict) else first["input"]
        shown = f"{where}: {value!r}: " if where else ""
        raise InputError(f"{label}: {shown}{first['msg'].removeprefix('Value error, ')}") from None


def budgets_of(
    sizes: tuple[str, ...], parameters: tuple[str, ...], bits: tuple[str, ...]
) -> list[tuple[Measure, float]]:
    """Every budget that was asked for.

    Raises:
        InputError: none, or one that is no number.
    """
    asked: tuple[tuple[Measure, tuple[str, ...]], ...] = (("bytes", sizes), ("parameters", parameters), ("bits", bits))
    found: list[tuple[Measure, float]] = [(m, parse_budget(text, m)) for m, texts in asked for text in texts]
    if not found:
        raise InputError("plan: give a budget: --bytes 120MB, --params 90M or --bits 4.5")
    return list(dict.fromkeys(found))


def planning_options(
    schemes: str | None,
    group_size: int | None,
    sparsities: str | None,
    depth: bool,
    quantizer: str,
    recover: str,
    sequences: int | None,
    length: int | None,
) -> tuple[CandidateOptions, Calibration]:
    """Options of the bank and of its calibration set, defaults where nothing is given.

    Raises:
        InputError: an unknown scheme, method or option.
    """
    asked: dict[str, Any] = {"depth": depth, "quantizer": method_of(quantizer)}
    asked["recover"] = {"auto": "auto", "none": None}[recover] if recover in {"auto", "none"} else method_of(recover)
    asked |= {"group_size": group_size} if group_size else {}
    asked |= {"sparsities": [s.strip() for s in sparsities.split(",")]} if sparsities else {}
    asked |= {"schemes": [s.strip() for s in schemes.split(",")]} if schemes else {}
    given = {k: v for k, v in (("sequences", sequences), ("length", length)) if v is not None}
    return _validated(CandidateOptions, asked, "plan"), _validated(Calibration, given, "plan")


def plan_budgets(
    model: str,
    budgets: list[tuple[Measure, float]],
    settings: Settings,
    *,
    options: CandidateOptions,
    calibration: Calibration,
    name: str | None = None,
    folder: Path | None = None,
) -> list[Planned]:
    """A recipe file for every budget, from the bank, which is measured if it is not stored.

    Raises:
        InputError: a budget that cannot be met, an unknown method, a file that was written by hand.
    """
    from compression_dags.architectures import architecture_of

    source = _checked(model, settings, options, calibration, budgets)
    slug = source.slug
    files = _files(slug, budgets, name, folder or own_recipes())
    bank, config, cached = _bank(source, settings, options, calibration)
    solved = [solve(bank, measure, budget) for measure, budget in budgets]
    found: list[Planned] = []
    for (measure, budget), path, solution in zip(budgets, files, solved, strict=True):
        recipe = recipe_of(
            solution,
            bank,
            architecture_of(config),
            name=path.stem,
            description=f"{slug} in {_spoken(measure, budget)}: predicted KL {solution.cost:.4f} nats a token",
            calibration=calibration.model_dump(mode="json", exclude_defaults=True),
        )
        _write(path, path.stem, recipe, recipe_text(recipe, solution, bank))
        found.append(Planned(path.stem, path, solution, measure, budget, cached))
    return found


def _checked(
    model: str,
    settings: Settings,
    options: CandidateOptions,
    calibration: Calibration,
    budgets: list[tuple[Measure, float]],
) -> ModelSource:
    """The model, registered and imported if it was not, once everything that shapes can tell has been checked."""
    from compression_dags.cli.lines import configure_logging
    from compression_dags.cli.run import check_model, resolve, stored_model

    configure_logging()
    source = resolve(model, settings, None)
    check_model(source, [], settings)
    check_plan(stored_model(source, settings)[0], options, calibration, budgets)
    return source


def _files(slug: str, budgets: list[tuple[Measure, float]], name: str | None, folder: Path) -> list[Path]:
    """A recipe file for each budget.

    Raises:
        InputError: a name that no recipe may have, one that two budgets would share, or a file written by hand.
    """
    found: list[Path] = []
    for measure, budget in budgets:
        path = _check_target(_recipe_name(name, slug, measure, budget, len(budgets)), folder)
        if path in found:
            raise InputError(f"two budgets would both be written to {path}; plan them one at a time, with --name")
        found.append(path)
    return found


def _spoken(measure: Measure, budget: float) -> str:
    if measure == "bits":
        return f"{budget:g}-bits"
    return f"{budget / 1e6:g}m{'b' if measure == 'bytes' else ''}"


def _recipe_name(name: str | None, slug: str, measure: Measure, budget: float, budgets: int) -> str:
    """What the recipe of a budget is called: as asked, else after the model and the budget, and then always legal."""
    if name:
        asked = name if budgets == 1 else f"{name}-{_spoken(measure, budget)}"
        return re.sub(r"[^a-z0-9]+", "-", asked.lower()).strip("-")
    return made_name(f"planned-{slug}-{_spoken(measure, budget)}")


def _check_target(name: str, folder: Path) -> Path:
    """The file of a recipe that is to be written.

    Raises:
        InputError: a name that is not allowed, a file that was written by hand, a folder that cannot be written.
    """
    if wrong := fault(name):
        raise InputError(f"recipe name {shown(name)} {wrong}; give another --name")
    path = folder / f"{name}.yaml"
    try:
        if path.exists() and not path.read_bytes().startswith(MADE.encode()):
            raise InputError(f"{path} exists and was not made by plan; give another --name")
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"recipes folder {folder} cannot be written; give another with --to")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return path


def _write(path: Path, name: str, recipe: dict[str, Any], text: str) -> None:
    """Put a recipe at `path` after it was read like any other; a refused one leaves nothing behind."""
    if not recipe["stages"]:
        raise InputError(f"{name}: the base model fits the budget as it is; there is nothing to compress")
    read_recipe(read_mapping(text, str(path)))
    replace_text(path, text)


def _bank(
    source: ModelSource,
    settings: Settings,
    options: CandidateOptions,
    calibration: Calibration,
) -> tuple[CandidateTable, dict[str, Any], bool]:
    """The measured candidates, the base model's config, and whether they were stored already."""
    import dagster as dg

    from compression_dags.assets.planning import ALTERNATIVES, alternatives_asset
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.cli.estimate import announce, foresee_steps
    from compression_dags.cli.run import admit, recall
    from compression_dags.cli.session import execute, session
    from compression_dags.planning.steps import planning_steps
    from compression_dags.resources.artifact_store import ArtifactStore

    base = admit(source, settings).artifact
    announce(lambda: foresee_steps(planning_steps(calibration, options), calibration, base, settings))
    assets = [alternatives_asset(calibration, options)]
    definitions = dg.Definitions(assets=assets, resources=settings.resources(), executor=dg.in_process_executor)
    with session(settings, source.slug) as instance:
        made = execute(instance, definitions, source.slug, [ALTERNATIVES], settings)
    bank = recall(ArtifactStore(home=str(settings.home)), ALTERNATIVES, source.slug)
    return CandidateTable.load(bank.path), Checkpoint(base.checkpoint).config, made[ALTERNATIVES]["cache"] == "hit"
