"""A recipe of every registered method, small enough for models of five or six layers."""

from __future__ import annotations

from typing import Any

from compression_dags.registry import METHODS
from compression_dags.sparsity.allocators import ALLOCATORS

Stages = list[tuple[str, dict[str, Any]]]
#: Every layer, where a method is told what each becomes.
ALL_LAYERS = "all layers"

_DISTILL = {"tokens": 8192, "length": 128, "batch_tokens": 1024, "held_windows": 4, "checks": 2}
_MERGE: dict[str, dict[str, Any]] = {name: {"layers": 1} for name in METHODS["merge"]} | {
    "laco": {"layers": 2, "combined": 2, "interval": 1, "threshold": 0.3},
    "planned": {"drop": [2]},
}
_RECOVER: dict[str, dict[str, Any]] = {
    "least-squares": {},
    "linear-patch": {},
    "distill-sp": _DISTILL,
    "distill-mp": _DISTILL,
}
_SPARSIFY: dict[str, dict[str, Any]] = {name: {"sparsity": 0.5} for name in METHODS["sparsify"]}
_ALLOCATE: dict[str, dict[str, Any]] = {name: {} for name in ALLOCATORS} | {"given": {"layers": ALL_LAYERS}}
_QUANTIZE: dict[str, dict[str, Any]] = {
    "rtn": {"scheme": "W4A16", "group_size": 16},
    "gptq": {"scheme": "W4A16", "group_size": 16},
    "awq": {"scheme": "W4A16", "group_size": 16},
    "smoothquant": {"scheme": "W8A8"},
}
_DROP = ("merge", {"method": "shortgpt", "layers": 1})
_FOLD = ("merge", {"method": "weighted-sum", "layers": 1})  # distillation trains the layer that others went into

#: Recipe → its stages. Options of a method without an entry above are its defaults.
CASES: dict[str, Stages] = {
    **{f"merge-{m}": [("merge", {"method": m} | o)] for m, o in _MERGE.items()},
    **{f"recover-{m}": [_FOLD if o else _DROP, ("recover", {"method": m} | o)] for m, o in _RECOVER.items()},
    **{f"sparsify-{m}": [("sparsify", {"method": m} | o)] for m, o in _SPARSIFY.items()},
    "sparsify-admm-2of4": [("sparsify", {"method": "admm", "pattern": "2:4"})],
    **{
        f"allocate-{m}": [("sparsify", {"method": "wanda", "sparsity": 0.5, "allocation": {"method": m} | o})]
        for m, o in _ALLOCATE.items()
    },
    **{f"quantize-{m}": [("quantize", {"method": m} | o)] for m, o in _QUANTIZE.items()},
    "every-stage": [
        _DROP,
        ("recover", {"method": "least-squares"}),
        ("sparsify", {"method": "sparsegpt", "sparsity": 0.3}),
        ("quantize", {"method": "gptq", "scheme": "W8A16", "group_size": 16}),
    ],
}


def missing() -> list[str]:
    """Registered methods and allocators that no case runs."""
    registered = {(kind, name) for kind, group in METHODS.items() for name in group}
    registered |= {("allocation", name) for name in ALLOCATORS}
    run = {(kind, options["method"]) for stages in CASES.values() for kind, options in stages}
    given = [o["allocation"] for stages in CASES.values() for _, o in stages if "allocation" in o]
    run |= {("allocation", allocation["method"]) for allocation in given}
    return sorted(f"{kind}: {name}" for kind, name in registered - run)


def given_layers(options: dict[str, Any], layers: int) -> dict[str, Any]:
    """`options` for a model of so many layers: half of every layer where `ALL_LAYERS` stands."""
    allocation = options.get("allocation", {})
    if allocation.get("layers") != ALL_LAYERS:
        return options
    return options | {"allocation": allocation | {"layers": dict.fromkeys(range(layers), 0.5)}}
