"""What can be measured: perplexity of a text, or a task of lm-eval. Suites, and the names a user may give for either.

This module is read where recipes are validated, so it imports neither torch nor lm-eval.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compression_dags import yaml_reader
from compression_dags.calibration import texts
from compression_dags.errors import InputError
from compression_dags.options import Options
from compression_dags.paths import PROJECT

#: Characters of a task's name; `eval_<name>` is an asset and a folder.
MAX_NAME = 80
#: Task names become Dagster asset names (`eval_<task>`), which allow nothing else.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=MAX_NAME)]


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
        file: a file that `texts` reads; absolute, or relative to the project's root.
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
            InputError: no such file, a row that is no text, or nothing but white space.
        """
        self.check()
        return "\n\n".join(texts.rows(self.path))

    def check(self) -> None:
        """Refuse a text that cannot be scored, before any compute.

        Raises:
            InputError: as `read`.
        """
        if not self.path.exists():
            raise InputError(f"task {self.name}: the text {self.file} does not exist")
        try:
            filled = texts.check(self.path)
        except InputError as error:
            raise InputError(f"task {self.name}: {error}") from None
        if not filled:
            raise InputError(f"task {self.name}: the text {self.file} is empty")


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
        """Refuse bad texts, and names that are neither tasks, suites, files, nor known to lm-eval or local data.

        Raises:
            InputError: naming the tasks, the suites and the nearest known names; or a text, and its row.
        """
        self.check_tasks(self.resolve(names), data_dirs)

    def check_tasks(self, tasks: Sequence[PerplexityTask | HarnessTask], data_dirs: Sequence[Path] = ()) -> None:
        """Refuse tasks that cannot be scored, as `check_harness` does."""
        # the table of tasks is read without the harness
        from compression_dags.evaluation.harness import builtin_tasks, definition  # noqa: PLC0415

        for task in tasks:
            if isinstance(task, PerplexityTask):
                task.check()
                continue
            if definition(task.task, data_dirs):
                continue
            known = dict.fromkeys([*self.tasks, *self.suites, *builtin_tasks()])
            near = difflib.get_close_matches(task.task, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(
                f"unknown evaluation task {task.task!r}; tasks: {', '.join(self.tasks)}; suites: "
                f"{', '.join(self.suites)}; or a text file, or any task of lm-eval{hint}"
            )

    def _from_outside(self, name: str) -> PerplexityTask | HarnessTask:
        if not texts.is_text_file(name):
            return HarnessTask(name=slug(name), task=name)
        path = Path(name).expanduser()
        if not path.exists():
            raise InputError(f"evaluation text {name!r} does not exist")
        texts.regular(path)
        return PerplexityTask(name=slug(texts.stem(path)), file=str(path.resolve()))


def slug(text: str) -> str:
    """A task's name made of any text: letters, digits and underscores, at most `MAX_NAME` of them."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_") or "text"
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 7]}_{short_hash(text)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:6]


def load_tasks(path: Path) -> TaskBook:
    """The tasks, suites and defaults under `tasks:`, `suites:` and `default_suites:`.

    Raises:
        InputError: naming the file, the place in it and what is wrong there.
    """
    document = yaml_reader.read_file(path)
    raw = document.values
    if not isinstance(raw.get("tasks"), dict):
        raise document.fail(("tasks",), "`tasks:` must map names to tasks")
    tasks = {name: {**fields, "name": name} if isinstance(fields, dict) else fields for name, fields in _items(raw)}
    try:
        return TaskBook.model_validate({**raw, "tasks": tasks})
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(k for i, k in enumerate(first["loc"]) if i != 2 or first["loc"][0] != "tasks")  # 2: the kind
        where = ".".join(map(str, first["loc"]))
        said = f"{where + ': ' if where else ''}{first['msg']} (got {yaml_reader.shown(first['input'])})"
        raise InputError(f"{path}:{document.line(place)}: {said}") from None


def evaluation_book(folder: Path) -> TaskBook:
    """The tasks of a recipes folder: its own `evaluation.yaml` if it has one, else the project's.

    Raises:
        InputError: naming the file, the place in it and what is wrong there.
    """
    own = folder / "evaluation.yaml"
    return load_tasks(own if os.path.lexists(own) else PROJECT / "recipes" / "evaluation.yaml")


def data_digest(task: PerplexityTask | HarnessTask, data_dirs: Sequence[Path] = ()) -> str:
    """sha256 of what a task measures on: its text, or its prompt definition and local data files.

    Data that lm-eval takes from the hub is represented by the task's definition, which names the data set and the
    task's version.

    Raises:
        InputError: the text does not exist, or lm-eval does not know the task.
    """
    if isinstance(task, PerplexityTask):
        return texts.digest(task.path)
    # the table of tasks is read without the harness
    from compression_dags.evaluation.harness import harness_digest  # noqa: PLC0415

    return harness_digest(task.task, data_dirs)


def _items(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, fields in raw["tasks"].items():
        yield name, {} if fields is None else fields
