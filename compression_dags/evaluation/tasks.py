"""What can be measured: perplexity of a text, or a task of lm-eval. Suites, and the names a user may give for either.

This module is read where recipes are validated, so it imports neither torch nor lm-eval.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compression_dags.errors import InputError
from compression_dags.options import Options
from compression_dags.paths import PROJECT

TEXT_FILES = (".jsonl", ".txt", ".parquet")
#: Task names become Dagster asset names (`eval_<task>`), which allow nothing else.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class _Task(Options):
    version: ClassVar[str]

    name: Name
    description: str = ""

    def options(self) -> dict[str, Any]:
        """What changes the numbers, for the fingerprint. Names and places do not: `data_digest` stands for the data."""
        return self.model_dump(mode="json", exclude={"name", "description", "file"})


class PerplexityTask(_Task):
    """Perplexity of a text in non-overlapping windows (see `perplexity.py` for the protocol).

    Attributes:
        file: .jsonl rows with `text`, .parquet with a `text` column, or .txt (one row); absolute, or relative to the
            working directory or else to the project's own files.
        window: tokens in a window; clipped to the model's context, and the clipped value names the metric.
        max_windows: at most so many windows, spaced evenly over the text; None takes all.
    """

    version: ClassVar[str] = "2"

    kind: Literal["perplexity"] = "perplexity"
    file: str
    window: int = Field(default=2048, ge=2)
    max_windows: int | None = Field(default=None, ge=1)

    @property
    def path(self) -> Path:
        here = Path(self.file).expanduser().absolute()
        return here if here.is_file() else PROJECT / Path(self.file).expanduser()

    def read(self) -> str:
        """The text: all rows, empty ones included, joined by two newlines.

        Raises:
            InputError: no such file, an unknown form, a row without `text`, or nothing but white space.
        """
        if not self.path.is_file():
            raise InputError(f"task {self.name}: the text {self.file} does not exist")
        text = "\n\n".join(_rows(self.path))
        if not text.strip():
            raise InputError(f"task {self.name}: the text {self.file} is empty")
        return text


class HarnessTask(_Task):
    """A task of lm-eval, read from a local folder where there is one and from the hub otherwise.

    Attributes:
        task: lm-eval's name; by default `name`.
        num_fewshot: examples in the prompt; None keeps the task's own setting.
        limit: only the first so many documents; None takes all.
    """

    version: ClassVar[str] = "2"

    kind: Literal["lm-eval"] = "lm-eval"
    task: str
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _task_is_name(cls, values: Any) -> Any:
        return {"task": values.get("name"), **values} if isinstance(values, dict) else values


Task = Annotated[PerplexityTask | HarnessTask, Field(discriminator="kind")]


class TaskBook(BaseModel):
    """The tasks and suites of `recipes/evaluation.yaml`.

    Attributes:
        suites: name → tasks, or lm-eval's names.
        default_suites: base model slug, or `*` for any other → suite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: dict[Name, Task]
    suites: dict[Name, list[str]] = {}
    default_suites: dict[str, str] = {}

    @model_validator(mode="after")
    def _names_agree(self) -> TaskBook:
        if both := sorted(self.tasks.keys() & self.suites):
            raise ValueError(f"both a task and a suite are called {', '.join(both)}")
        for slug, suite in self.default_suites.items():
            if suite not in self.suites:
                raise ValueError(f"default_suites: {slug}: {suite!r} is no suite; suites: {', '.join(self.suites)}")
        return self

    def default_names(self, slug: str) -> list[str]:
        """The tasks of a base model for which no recipe says otherwise.

        Raises:
            InputError: neither the slug nor `*` has a default suite.
        """
        suite = self.default_suites.get(slug) or self.default_suites.get("*")
        if suite is None:
            raise InputError(f"no default suite for {slug}: name it, or `*`, in default_suites")
        return list(self.suites[suite])

    def resolve(self, names: Sequence[str]) -> list[PerplexityTask | HarnessTask]:
        """Tasks behind names of tasks, suites, text files or lm-eval tasks, each once, in order of first mention.

        Unknown names are taken for lm-eval's without looking (lm-eval is slow to ask): see `check_harness`.

        Raises:
            InputError: a text file that does not exist, or two different tasks under one name.
        """
        found: dict[str, PerplexityTask | HarnessTask] = {}
        for name in names:
            for member in self.suites.get(name, [name]):
                task = self.tasks.get(member) or self._from_outside(member)
                known = found.setdefault(task.name, self.tasks.get(task.name, task))
                if known != task:
                    raise InputError(f"{member!r} would be reported as {task.name!r}, the name of another task")
        return list(found.values())

    def check_harness(self, names: Sequence[str], data_dirs: Sequence[Path] = ()) -> None:
        """Refuse names that are neither tasks, suites, files nor defined by lm-eval or beside local data.

        Raises:
            InputError: naming the tasks, the suites and the nearest known names.
        """
        from compression_dags.evaluation.harness import builtin_tasks, definition

        for task in self.resolve(names):
            if isinstance(task, PerplexityTask) or definition(task.task, data_dirs):
                continue
            known = dict.fromkeys([*self.tasks, *self.suites, *builtin_tasks()])
            near = difflib.get_close_matches(task.task, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(
                f"unknown evaluation task {task.task!r}; tasks: {', '.join(self.tasks)}; suites: "
                f"{', '.join(self.suites)}; or a text file, or any task of lm-eval{hint}"
            )

    def _from_outside(self, name: str) -> PerplexityTask | HarnessTask:
        path = Path(name).expanduser()
        if path.suffix in TEXT_FILES:
            if not path.is_file():
                raise InputError(f"evaluation text {name!r} does not exist")
            return PerplexityTask(name=slug(path.stem), file=str(path.resolve()))
        return HarnessTask(name=slug(name), task=name)


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_") or "text"


def load_tasks(path: Path) -> TaskBook:
    """Read `tasks:`, `suites:` and `default_suites:`.

    Raises:
        InputError: naming the file, the place in it and what is wrong there.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("tasks"), dict):
        raise InputError(f"{path}: `tasks:` must map names to tasks")
    tasks = {name: {**fields, "name": name} if isinstance(fields, dict) else fields for name, fields in _items(raw)}
    try:
        return TaskBook.model_validate({**raw, "tasks": tasks})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: {place + ': ' if place else ''}{first['msg']} (got {first['input']!r:.80})"
        ) from None


def data_digest(task: PerplexityTask | HarnessTask, data_dirs: Sequence[Path] = ()) -> str:
    """sha256 of what a task measures on: its text, or its prompt definition and local data files.

    Data that lm-eval takes from the hub is represented by the task's definition, which names the data set and the
    task's version.

    Raises:
        InputError: the text does not exist, or lm-eval does not know the task.
    """
    if isinstance(task, PerplexityTask):
        if not task.path.is_file():
            raise InputError(f"task {task.name}: the text {task.file} does not exist")
        return hashlib.sha256(task.path.read_bytes()).hexdigest()
    from compression_dags.evaluation.harness import harness_digest

    return harness_digest(task.task, data_dirs)


def _items(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, fields in raw["tasks"].items():
        yield str(name), {} if fields is None else fields


def _rows(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    if path.suffix == ".jsonl":
        return [_row(path, number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if path.suffix != ".parquet":
        raise InputError(f"{path} must be one of {', '.join(TEXT_FILES)}")
    import pyarrow.parquet

    if "text" not in (names := pyarrow.parquet.read_schema(path).names):
        raise InputError(f"{path} needs a `text` column; it has {', '.join(names)}")
    return [text or "" for text in pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()]


def _lines(path: Path) -> list[str]:
    # not splitlines(): JSON strings may hold U+2028 and the like unescaped
    return path.read_text(encoding="utf-8").split("\n")


def _row(path: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}:{number} is not a JSON object with a `text`") from None
