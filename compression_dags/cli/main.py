"""`compression-dags`: the command line. Reading verbs import neither Dagster nor torch where they can avoid it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from compression_dags import failures
from compression_dags.cli.options import (
    Cli,
    emit,
    home_option,
    json_option,
    model_option,
    run_options,
    settings_of,
)
from compression_dags.errors import InputError
from compression_dags.provenance.escaping import line

DEMO = ("reverse-20", "shortgpt-20", "shortgpt-20-ls", "weighted-sum-20-ls", "rtn-w4", "angular-20-ls-rtn-w4")


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="compression-dags")
@click.option("--debug", is_flag=True, help=f"Show where a failure came from; so does {failures.DEBUG}=1.")
def main(debug: bool) -> None:
    """Turn base LLMs into compressed, measured, servable checkpoints, as one Dagster asset graph."""
    if debug:
        os.environ[failures.DEBUG] = "1"


@main.command()
@model_option
@click.option("-r", "--recipe", "recipes", multiple=True, required=True, metavar="RECIPE", help="May be repeated.")
@click.option("--tasks", default=None, metavar="A,B", help="Tasks or suites, instead of the recipe's own.")
@click.option("--name", default=None, help="Name (partition key) for a model directory.")
@click.option(
    "--sequences", type=click.IntRange(1), default=None, help="Calibration sequences, instead of the recipe's."
)
@click.option("--length", type=click.IntRange(8), default=None, help="Tokens in a calibration sequence, likewise.")
@run_options
def run(
    model: str,
    recipes: tuple[str, ...],
    tasks: str | None,
    name: str | None,
    sequences: int | None,
    length: int | None,
    home: Path,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    eval_data: str | None,
) -> None:
    """Register MODEL if it is new, compute what is missing through Dagster, print the scoreboard."""
    _refuse_unknown(recipes)
    from compression_dags.cli.run import run_recipes

    settings = settings_of(home, device, dtype, eval_data)
    calibration = {k: v for k, v in (("sequences", sequences), ("length", length)) if v is not None}
    outcome = run_recipes(model, list(recipes), settings, tasks=tasks, name=name, calibration=calibration)
    emit(outcome.to_json(), as_json, outcome.scoreboard())
    if not as_json:
        click.echo(outcome.closing())


def _refuse_unknown(recipes: tuple[str, ...]) -> None:
    """Refuse recipes that there are not, in a second: the checks of a run come after Dagster's imports."""
    from compression_dags.cli.lines import configure_logging
    from compression_dags.recipes import load_recipes, pick_recipes

    configure_logging()
    pick_recipes(load_recipes(), list(recipes))


@main.command()
@run_options
def demo(home: Path, as_json: bool, device: str | None, dtype: str | None, eval_data: str | None) -> None:
    """The tour: six recipes on the embedded novella-13m, scored on text it was not trained on."""
    from compression_dags.cli.run import run_recipes

    settings = settings_of(home, device, dtype, eval_data)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    outcome = run_recipes("novella-13m", list(DEMO), settings)
    emit(outcome.to_json(), as_json, outcome.scoreboard())
    if not as_json:
        click.echo(outcome.closing())


@main.command()
@model_option
@click.option("--bytes", "sizes", multiple=True, metavar="SIZE", help="All weights in at most SIZE, e.g. 120MB.")
@click.option("--params", "parameters", multiple=True, metavar="N", help="At most N parameters, e.g. 90M.")
@click.option("--bits", "bits", multiple=True, metavar="B", help="Average stored bits a projection weight, e.g. 4.5.")
@click.option("--schemes", default=None, metavar="A,B", help="Default W8A16,W4A16,W3A16,W3A16/128 (NAME or NAME/SIZE).")
@click.option(
    "--group-size",
    type=click.IntRange(16),
    default=None,
    help="Inputs sharing a scale where no SIZE is named; default 64.",
)
@click.option("--sparsities", default=None, metavar="A,B", help="Shares of zeros to choose from, for --params.")
@click.option("--depth/--no-depth", default=True, help="Also drop and merge layers.")
@click.option("--quantizer", default="gptq", show_default=True, help="Method, or {method: …, …}.")
@click.option("--recover", default="auto", show_default=True, help="After layers went: none, a method, or {method: …}.")
@click.option("--name", default=None, help="Name of the recipe; with several budgets, its beginning.")
@click.option("--to", "folder", default=None, metavar="DIR", help="Where the recipe goes; default: ./recipes.")
@click.option("--sequences", type=click.IntRange(2), default=None, help="Calibration sequences.")
@click.option("--length", type=click.IntRange(8), default=None, help="Tokens in a calibration sequence.")
@run_options
def plan(model: str, home: Path, as_json: bool, **options: Any) -> None:
    """Measure what every layer could become, choose the best for a budget, write it as a recipe."""
    from compression_dags.cli.plan import budgets_of, plan_budgets, planning_options

    settings = settings_of(home, *(options.pop(key) for key in ("device", "dtype", "eval_data")))
    budgets = budgets_of(**{key: options.pop(key) for key in ("sizes", "parameters", "bits")})
    asked = ("schemes", "group_size", "sparsities", "depth", "quantizer", "recover", "sequences", "length")
    bank, calibration = planning_options(**{key: options.pop(key) for key in asked})
    folder = options.pop("folder")
    found = plan_budgets(
        model, budgets, settings, options=bank, calibration=calibration, folder=folder and Path(folder), **options
    )
    emit([p.to_json() for p in found], as_json, "\n".join(p.line() for p in found))
    if not as_json:
        click.echo(f"run it: compression-dags run -m {model} " + " ".join(f"-r {p.name}" for p in found))


