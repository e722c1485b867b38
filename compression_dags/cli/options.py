"""What the verbs of the command line share: how failures end them, their options, and how they print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compression_dags import failures
from compression_dags.errors import InputError
from compression_dags.paths import what_is
from compression_dags.provenance.escaping import visible

if TYPE_CHECKING:
    from compression_dags.definitions import Settings


class Cli(click.Group):
    """Turns every failure into one line on standard error and an exit code (see `failures`)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except (click.ClickException, click.exceptions.Exit, SystemExit):
            raise
        except BrokenPipeError:  # the reader has what it wanted, as in `recipes | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(141)
        except BaseException as error:  # Dagster's interruption is no Exception
            failures.show_traceback(error)
            failure = failures.explain(KeyboardInterrupt() if isinstance(error, click.Abort) else error)
            click.echo(visible(failure.spoken()), err=True)
            ctx.exit(failure.exit_code)


def _home(_: click.Context, __: click.Parameter, value: str | None) -> Path:
    path = Path(value or os.environ.get("COMPRESSION_DAGS_HOME") or ".compression_dags").absolute()
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"home {path} cannot be read: Permission denied")
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"home {path} {what_is(path)}; give a folder with --home")
    os.environ["COMPRESSION_DAGS_HOME"] = str(path)
    return path


home_option = click.option("--home", callback=_home, help="Artifact store, models, Dagster instance.", metavar="DIR")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
model_option = click.option(
    "-m", "--model", required=True, metavar="MODEL", help="Name, directory or hub id[@revision]."
)


def emit(value: Any, as_json: bool, text: str) -> None:
    """Print a value as JSON, or its text."""
    click.echo(json.dumps(value, indent=1) if as_json else visible(text))


def run_options(command: Any) -> Any:
    """The verb with the options of everything that computes."""
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


def settings_of(home: Path, device: str | None, dtype: str | None, eval_data: str | None) -> Settings:
    """The settings of the environment, in which what was given is written first."""
    given = {"DEVICE": device, "DTYPE": dtype, "EVAL_DATA": eval_data}
    os.environ.update({f"COMPRESSION_DAGS_{k}": v for k, v in given.items() if v is not None})
    from compression_dags.definitions import Settings

    return Settings.from_environment()
