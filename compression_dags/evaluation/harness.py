"""lm-eval's tasks on a live model, from local folders or from the hub.

Local data for task `arc_easy` are `<data dir>/arc_easy/<split>.jsonl`, or `<data dir>/arc/easy/<split>.jsonl`, with the
fields of the hub's data set. A `<task>.yaml` beside them, in lm-eval's format, defines a task of one's own.

lm-eval's `TaskManager` parses 14,000 files before it knows a name (24 s). Here the files are searched as text for
names, and the manager is given only the families that hold the tasks asked for. Where a task has local data, an overlay
file that includes the original and redirects its data comes last, which lm-eval lets win.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import yaml

from compression_dags.errors import InputError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from compression_dags.evaluation.tasks import HarnessTask

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
#: Resamples behind the standard error of metrics without a closed form (lambada's perplexity).
BOOTSTRAPS = 1000
_HEAD = re.compile(r"^[\"']?(task|group|class)[\"']?:[ \t]*([^\n#]*)", re.MULTILINE)
_NOISY = ("lm_eval", "datasets", "huggingface_hub", "transformers", "httpx")


@dataclass(frozen=True)
class Leaf:
    """One lm-eval task that has data of its own (a group has none). It has the merged config, with functions as text,
    the file that defines it, and the folder of its local data or None for the hub."""

    name: str
    config: dict[str, Any]
    yaml: Path
    folder: Path | None


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[HarnessTask],
    data_dirs: Sequence[Path] = (),
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Scores of `model` on all tasks, in one call of lm-eval as far as their `limit`s agree.

    Windows, truncation and BOS are lm-eval's: BOS where the tokenizer adds one.

    Args:
        model: a transformers causal LM on its device, in evaluation mode.
        data_dirs: searched in order for local data.

    Returns:
        Task name → its numeric metrics (`acc`, `acc_stderr`, `acc_norm`, …; a filter other than `none` stays in the
        name), `version` (lm-eval's, of the task), `num_fewshot`, and `documents`.

    Raises:
        InputError: a task that lm-eval does not know, lacks data, or has no metric of its own (a tag or a bare group).
    """
    # lm-eval takes seconds to import, which only its own tasks need
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    found: dict[str, dict[str, float]] = {}
    with _quiet(), tempfile.TemporaryDirectory(prefix="lm-eval-") as cache:
        # all data are found before anything is computed
        calls = [(call, _load(call, data_dirs, Path(cache) / str(i))) for i, call in enumerate(_calls(tasks))]
        # HFLM gives the tokenizer a padding token: not the caller's
        make: Any = HFLM  # its metaclass hides the signature from the type checker
        lm = make(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        for call, (manager, loaded) in calls:
            results = _simple_evaluate(lm, manager, loaded, call[0].limit, seed)
            found |= {task.name: _metrics(results, task.task) for task in call}
    return {task.name: found[task.name] for task in tasks}


# Finding tasks --------------------------------------------------------------------------------------------------------


@functools.cache
def builtin_tasks() -> dict[str, Path]:
    """Every task and group that lm-eval ships → the file that defines it (about 1 s; no import of lm-eval)."""
    found: dict[str, Path] = {}
    for path in sorted(_builtin_root().glob("**/*.yaml"), key=Path.as_posix):
        heads = dict(reversed(_HEAD.findall(path.read_text(encoding="utf-8"))))  # reversed: the first of a key wins
        value = heads.get("task", "") if "class" in heads else heads.get("group") or heads.get("task", "")
        if name := value.strip().strip("\"'"):
            found.setdefault(name, path)  # as lm-eval does: the first file in sorted order
    return found


def definition(task: str, data_dirs: Sequence[Path] = ()) -> Path | None:
    """The YAML that defines an lm-eval task or group: beside local data, or lm-eval's own."""
    for folder in _folders(task, data_dirs):
        if (own := folder / f"{task}.yaml").is_file():
            return own
    return builtin_tasks().get(task)


def leaves(task: str, data_dirs: Sequence[Path] = ()) -> list[Leaf]:
    """The tasks with data behind a task or group, in lm-eval's order.

    Raises:
        InputError: lm-eval does not know the task.
    """
    with _quiet():
        return _leaves(task, _manager([task], data_dirs).task_index, data_dirs)


def harness_digest(task: str, data_dirs: Sequence[Path] = ()) -> str:
    """sha256 of lm-eval's version, the definitions of all leaves (data set and version included), and local files.

    Local files are the data, and whatever lies beside a definition of one's own: its functions may read or import it.

    Raises:
        InputError: lm-eval does not know the task.
    """
    digest = hashlib.sha256(importlib.metadata.version("lm-eval").encode())
    for leaf in leaves(task, data_dirs):
        text = json.dumps([leaf.name, leaf.config], default=str, sort_keys=True)
        folders = _code_folders(leaf)
        for place in (_builtin_root(), *folders):  # functions are named by their absolute path
            text = text.replace(str(place), "")
        digest.update(text.encode())
        files = {path.name: path for path in _split_files(leaf.folder).values()} if leaf.folder else {}
        for folder in folders:
            files |= {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if _may_be_read(path)}
        for name, path in sorted(files.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _code_folders(leaf: Leaf) -> list[Path]:
    """Folders of a leaf's own definition and of the functions that it names; none of lm-eval's own."""
    found = {leaf.yaml.parent.resolve()}
    for text in re.findall(r'"([^"]+)"', json.dumps(leaf.config, default=str)):
        path = Path(text)
        if path.is_absolute() and path.parent.joinpath(path.name.split(".")[0] + ".py").is_file():
            found.add(path.parent.resolve())
    return sorted(folder for folder in found if not folder.is_relative_to(_builtin_root()))


def _may_be_read(path: Path) -> bool:
    """Whether code beside a definition may use the file; caches, hidden files and notes it does not."""
    hidden = any(part.startswith((".", "__pycache__")) for part in path.parts[-3:])
    return path.is_file() and not hidden and path.suffix.lower() not in {".md", ".pyc"}


def _builtin_root() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.submodule_search_locations  # a dependency of the project
    return Path(next(iter(spec.submodule_search_locations))).resolve() / "tasks"


def _folders(task: str, data_dirs: Sequence[Path]) -> Iterator[Path]:
    """`<dir>/arc_easy`, then `<dir>/arc/easy`, of each data directory, where they exist."""
    parts = [task, *(f"{task[: m.start()]}/{task[m.end() :]}" for m in re.finditer("_", task))]
    yield from (folder for root in data_dirs for part in parts if (folder := Path(root).resolve() / part).is_dir())


def _split_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.jsonl"))}


def _leaves(task: str, index: dict[str, Any], data_dirs: Sequence[Path]) -> list[Leaf]:
    names = dict.fromkeys(n for n in _walk(task, index) if n in index and not _members(index[n]))
    folders = {name: next(filter(_split_files, _folders(name, data_dirs)), None) for name in names}
    return [Leaf(name, index[name].cfg, index[name].yaml_path, folder) for name, folder in folders.items()]


def _family(path: Path) -> Path:
    """The folder to index for a definition: lm-eval's whole family (groups name their siblings), or a local folder."""
    root = _builtin_root()
    return root / path.relative_to(root).parts[0] if path.is_relative_to(root) else path.parent


def _manager(tasks: Iterable[str], data_dirs: Sequence[Path], overlay: Path | None = None) -> TaskManager:
    """A manager that knows the families of `tasks` and of whatever their groups name."""
    # lm-eval takes seconds to import, which only its own tasks need
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    wanted, roots = list(tasks), []
    while True:
        paths = {name: definition(name, data_dirs) for name in wanted}
        if unknown := [name for name in tasks if name in paths and paths[name] is None]:
            raise InputError(f"lm-eval knows no task {unknown[0]!r}, and no local folder defines it")
        new = [family for path in paths.values() if path and (family := _family(path)) not in roots]
        roots += dict.fromkeys(new)
        manager = TaskManager(include_path=[*roots, *([overlay] if overlay else [])], include_defaults=False)
        groups = [name for task in tasks for name in _walk(task, manager.task_index)]
        wanted = [name for name in groups if name not in manager.task_index]
        if not new or not wanted:
            return manager


def _members(entry: Any) -> list[str]:
    """What a group or tag names directly; an inline group gives its own members."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    names: list[str] = []
    stack = list(reversed((entry.cfg or {}).get("task") or [])) if entry.kind.name == "GROUP" else []
    while stack:
        item = stack.pop()
        if isinstance(item, dict) and isinstance(item.get("task"), list):
            stack += reversed(item["task"])
        else:
            names.append(item if isinstance(item, str) else item.get("task") or item["group"])
    return names


def _walk(name: str, index: dict[str, Any]) -> Iterator[str]:
    yield name
    for member in _members(index[name]) if name in index else ():
        yield from _walk(member, index)


# Running them ---------------------------------------------------------------------------------------------------------


def _calls(tasks: Sequence[HarnessTask]) -> list[list[HarnessTask]]:
    """Tasks that can share one call: same `limit`, different names. lm-eval takes both per call."""
    calls: list[list[HarnessTask]] = []
    for task in tasks:
        fits = (c for c in calls if c[0].limit == task.limit and all(task.task != other.task for other in c))
        if (call := next(fits, None)) is not None:
            call.append(task)
        else:
            calls.append([task])
    return calls


def _load(tasks: list[HarnessTask], data_dirs: Sequence[Path], cache: Path) -> tuple[TaskManager, list[Any]]:
    """lm-eval's task and group objects, their data read, and the manager that made them.

    Raises:
        InputError: naming the task, and the folder where its data can go.
    """
    overlay = cache / "overlay"
    overlay.mkdir(parents=True)
    names = [task.task for task in tasks]
    index = _manager(names, data_dirs).task_index
    seen: dict[str, str] = {}
    for task in tasks:
        _check_metric(task.task, index[task.task])
        for leaf in _leaves(task.task, index, data_dirs):
            if (other := seen.setdefault(leaf.name, task.task)) != task.task:
                raise InputError(f"{leaf.name} is part of both {other} and {task.task}: evaluate one of them at a time")
            if changes := _overrides(leaf, task.num_fewshot, cache):
                text = yaml.safe_dump({"include": str(leaf.yaml), "task": leaf.name, **changes})
                (overlay / f"{leaf.name}.yaml").write_text(text, encoding="utf-8")
    manager = _manager(names, data_dirs, overlay)
    return manager, [_load_one(manager, name, data_dirs) for name in names]


def _load_one(manager: TaskManager, name: str, data_dirs: Sequence[Path]) -> Any:
    try:
        loaded = manager.load(name)
    except Exception as error:  # datasets raises whatever its parts raise
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        where = f"{data_dirs[0] if data_dirs else '<data dir>'}/{name}/<split>.jsonl"
        raise InputError(
            f"task {name!r}: its data could not be read ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
            f"{'; HF_HUB_OFFLINE is set, so the hub was not asked' if offline else ''}; put them in {where}"
        ) from None
    return loaded.get("groups", {}).get(name) or loaded["tasks"][name]


def _check_metric(name: str, entry: Any) -> None:
    bare = entry.kind.name == "TAG" or (entry.kind.name == "GROUP" and not entry.cfg.get("aggregate_metric_list"))
    if bare:
        raise InputError(f"lm-eval gives {name!r} no metric of its own; name its tasks: {', '.join(_members(entry))}")


def _overrides(leaf: Leaf, num_fewshot: int | None, cache: Path) -> dict[str, Any]:
    """Fields that make a task read its local files, every split without a file nulled.

    Raises:
        InputError: the split that the task is scored on, or takes its examples from, has no file. lm-eval would
            silently take another one.
    """
    shots = {} if num_fewshot is None else {"num_fewshot": num_fewshot}
    if leaf.folder is None:
        return shots
    files, config = _split_files(leaf.folder), leaf.config
    needed = {config.get("test_split") or config.get("validation_split")}
    if (num_fewshot if num_fewshot is not None else config.get("num_fewshot")) and (shown := _fewshot_split(config)):
        needed.add(shown)
    if missing := sorted(map(str, needed - files.keys())):
        raise InputError(f"task {leaf.name!r} needs {missing[0]}.jsonl in {leaf.folder}; found {', '.join(files)}")
    return shots | {
        "dataset_path": "json",
        "dataset_name": None,
        "custom_dataset": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items() if split in map(config.get, SPLITS)},
            "cache_dir": str(cache / "datasets"),  # a converted copy that must not outlive the files
        },
        **{key: None for key in SPLITS if config.get(key) not in files},
    }


def _fewshot_split(config: dict[str, Any]) -> str | None:
    return config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")


def _simple_evaluate(lm: Any, manager: TaskManager, loaded: list[Any], limit: int | None, seed: int) -> dict[str, Any]:
    # lm-eval takes seconds to import, which only its own tasks need
    from lm_eval import evaluator  # noqa: PLC0415

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    options = {"limit": limit, "bootstrap_iters": BOOTSTRAPS, "log_samples": False, **seeds}
    # the run's environment is recorded elsewhere; here it would cost a second and git's complaint outside a clone
    with (
        mock.patch.object(evaluator, "add_env_info", lambda results: None),
        mock.patch.object(evaluator, "get_git_commit_hash", lambda: None),
        mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"),  # its bootstrap would fork a process that holds a model
    ):
        return dict(evaluator.simple_evaluate(lm, tasks=loaded, task_manager=manager, **options) or {})


def _metrics(results: dict[str, Any], task: str) -> dict[str, float]:
    scores = {
        key.removesuffix(",none"): float(value)
        for key, value in results["results"][task].items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    extra = {
        "version": results["versions"].get(task),
        "num_fewshot": results["n-shot"].get(task),
        "documents": results["n-samples"].get(task, {}).get("effective"),
    }
    return scores | {key: float(value) for key, value in extra.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No chatter: bars only on a terminal, nothing ever on standard output, warnings of the libraries held back."""
    # lm-eval takes seconds to import, which only its own tasks need
    import datasets  # noqa: PLC0415

    sink = sys.stderr if sys.stderr.isatty() else io.StringIO()
    levels = {logger: logger.level for logger in map(logging.getLogger, _NOISY)}
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
