"""Which part of the package may import which: one table for all, no circle between modules, workers named by strings.

Imports inside functions count like those at the top. Those that only the type checker sees do not.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compression_dags
from compression_dags.paths import PROJECT
from compression_dags.step import worker

#: From the bottom up. A part imports itself and layers below its own, never its neighbours or what lies above.
LAYERS = (
    {"errors", "options", "heartbeat", "waiting", "kernels", "step"},
    {"paths", "architectures", "provenance", "failures", "statefile", "solvers"},
    {"stage", "yaml_reader"},
    {"checkpoints"},
    {"job"},
    {"calibration"},
    {"passes", "similarity"},
    {"depth", "sparsity", "quantization"},
    {"recovery"},
    {"registry"},
    {"planning", "evaluation", "estimate"},
    {"recipes"},
    {"reports"},
    {"resources"},
    {"assets"},
    {"definitions"},
    {"cli"},
)
LAYER_OF = {part: height for height, layer in enumerate(LAYERS) for part in layer}
PACKAGE = Path(compression_dags.__file__).parent
#: Imports inside functions that may stay outside cli/, each with its reason beside it.
MOST_INNER = 60
#: What the options of methods, and so recipes, must not load.
HEAVY = ("torch", "transformers", "dagster", "pandas", "scipy")


@functools.cache
def modules() -> dict[str, Path]:
    """Name → file of every module; assets and resources are links to the folders at the top in a checkout."""
    found = {}
    for part in sorted(PACKAGE.iterdir()):
        for file in sorted(part.rglob("*.py")) if part.is_dir() else [part] if part.suffix == ".py" else []:
            names = ("compression_dags", *file.relative_to(PACKAGE).with_suffix("").parts)
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = file
    return found


def part_of(module: str) -> str:
    return module.split(".")[1]


def statements(node: ast.AST, inner: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import that runs, and whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, inner
        yield from statements(child, inner or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


@functools.cache
def imports() -> dict[str, dict[str, int]]:
    """Module → the project's modules that it imports, each with the line."""
    found: dict[str, dict[str, int]] = {}
    for name, file in modules().items():
        own = found.setdefault(name, {})
        for node, _ in statements(ast.parse(file.read_text(encoding="utf-8"))):
            for other in named(node):
                if other in modules() and other != name:
                    own.setdefault(other, node.lineno)
    return found


def named(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that an import names: `from package import module` names the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.module and not node.level, f"line {node.lineno}: relative imports are not used here"
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole in modules() else node.module


def test_every_part_has_a_layer():
    parts = {part_of(name) for name in modules() if name != "compression_dags"}
    assert parts == LAYER_OF.keys(), "LAYERS lists every package and every module beside them, and nothing else"
    assert sum(map(len, LAYERS)) == len(LAYER_OF)


def test_a_part_imports_only_lower_layers():
    wrong = [
        f"{name}:{line} imports {other}"
        for name, others in imports().items()
        for other, line in others.items()
        if name != "compression_dags" and other != "compression_dags" and part_of(name) != part_of(other)
        if LAYER_OF[part_of(other)] >= LAYER_OF[part_of(name)]
    ]
    assert wrong == []


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another (strongly connected components of more than one)."""
    seen: dict[str, frozenset[str]] = {}

    def reached(start: str) -> frozenset[str]:
        if start not in seen:
            found, stack = set(), [start]
            while stack:
                for other in edges[stack.pop()] - found:
                    found.add(other)
                    stack.append(other)
            seen[start] = frozenset(found)
        return seen[start]

    groups = {tuple(sorted(b for b in reached(a) if a in reached(b))) for a in edges if a in reached(a)}
    return sorted(map(list, groups))


def test_no_circle_between_modules():
    assert circles({name: set(others) for name, others in imports().items()}) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_imports_inside_functions_are_few_and_say_why():
    """ruff (PLC0415) finds them; here they are counted, and each needs words in its line or in the one above."""
    silent, count = [], 0
    for name, file in modules().items():
        if name == "compression_dags" or part_of(name) == "cli":
            continue
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node, inner in statements(ast.parse(text)):
            if inner:
                count += 1
                own, above = lines[node.end_lineno - 1], node.lineno - 2  # pyright: ignore[reportOptionalOperand]
                while "# noqa: PLC0415" in lines[above] and not lines[above].lstrip().startswith("#"):
                    above -= 1  # several in a row share the words above the first
                said = own.partition("# noqa: PLC0415")[2].strip() or lines[above].lstrip().startswith("#")
                silent += [] if said else [f"{name}:{node.lineno}"]
    assert silent == []
    assert count <= MOST_INNER


@functools.cache
def named_workers() -> dict[str, str]:
    """Method → the worker that it names."""
    from compression_dags.registry import METHODS
    from compression_dags.sparsity.allocators import ALLOCATORS

    groups = METHODS | {"allocation": ALLOCATORS}
    found = {f"{stage}: {name}": kind.implementation for stage, group in groups.items() for name, kind in group.items()}
    return {name: implementation for name, implementation in found.items() if implementation}


@functools.cache
def strings() -> dict[str, str]:
    """Place → every other worker that a module names in a string."""
    return {
        f"{name}:{node.lineno}": node.value
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.startswith("compression_dags.") and ":" in node.value and " " not in node.value
    }


@pytest.mark.parametrize("name", sorted({**named_workers(), **strings()}))
def test_a_named_worker_is_there(name):
    """A method names who carries it out; what reads its options need not load torch."""
    assert callable(worker({**named_workers(), **strings()}[name]))


def test_a_worker_lies_no_higher_than_what_names_it():
    for place, implementation in strings().items():
        owner, target = part_of(place.partition(":")[0]), part_of(implementation.partition(":")[0])
        assert owner == target or LAYER_OF[target] < LAYER_OF[owner], f"{place} names {implementation}"


def test_options_load_nothing_heavy():
    """Recipes, the registry and all option classes are read whenever definitions load."""
    names = ["recipes", "registry", "planning.options", "sparsity.allocators", "evaluation.tasks"]
    lines = [f"import compression_dags.{name}" for name in names]
    lines += ["import sys", f"print(*[m for m in {HEAVY!r} if m in sys.modules])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