@main.group(invoke_without_command=True)
@home_option
@json_option
@click.pass_context
def models(ctx: click.Context, home: Path, as_json: bool) -> None:
    """List base models, embedded and registered."""
    if ctx.invoked_subcommand:
        return
    from compression_dags.cli.models import list_models, models_text

    listed = list_models(home)
    emit(listed, as_json, models_text(listed))


@models.command("add")
@click.argument("model")
@click.option("--name", default=None, help="Name (partition key) for a model directory.")
@home_option
@json_option
def models_add(model: str, name: str | None, home: Path, as_json: bool) -> None:
    """Check and import MODEL, then register it."""
    from compression_dags.cli.models import metadata_text
    from compression_dags.cli.run import add_model

    artifact = add_model(model, settings_of(home, None, None, None), name)
    emit(artifact.metadata, as_json, metadata_text(artifact.metadata))


@models.command("inspect")
@click.argument("model")
@home_option
@json_option
def models_inspect(model: str, home: Path, as_json: bool) -> None:
    """Print what MODEL is made of: kinds of layers, matrices by common input, experts."""
    from dataclasses import asdict

    from compression_dags.cli.inspect import inspect_model, text

    found = inspect_model(home, model)
    emit(asdict(found), as_json, text(found))


@models.command("remove")
@click.argument("name")
@home_option
@json_option
def models_remove(name: str, home: Path, as_json: bool) -> None:
    """Forget the model NAME; its artifacts stay until `store --prune`."""
    from compression_dags.cli.models import remove_model

    removed = remove_model(home, name)
    emit({"removed": removed}, as_json, f"{removed} is forgotten; `compression-dags store --prune` frees its artifacts")


@main.command()
@click.option("--all", "everything", is_flag=True, help="Also those of the papers' studies; --json always has them.")
@json_option
def recipes(everything: bool, as_json: bool) -> None:
    """List and validate recipes, your own in ./recipes and those shipped; exit 2 if a file had to be left out."""
    from compression_dags.evaluation.tasks import evaluation_book
    from compression_dags.recipes import load_recipes, recipes_folder

    found = load_recipes()
    found.resolve(lambda: evaluation_book(recipes_folder()))
    studies = found.studies
    ordered = sorted(found.values(), key=lambda recipe: recipe.name in studies)
    lines = [
        f"{r.name:28} {' → '.join(f'{s.stage}:{s.method}' for s in r.stages):44} {line(r.description)}"
        for r in ordered
        if everything or r.name not in studies
    ]
    if studies and not everything:
        lines += ["", f"and {len(studies)} of studies; --all lists them"]
    described: dict[str, Any] = {r.name: r.describe() for r in ordered}
    if found.left_out:  # no recipe can have this name
        described["left_out"] = {str(path): why for path, why in found.left_out.items()}
        lines += ["", f"left out: {len(found.left_out)}", *(f"  {why}" for why in found.left_out.values())]
    emit(described, as_json, "\n".join(lines))
    if found.left_out:
        sys.exit(2)


@main.command()
@json_option
def methods(as_json: bool) -> None:
    """List methods with their parameters."""
    from compression_dags.registry import METHODS
    from compression_dags.sparsity.allocators import ALLOCATORS

    described = {
        f"{stage}: {name}": {
            "about": (method.__doc__ or "").strip(),
            "version": method.version,
            "parameters": {
                key: {"default": _default(field), "about": field.description or "", "type": _type(field)}
                for key, field in method.model_fields.items()
                if key != "method"
            },
        }
        for stage, group in ({**METHODS, "allocation of sparsify": ALLOCATORS}).items()
        for name, method in group.items()
    }
    blocks = []
    for title, entry in described.items():
        about = " ".join(entry["about"].split("\n\n")[0].split())
        rows = [f"    {k} = {p['default']}   {p['about']}".rstrip() for k, p in entry["parameters"].items()]
        blocks.append("\n".join([f"{title}  (version {entry['version']})", f"  {about}", *rows]))
    emit(described, as_json, "\n\n".join(blocks))


def _default(field: Any) -> Any:
    found: Any = None if field.is_required() else field.get_default(call_default_factory=True)
    return {"method": found.method} if hasattr(found, "method") else found


def _type(field: Any) -> str:
    if field.discriminator:
        return "an allocation: {method: …}"
    return str(field.annotation).replace("typing.", "")


