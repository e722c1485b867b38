"""`compression-dags`: the command line. Reading verbs import neither Dagster nor torch where they can avoid it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from compression_dags.errors import InputError

DEMO = ("reverse-20", "shortgpt-20", "shortgpt-20-ls", "weighted-sum-20-ls", "rtn-w4", "angular-20-ls-rtn-w4")


class Cli(click.Group):
    """Turns the two kinds of failure into one line and an exit code: bad input 2, failed work 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except WorkFailed as error:
            click.echo(f"failed: {error}", err=True)
            ctx.exit(1)


class WorkFailed(RuntimeError):
    """A run started and did not finish."""


def _home(_: click.Context, __: click.Parameter, value: str | None) -> Path:
    path = Path(value or os.environ.get("COMPRESSION_DAGS_HOME") or ".compression_dags").absolute()
    os.environ["COMPRESSION_DAGS_HOME"] = str(path)
    return path


home_option = click.option("--home", callback=_home, help="Artifact store, models, Dagster instance.", metavar="DIR")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
model_option = click.option(
    "-m", "--model", required=True, metavar="MODEL", help="Name, directory or hub id[@revision]."
)


def emit(value: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(value, indent=1) if as_json else text)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="compression-dags")
def main() -> None:
    """Turn base LLMs into compressed, measured, servable checkpoints, as one Dagster asset graph."""


def run_options(command: Any) -> Any:
    for option in reversed(
        (
            home_option,
            json_option,
            click.option("--device", default=None, help="auto, cpu, cuda or cuda:N.", metavar="DEVICE"),
            click.option("--dtype", default=None, help="auto, float32, bfloat16 or float16.", metavar="DTYPE"),
            click.option("--eval-data", default=None, help="Folders <folder>/<task>/<split>.jsonl.", metavar="DIRS"),
        )
    ):
        command = option(command)
    return command


def _settings(home: Path, device: str | None, dtype: str | None, eval_data: str | None):
    given = {"DEVICE": device, "DTYPE": dtype, "EVAL_DATA": eval_data}
    os.environ.update({f"COMPRESSION_DAGS_{k}": v for k, v in given.items() if v is not None})
    from compression_dags.definitions import Settings

    return Settings.from_environment()


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
    from compression_dags.cli_run import run_recipes

    settings = _settings(home, device, dtype, eval_data)
    calibration = {k: v for k, v in (("sequences", sequences), ("length", length)) if v is not None}
    outcome = run_recipes(model, list(recipes), settings, tasks=tasks, name=name, calibration=calibration)
    emit(outcome.to_json(), as_json, outcome.scoreboard())
    if not as_json:
        click.echo(outcome.closing())


@main.command()
@run_options
def demo(home: Path, as_json: bool, device: str | None, dtype: str | None, eval_data: str | None) -> None:
    """The tour: six recipes on the embedded novella-13m, scored on text it was not trained on."""
    from compression_dags.cli_run import run_recipes

    settings = _settings(home, device, dtype, eval_data)
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
    from compression_dags.cli_plan import budgets_of, plan_budgets, planning_options

    settings = _settings(home, *(options.pop(key) for key in ("device", "dtype", "eval_data")))
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
    from resources.model_hub import EMBEDDED_MODELS, ModelHub

    registered = ModelHub(home=str(home)).registered()
    rows = {slug: {"kind": s.kind, "location": s.location, "revision": s.revision} for slug, s in registered.items()}
    embedded = {p.name: {"kind": "embedded", "location": str(p), "revision": None} for p in EMBEDDED_MODELS}
    listed = {**embedded, "smollm2-135m": {"kind": "wheel", "location": "smollm2-135m", "revision": None}, **rows}
    emit(listed, as_json, "\n".join(f"{slug:32} {r['kind']:10} {r['location']}" for slug, r in listed.items()))


@models.command("add")
@click.argument("model")
@click.option("--name", default=None, help="Name (partition key) for a model directory.")
@home_option
@json_option
def models_add(model: str, name: str | None, home: Path, as_json: bool) -> None:
    """Register MODEL, import and validate it."""
    from compression_dags.cli_run import add_model

    artifact = add_model(model, _settings(home, None, None, None), name)
    emit(artifact.facts, as_json, "\n".join(f"{k}: {v}" for k, v in artifact.facts.items() if k != "files"))


@main.command()
@json_option
def recipes(as_json: bool) -> None:
    """List and validate recipes: your own in ./recipes, and those that the project ships."""
    from compression_dags.recipes import load_recipes

    found = load_recipes()
    lines = [
        f"{r.name:28} {' → '.join(f'{s.stage}:{s.method}' for s in r.stages):44} {r.description}"
        for r in found.values()
    ]
    emit({name: r.describe() for name, r in found.items()}, as_json, "\n".join(lines))


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
    from compression_dags.cli_results import leaderboard_text, leaderboards

    tables = leaderboards(home, model)
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
    from compression_dags.cli_results import ledger

    frame = ledger(home, model, recipe, stage)
    shown = frame.drop(columns=["base_model", "fingerprint", "run_id"]).to_string(index=False, max_colwidth=60)
    emit(json.loads(frame.to_json(orient="records") or "[]"), as_json, shown)


@main.command()
@model_option
@click.option("-r", "--recipe", required=True, metavar="RECIPE")
@click.option("--to", "target", required=True, metavar="DIR", help="A new or empty directory.")
@home_option
@json_option
def export(model: str, recipe: str, target: str, home: Path, as_json: bool) -> None:
    """Write a stock checkpoint directory with model card and lineage."""
    from compression_dags.cli_results import export_checkpoint

    written = export_checkpoint(home, model, recipe, Path(target))
    emit({"checkpoint": str(written)}, as_json, f"{written}: loads with AutoModelForCausalLM.from_pretrained")


@main.command()
@click.option("--prune", is_flag=True, help="List what no live recipe reaches.")
@click.option("--yes", is_flag=True, help="With --prune: delete it.")
@home_option
@json_option
def store(prune: bool, yes: bool, home: Path, as_json: bool) -> None:
    """Size of the artifact store by kind; prune what no live recipe reaches (dry run first)."""
    from compression_dags.cli_results import prune_store, store_sizes

    if prune:
        removed = prune_store(home, delete=yes)
        verb = "removed" if yes else "would remove (add --yes to do it)"
        emit({"removed" if yes else "would_remove": removed}, as_json, "\n".join([f"{verb}: {len(removed)}", *removed]))
        return
    sizes = store_sizes(home)
    lines = [f"{kind:28} {e['artifacts']:5d} artifacts {e['bytes'] / 1e6:10.1f} MB" for kind, e in sizes.items()]
    emit(sizes, as_json, "\n".join(lines) or f"{home} holds no artifacts")


@main.command()
@home_option
@click.option("--port", default=3000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
def ui(home: Path, port: int, host: str) -> None:
    """Start `dagster dev` on the workspace with this home."""
    from compression_dags.cli_run import prepare_instance
    from compression_dags.paths import PROJECT

    os.environ["DAGSTER_HOME"] = str(prepare_instance(home))
    workspace = str(PROJECT / "workspace.yaml")
    command = [sys.executable, "-m", "dagster", "dev", "-w", workspace, "-p", str(port), "-h", host]
    click.echo(f"http://{host}:{port}", err=True)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    # `python -m`: under its own name, so that the errors which other modules raise are the ones caught here
    from compression_dags import cli

    cli.main()
