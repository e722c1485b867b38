"""`compression-dags plan`: one budget in, one recipe file out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from compression_dags.calibration.corpora import Calibration
from compression_dags.errors import InputError
from compression_dags.planning.alternatives import Bank, BankOptions
from compression_dags.planning.emit import recipe_of, recipe_text
from compression_dags.planning.solve import Measure, Solution, solve
from compression_dags.recipes import NAME, load_recipe, recipes_folder

if TYPE_CHECKING:
    from compression_dags.definitions import Settings

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
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


def parse_budget(text: str) -> float:
    """`120MB`, `1.5GiB`, `90M`, `4.5` → a number.

    Raises:
        InputError: not a positive number with one of the units.
    """
    found = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*(?:e[0-9]+)?)\s*([a-zA-Z]*?)(?:[bB])?\s*", text)
    unit = found[2].lower() if found else None
    if found is None or unit not in _UNITS or float(found[1]) <= 0:
        raise InputError(f"budget {text!r} is not a positive number with a unit; e.g. 120MB, 1.5GiB, 90M, 4.5")
    return float(found[1]) * _UNITS[unit]


def method_of(text: str) -> dict[str, Any]:
    """`gptq`, or `{method: gptq, act_order: false}` → options.

    Raises:
        InputError: neither a name nor a mapping with one.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    options = {"method": found} if isinstance(found, str) else found
    if not isinstance(options, dict) or not isinstance(options.get("method"), str):
        raise InputError(f"{text!r} is no method: give its name, or options as in a recipe: {{method: NAME, …}}")
    return options


def _validated(model: type[BaseModel], options: dict[str, Any], label: str) -> Any:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        where, value = ".".join(map(str, first["loc"])), "" if isinstance(first["input"], dict) else first["input"]
        raise InputError(f"{label}: {where}: {value!r}: {first['msg']}") from None


def budgets_of(
    sizes: tuple[str, ...], parameters: tuple[str, ...], bits: tuple[str, ...]
) -> list[tuple[Measure, float]]:
    """Every budget that was asked for.

    Raises:
        InputError: none, or one that is no number.
    """
    asked: tuple[tuple[Measure, tuple[str, ...]], ...] = (("bytes", sizes), ("parameters", parameters), ("bits", bits))
    found: list[tuple[Measure, float]] = [(m, parse_budget(text)) for m, texts in asked for text in texts]
    if not found:
        raise InputError("plan: give a budget: --bytes 120MB, --params 90M or --bits 4.5")
    return found


def planning_options(
    schemes: str | None,
    group_size: int | None,
    sparsities: str | None,
    depth: bool,
    quantizer: str,
    recover: str,
    sequences: int | None,
    length: int | None,
) -> tuple[BankOptions, Calibration]:
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
    return _validated(BankOptions, asked, "plan"), _validated(Calibration, given, "plan")


def plan_budgets(
    model: str,
    budgets: list[tuple[Measure, float]],
    settings: Settings,
    *,
    options: BankOptions,
    calibration: Calibration,
    name: str | None = None,
    folder: Path | None = None,
) -> list[Planned]:
    """Measure the bank if it is not stored, solve every budget, write a recipe file for each.

    Raises:
        InputError: a budget that cannot be met, an unknown method, a file that was written by hand.
    """
    from compression_dags.architectures import architecture_of

    slug, bank, config, cached = _bank(model, settings, options, calibration)
    solved = [solve(bank, measure, budget) for measure, budget in budgets]
    found: list[Planned] = []
    for (measure, budget), solution in zip(budgets, solved, strict=True):
        own = name if name and len(budgets) == 1 else f"{name or 'planned-' + slug}-{_spoken(measure, budget)}"
        own = re.sub(r"[^a-z0-9]+", "-", own.lower()).strip("-")
        path = (folder or recipes_folder()) / f"{own}.yaml"
        recipe = recipe_of(
            solution,
            bank,
            architecture_of(config),
            name=own,
            description=f"{slug} in {_spoken(measure, budget)}: predicted KL {solution.cost:.4f} nats a token",
            calibration=calibration.model_dump(mode="json", exclude_defaults=True),
        )
        _write(path, own, recipe, recipe_text(recipe, solution, bank))
        found.append(Planned(own, path, solution, measure, budget, cached))
    return found


def _spoken(measure: Measure, budget: float) -> str:
    if measure == "bits":
        return f"{budget:g}-bits"
    return f"{budget / 1e6:g}m{'b' if measure == 'bytes' else ''}"


def _write(path: Path, name: str, recipe: dict[str, Any], text: str) -> None:
    if not recipe["stages"]:
        raise InputError(f"{name}: the base model fits the budget as it is; there is nothing to compress")
    if not NAME.fullmatch(name):
        raise InputError(f"recipe name {name!r} must be lower-case words joined by hyphens")
    if path.exists() and not path.read_text(encoding="utf-8").startswith(MADE):
        raise InputError(f"{path} exists and was not made by plan; give another --name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    load_recipe(partial)  # it must run like any other
    partial.replace(path)


def _bank(
    model: str, settings: Settings, options: BankOptions, calibration: Calibration
) -> tuple[str, Bank, dict[str, Any], bool]:
    import dagster as dg

    from assets.base_models import base_model
    from assets.calibration import build_calibration_assets, calibration_key
    from assets.planning import NAME as ALTERNATIVES
    from assets.planning import build_alternatives
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.cli_run import admit, check_model, execute, recall, resolve, speak

    speak()
    source = resolve(model, settings, None)
    check_model(source, [], settings)
    admit(source, settings)
    assets = [base_model, *build_calibration_assets(calibration), build_alternatives(calibration, options)]
    definitions = dg.Definitions(assets=assets, resources=settings.resources(), executor=dg.in_process_executor)
    names = ["calibration_tokens", *["calibration_activations"] * bool(options.sparsities), ALTERNATIVES]
    wanted = [base_model.key, *(calibration_key(calibration, name) for name in names)]
    result = execute(definitions, source.slug, wanted, settings)
    states = {
        e.asset_key: e.materialization.metadata["cache"].value
        for e in result.all_events
        if e.is_step_materialization and e.asset_key is not None
    }
    base, bank = (recall(settings, key, source.slug) for key in (wanted[0], wanted[-1]))
    return source.slug, Bank.load(bank.path), Checkpoint(base.checkpoint).config, states[wanted[-1]] == "hit"
