"""The guard of code versions: which source each step had when its version was last decided.

Stored results are reused by version. A step whose source changed while its version did not would reuse results of other
code. `code_versions.json` holds, for every step, its versions and a digest of all modules that its implementation
imports, directly or not, and the digest of each module. Docstrings, comments and layout do not count.

Steps are derived: every registered method and allocator, and every function of `assets/` and `resources/` that makes a
`Request`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_dags.paths import PROJECT

RECORD = Path(__file__).with_name("code_versions.json")
_ROOMS = ("compression_dags",)
#: A worker that a method or a stage names: `compression_dags.depth.mka.search:plan`.
_WORKER = re.compile(r"(compression_dags(?:\.\w+)+):\w+")
#: They name every method, or hold what any step made. A step that runs a method by name has its version among its own.
_STOPS = {
    "compression_dags.registry",
    "compression_dags.recipes",
    "compression_dags.sparsity.allocators",
    "compression_dags.resources.artifact_store",
}


@dataclass(frozen=True)
class Step:
    """One kind of result.

    Attributes:
        versions: expression or method → the version that enters its fingerprints.
        modules: whatever its implementation imports, and the file that declares it.
        own: digest of the function that declares it; empty for a method, whose module is among `modules`.
    """

    versions: dict[str, str]
    modules: frozenset[str]
    own: str = ""

    @property
    def digest(self) -> str:
        parts = [self.own, *(f"{name} {module_digest(name)}" for name in sorted(self.modules))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def steps() -> dict[str, Step]:
    """Name → every step of the product, as the code stands now."""
    found = {name: Step({name: kind.version}, closure(kind.__module__)) for name, kind in _methods().items()}
    for path in declaring():
        for function in _builders(path):
            found[f"{path.stem}.{function.name}"] = _declared(path, function)
    return found


def declaring() -> list[Path]:
    """Files whose functions may make a Request."""
    package = PROJECT / "compression_dags"
    return [path for room in ("assets", "resources") for path in sorted((package / room).glob("*.py"))]


def current() -> dict[str, Any]:
    """What `code_versions.json` would hold."""
    now = steps()
    modules = sorted(set().union(*(step.modules for step in now.values())))
    return {
        "steps": {name: {"versions": step.versions, "digest": step.digest} for name, step in now.items()},
        "modules": {name: module_digest(name) for name in modules},
    }


def changed_without_version() -> list[str]:
    """A line for every step whose source changed and whose versions did not: the step and the modules that changed."""
    recorded = json.loads(RECORD.read_text())
    lines = []
    for name, step in steps().items():
        before = recorded["steps"].get(name, {})
        if step.digest != before.get("digest") and step.versions == before.get("versions", step.versions):
            odd = sorted(m for m in step.modules if module_digest(m) != recorded["modules"].get(m))
            lines.append(f"{name}: {', '.join(odd) or 'its declaration'}")
    return lines


def record() -> None:
    """Write down the present sources, after deciding that no stored result changes (or having raised the version)."""
    RECORD.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n")


def _methods() -> dict[str, Any]:
    from compression_dags.evaluation.tasks import HarnessTask, PerplexityTask
    from compression_dags.registry import METHODS
    from compression_dags.sparsity.allocators import ALLOCATORS

    tasks = {"perplexity": PerplexityTask, "lm-eval": HarnessTask}
    groups = METHODS | {"allocation": ALLOCATORS, "evaluation": tasks}
    return {f"{stage}: {name}": kind for stage, group in groups.items() for name, kind in group.items()}


def _builders(path: Path) -> Iterator[ast.FunctionDef]:
    """Top-level functions of a file that make a Request."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any(_requests(node)):
            yield node


def _requests(function: ast.FunctionDef) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Request":
            yield node


def _declared(path: Path, function: ast.FunctionDef) -> Step:
    module = importlib.import_module(f"compression_dags.{path.parent.name}.{path.stem}")
    versions: dict[str, str] = {}
    for call in _requests(function):
        versions |= _versions(call.args[1], function, module)
    tree = ast.parse(path.read_text())
    imports = set(_imports(function)) | {n for node in tree.body if _is_import(node) for n in _imports(node)}
    modules = frozenset().union(*(closure(name) for name in imports))
    return Step(versions, modules, _digest(function))


def _versions(expression: ast.expr, function: ast.FunctionDef, module: Any) -> dict[str, str]:
    """Expression → value: a constant of the module, or of the class that a parameter has; else of all methods."""
    text = ast.unparse(expression)
    if isinstance(expression, ast.Constant):
        return {text: str(expression.value)}
    if isinstance(expression, ast.Name) and hasattr(module, text):
        return {text: str(getattr(module, text))}
    if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
        kinds = {a.arg: a.annotation for a in function.args.args}
        kind = kinds.get(expression.value.id)
        if isinstance(kind, ast.Name) and hasattr(found := getattr(module, kind.id), expression.attr):
            return {text: str(getattr(found, expression.attr))}
    return {name: kind.version for name, kind in _methods().items()}


def closure(module: str) -> frozenset[str]:
    """The module and all of the project's that it imports or names as workers, directly or through others."""
    found: set[str] = set()
    stack = [module]
    while stack:
        name = stack.pop()
        if name not in found | _STOPS and _file(name) is not None:
            found.add(name)
            stack += _imported_by(name)
    return frozenset(found)


@functools.cache
def _imported_by(module: str) -> tuple[str, ...]:
    path = _file(module)
    assert path is not None
    return tuple(_imports(ast.parse(path.read_text())))


@functools.cache
def module_digest(module: str) -> str:
    path = _file(module)
    assert path is not None
    return _digest(ast.parse(path.read_text()))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the project that run when this code does: imported or named as workers, not for the type checker."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(tree, ast.Import):
        yield from (a.name for a in tree.names if a.name.split(".")[0] in _ROOMS)
    elif isinstance(tree, ast.ImportFrom) and tree.module and tree.module.split(".")[0] in _ROOMS:
        yield tree.module
        yield from (f"{tree.module}.{a.name}" for a in tree.names)
    elif isinstance(tree, ast.Constant) and isinstance(tree.value, str) and (named := _WORKER.fullmatch(tree.value)):
        yield named[1]
    for child in ast.iter_child_nodes(tree):
        yield from _imports(child)


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _file(module: str) -> Path | None:
    path = PROJECT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _digest(tree: ast.AST) -> str:
    """sha256 of a syntax tree without docstrings, which it takes out of the tree."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            value = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
