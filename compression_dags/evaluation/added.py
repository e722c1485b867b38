"""Tasks that were asked for by name on the command line, and are remembered in a home so that the UI shows them too."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from compression_dags import statefile
from compression_dags.calibration import texts
from compression_dags.errors import InputError
from compression_dags.evaluation.tasks import PerplexityTask, Task, TaskBook, short_hash, slug

FILE = "tasks.json"
logger = logging.getLogger("compression_dags")


def asked_tasks(value: str, book: TaskBook, known: Sequence[Task], data_dirs: Sequence[Path] = ()) -> list[Task]:
    """The tasks that `--tasks A,B` means, checked: texts were read, and lm-eval knows the others.

    Blanks around a name and empty names are dropped. A text whose name another task has gets a part of its path's
    hash behind it. Nothing is remembered here.

    Args:
        known: tasks remembered in the home, whose names are taken.

    Raises:
        InputError: no name at all, an unknown one, or a text that cannot be read.
    """
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise InputError(f"--tasks {value!r} names no task; give names of tasks or suites, or text files")
    taken = {task.name: task for task in known}
    found: dict[str, Task] = {}
    for name in names:
        for task in _tasks_of(name, book, {**taken, **found}):
            found[task.name] = task
    book.check_tasks(list(found.values()), data_dirs)
    return list(found.values())


def added_tasks(home: Path, book: TaskBook) -> list[Task]:
    """The tasks remembered in a home that still are what they were; the others are left out and said."""
    found: dict[str, Task] = {}

    def parse(name: str, reference: Any) -> None:
        if not isinstance(reference, str):
            raise ValueError("it is no name of a task")
        for task in _tasks_of(reference, book, found, name):
            if isinstance(task, PerplexityTask):
                texts.regular(task.path)
            found[task.name] = task

    file = home / FILE
    for position, reference in enumerate(_as_list(file)):
        try:
            parse("", reference)
        except ValueError as error:
            logger.warning("%s: entry %d is left out: %s", file, position + 1, " ".join(str(error).split()))
    if not found:
        statefile.read_entries(file, parse)
    return list(found.values())


def remember(home: Path, tasks: Iterable[Task], book: TaskBook) -> None:
    """Keep checked tasks in a home. Those that every home has, and those remembered already, are not written.

    Raises:
        OSError: nothing was changed.
    """
    file = home / FILE
    with statefile.locked(file):
        known = {task.name: task for task in added_tasks(home, book)}
        wanted = known | {task.name: task for task in tasks}
        if wanted != known:
            statefile.write_entries(file, {name: _reference(task, book) for name, task in wanted.items()})


def _tasks_of(reference: str, book: TaskBook, taken: dict[str, Task], name: str = "") -> list[Task]:
    """Tasks behind a name; a text is called `name`, or after its file, or that and a hash where the name is taken."""
    if reference in book.tasks or reference in book.suites or not texts.is_text_file(reference):
        found = list(book.resolve([reference]))
        for task in found:
            if taken.get(task.name, task) != task:
                raise InputError(f"{reference!r} would be reported as {task.name!r}, the name of another task")
        return found
    path = Path(reference).expanduser()
    if not path.exists():
        raise InputError(f"evaluation text {reference!r} does not exist")
    texts.regular(path)
    plain = name or slug(texts.stem(path))
    named = slug(f"{plain}_{short_hash(str(path.resolve()))}")
    others = {member for suite in book.suites.values() for member in suite} | book.suites.keys()
    for own in (plain, named):
        task = PerplexityTask(name=own, file=str(path.resolve()))
        if own not in others - book.tasks.keys() and {**book.tasks, **taken}.get(own, task) == task:
            return [task]
    raise InputError(f"{reference!r} would be reported as {named!r}, the name of another task")


def _reference(task: Task, book: TaskBook) -> str:
    if book.tasks.get(task.name) == task:
        return task.name
    return task.file if isinstance(task, PerplexityTask) else task.task


def _as_list(file: Path) -> list[Any]:
    """The entries of a file as homes of the first version have it: a list without names."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return raw if isinstance(raw, list) else []