@main.command()
@click.option("-m", "--model", default=None, metavar="MODEL", help="Only this base model.")
@home_option
@json_option
def leaderboard(model: str | None, home: Path, as_json: bool) -> None:
    """Scores of all recipes that were run, against the baseline."""
    from compression_dags.cli.export import changed_recipes
    from compression_dags.cli.results import leaderboard_text, leaderboards

    tables = leaderboards(home, model)
    changed = {slug: changed_recipes(home, slug, list(table["family"])) for slug, table in tables.items()}
    for slug, table in tables.items():
        table["recipe_changed"] = [changed[slug].get(name) for name in table["family"]]
    emit(
        {slug: json.loads(t.to_json(orient="records") or "[]") for slug, t in tables.items()},
        as_json,
        leaderboard_text(tables),
    )


@main.command()
@model_option
@click.option("-r", "--recipe", default=None, metavar="RECIPE")
@click.option("--stage", default=None, metavar="STAGE", help="merge, recover, sparsify or quantize.")
@home_option
@json_option
def decisions(model: str, recipe: str | None, stage: str | None, home: Path, as_json: bool) -> None:
    """The decision ledger of a model: what was done to every layer and tensor, and why."""
    from compression_dags.cli.results import ledger, ledger_text

    frame = ledger(home, model, recipe, stage)
    emit(json.loads(frame.to_json(orient="records") or "[]"), as_json, ledger_text(frame))


# -1 is then a layer that is refused by its range, not an option that nobody knows
@main.command(context_settings={"ignore_unknown_options": True})
@model_option
@click.option("-r", "--recipe", required=True, metavar="RECIPE")
@click.argument("layer")
@home_option
@json_option
def why(model: str, recipe: str, layer: str, home: Path, as_json: bool) -> None:
    """What a recipe did to LAYER (24, or model.layers.24.mlp.down_proj), step by step, and why."""
    from compression_dags.cli.why import tell
    from compression_dags.reports.story import story_text

    slug, told = tell(home, model, recipe, layer)
    emit({"base_model": slug, "recipe": recipe, **told.to_json()}, as_json, story_text(told, slug, recipe))


@main.command()
@model_option
@click.option("-r", "--recipe", required=True, metavar="RECIPE")
@click.option("--to", "target", required=True, metavar="DIR", help="A new or empty directory.")
@click.option("--as-run", is_flag=True, help="What was run, though the recipe says something else now.")
@home_option
@json_option
def export(model: str, recipe: str, target: str, as_run: bool, home: Path, as_json: bool) -> None:
    """Write a stock checkpoint directory with model card and lineage."""
    from compression_dags.cli.export import export_checkpoint

    written = export_checkpoint(home, model, recipe, Path(target), as_run=as_run)
    emit({"checkpoint": str(written)}, as_json, f"{written}: loads with AutoModelForCausalLM.from_pretrained")


@main.command()
@click.option("--check", is_flag=True, help="Hash every artifact; exit 1 if one is damaged.")
@click.option("--prune", is_flag=True, help="List what nothing in the home names.")
@click.option("--yes", is_flag=True, help="With --prune: delete it.")
@click.option("--recipes-gone", is_flag=True, help="With --prune: also what only recipes name that are gone.")
@click.option("--days", type=click.FloatRange(0), default=1.0, show_default=True, help="With --prune: spare younger.")
@click.option("--wait", is_flag=True, help="With --prune --yes: wait for runs at work.")
@home_option
@json_option
@click.pass_context
def store(ctx: click.Context, home: Path, as_json: bool, check: bool, prune: bool, yes: bool, **options: Any) -> None:
    """Size of the artifact store by kind; check it; prune what nothing names (dry run first)."""
    from compression_dags.cli import store as verbs

    if check and prune:
        raise InputError("store: --check or --prune, one at a time")
    if check:
        found = verbs.check_store(home)
        emit(verbs.checked_json(found), as_json, verbs.checked_text(found))
        ctx.exit(1 if found.damaged else 0)
    if prune:
        pruned = verbs.prune_store(home, delete=yes, **options)
        emit(verbs.pruned_json(home, pruned, yes), as_json, verbs.pruned_text(home, pruned, yes))
        ctx.exit(1 if pruned.failed else 0)
    sizes = verbs.store_sizes(home)
    emit(sizes, as_json, verbs.sizes_text(home, sizes))


@main.command()
@home_option
@click.option("--port", type=click.IntRange(0, 65535), default=3000, show_default=True, help="0: any that is free.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--allow-host",
    "allowed",
    multiple=True,
    metavar="NAME[:PORT]",
    help="A further name that browsers may use for it, e.g. of a reverse proxy. May be repeated.",
)
@click.option("--read-only", is_flag=True, help="Show everything, change nothing; sensors and schedules rest.")
def ui(home: Path, port: int, host: str, allowed: tuple[str, ...], read_only: bool) -> None:
    """Open Dagster on this home, with its sensors and schedules.

    Requests must carry a name that the UI listens on, and must not come from foreign web pages.
    """
    from compression_dags.cli.ui import open_ui

    open_ui(home, host, port, allowed, read_only)
