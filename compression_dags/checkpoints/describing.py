"""The description of a checkpoint whose family nobody wrote down: a trace of its config, and its names on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers.initialization import no_init_weights

from compression_dags.architectures.config_rules import COUNTS, plain_fields, text_config
from compression_dags.architectures.decoder import Architecture, Discovered, Experts
from compression_dags.architectures.described import SIZES, architecture
from compression_dags.architectures.discovery import read, traced_model
from compression_dags.checkpoints.conversion import Conversion
from compression_dags.checkpoints.parameter_parts import Made

#: What is computed by the fused form of experts: parameter → the matrices of one expert in it.
_FUSED = {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 1}
_EXPERT = re.compile(r"(?P<block>[\w.]+)\.experts\.(?P<number>\d+)\.(?P<which>\w+)\.weight")


def described(stated: Any, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """What tracing finds of a model, with its names on disk.

    Args:
        stated: transformers' config object.
        config: the same as a dict, with everything that the file states.
        shapes: tensor on disk → its shape.

    Raises:
        InputError: the model cannot be traced, or its layers are not numbered on disk.
    """
    trace = traced_model(stated)
    found = read(trace, stated)
    first = [found.kind_of.index(number) for number in range(len(found.kinds))]
    made = _made(Conversion(trace.model), found, first, shapes)
    names = {memory: how.disk[0] for memory, how in made.items() if len(how.disk) == 1 and not how.operations}
    text = text_config(config, found.config_path)
    counted = [n for n in COUNTS if text.get(n) == len(found.kind_of)]
    rule = plain_fields(config, counted[0] if counted else "", found.config_path)
    inner: Any = _inner(stated, found.config_path)
    sizes = {n: v for n in SIZES if type(v := getattr(inner, n, None)) is int}
    description = architecture(found, names, rule, {**sizes, "num_hidden_layers": len(found.kind_of)})
    experts = _experts(found, first, made, description) if _are_usual(trace.model, found, first) else None
    unknown = any(kind.experts for kind in description.kinds) and experts is None
    left = _once(p for kind in found.kinds for p in kind.experts) if unknown else ()
    reads = _fused(found, made) or _reads_weights(trace.model, found)
    return replace(description, experts=experts, opaque=(*description.opaque, *left), needs_weights=reads)


def _fused(found: Discovered, made: Mapping[str, Made]) -> str:
    """The first parameter of a layer, experts' aside, that several tensors make; with packed weights none is made."""
    experts = {p for kind in found.kinds for p in kind.experts}
    for name, how in made.items():
        local = name.removeprefix(f"{found.layers}.").partition(".")[2]
        if name.startswith(f"{found.layers}.") and len(how.disk) > 1 and local not in experts:
            return f"{local} is made of {len(how.disk)} tensors while loading"
    return ""


def _reads_weights(model: Any, found: Discovered) -> str:
    """What the model's initialisation says once a matrix of each kind has no weight, as when it is packed.

    Args:
        model: it is of no use after this.
    """
    for index in map(found.kind_of.index, range(len(found.kinds))):
        for group in found.kinds[found.kind_of[index]].groups:
            for projection in group.projections:
                module = model.get_submodule(f"{found.layers}.{index}.{projection}")
                module._parameters.pop("weight", None)
    for module in model.modules():
        try:
            with no_init_weights():
                model._init_weights(module)
        except AttributeError as error:
            if "weight" in str(error):
                return f"initialising {type(module).__name__} reads a weight"
        except Exception:  # values of tensors, which a traced model has none of
            continue
    return ""


def _are_usual(model: Any, found: Discovered, first: list[int]) -> bool:
    """Whether experts are a module that holds an activation, as most families' fused experts do."""
    modules = dict(model.named_modules())
    return all(
        hasattr(modules.get(f"{found.layers}.{index}.mlp.experts"), "act_fn")
        for kind, index in zip(found.kinds, first, strict=True)
        if kind.experts
    )


def _inner(config: Any, path: Iterable[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _made(
    conversion: Conversion, found: Discovered, first: list[int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Made]:
    """Parameter → how it is made, of one layer of each kind and of what is outside the layers."""
    numbers = {str(index) for index in first}
    near = [name for name in shapes if numbers & set(name.split(".")) or not re.search(r"\.\d+\.", name)]
    own = tuple(f"{found.layers}.{index}." for index in first)
    goals = conversion.in_memory(near)
    wanted = [n for n, goal in goals.items() if goal.startswith(own) or not goal.startswith(f"{found.layers}.")]
    return conversion.on_disk({name: shapes[name] for name in wanted})


def _experts(
    found: Discovered, first: list[int], made: Mapping[str, Made], description: Architecture
) -> Experts | None:
    """Names of experts' matrices on disk, where they are one tensor a matrix and fused as most families fuse them."""
    for kind, index in zip(found.kinds, first, strict=True):
        if not kind.experts:
            continue
        if set(kind.experts) != _FUSED.keys():
            return None
        which: dict[str, list[str]] = {}
        blocks = set[str]()
        for name, count in _FUSED.items():
            how = made.get(f"{found.layers}.{index}.{name}")
            if how is None or how.parts is None or any(part.transposed for part in how.parts):
                return None
            prefix = f"{description.layers}.{index}."
            matches = [_EXPERT.fullmatch(disk.removeprefix(prefix)) for disk in how.disk]
            if not all(matches):
                return None
            zeroth = [m for m in matches if m and m["number"] == "0"]
            which[name] = [m["which"] for m in zeroth]
            blocks |= {m["block"] for m in zeroth}
            if len(zeroth) != count:
                return None
        if len(blocks) != 1:
            return None
        (gate, up), (down,) = which["mlp.experts.gate_up_proj"], which["mlp.experts.down_proj"]
        return Experts(next(iter(blocks)), gate, up, down)
    return None


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
