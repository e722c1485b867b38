"""Which matrices a scheme is for, and which schemes may share a checkpoint; read without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from compression_dags.architectures import ModelShape
from compression_dags.architectures.uniformity import refuse_shared
from compression_dags.errors import InputError
from compression_dags.quantization.formats import Choice

if TYPE_CHECKING:
    from compression_dags.solvers.rounding import Rounded

    Rounder = Callable[[str], Rounded]


def check_together(choices: Mapping[str, Choice]) -> None:
    """
    Raises:
        InputError: these schemes of these modules cannot share a checkpoint, by the first modules that show it.
    """
    rebuilt = next(((n, c) for n, c in choices.items() if c.dequantize_on_load), None)
    if rebuilt is None:
        return
    name, choice = rebuilt
    for other, own in choices.items():
        if own.format.activations < 16:
            raise InputError(
                f"{name}: {choice.label} must be rebuilt while loading, which drops the rounding of inputs that "
                f"{own.label} of {other} asks for; they cannot share a checkpoint"
            )
        if own != choice:
            raise InputError(
                f"{name}: {choice.label} must be rebuilt while loading, and transformers rebuilds all matrices by one "
                f"scheme; {other} is {own.label}; they cannot share a checkpoint"
            )


def needs_rebuilding(choices: Mapping[str, Choice]) -> bool:
    """Whether config.json must say `dequantize`: the key is of the whole checkpoint."""
    return any(choice.dequantize_on_load for choice in choices.values())


def matches(entry: str, module: str) -> bool:
    """compressed-tensors' rule: an equal name, or `re:` and a pattern that matches from the start."""
    try:
        return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
    except re.error as error:
        raise InputError(f"{entry!r} is not a regular expression: {error}") from None


def rebuilds_while_loading() -> bool:
    """Whether `dequantize` acts on the stored tensors (transformers 5.23), not on the loaded model as it did before."""
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 23)


def input_dimensions(shape: ModelShape) -> dict[str, int]:
    """Group of projections → the dimension of the input that they read, the largest where kinds of layers differ."""
    if kinds := shape.architecture.kinds:
        found: dict[str, int] = {}
        for name, first, kind in ((g.name, g.projections[0], k) for k in kinds for g in k.groups):
            found[name] = max(found.get(name, 0), kind.columns(first))
        return found
    config = shape.config
    heads = int(config["num_attention_heads"])
    return {
        "attention_input": shape.hidden,
        "attention_output": heads * int(config.get("head_dim") or shape.hidden // heads),
        "mlp_input": shape.hidden,
        "mlp_output": int(config.get("intermediate_size") or config["ffn_dim"]),
    }


def inputs_by_layer(shape: ModelShape) -> list[list[tuple[int, tuple[str, ...]]]]:
    """Of every layer the groups of matrices that read one input: how wide it is, and the modules' names."""
    architecture, widths = shape.architecture, input_dimensions(shape)
    found = []
    for layer in range(shape.layers):
        kind = architecture.kinds[architecture.kind_of[layer]] if architecture.kinds else None
        prefix = architecture.layer_prefix(layer)
        found.append(
            [
                (kind.columns(g.projections[0]) if kind else widths[g.name], tuple(prefix + p for p in g.projections))
                for g in architecture.groups_of(layer)
            ]
        )
    return found


def refuse_unroundable(shape: ModelShape, instead: str = "drop layers instead (shortgpt, sleb)") -> None:
    """Raise InputError for a model whose matrices cannot be named in a compressed-tensors config."""
    architecture = shape.architecture
    if architecture.has_experts:
        raise InputError(
            f"quantizing {architecture.model_type} is not supported yet: its experts are fused parameters, "
            "not Linear modules, so a Linear-targeted scheme would leave most weights as they are"
        )
    if architecture.layers != architecture.modules:
        raise InputError(
            f"quantizing {architecture.model_type} is not supported: its layers are {architecture.layers} on disk and "
            f"{architecture.modules} in memory, and a compressed-tensors scheme names modules as both; {instead}"
        )
    refuse_shared(shape, "quantize", instead)
    if architecture.needs_weights:
        raise InputError(
            f"quantizing {architecture.model_type} is not supported: stock transformers cannot load it with packed "
            f"weights, for {architecture.needs_weights}; {instead}"
        )
    if architecture.kinds and not architecture.projections():
        left = f" (there are {', '.join(architecture.opaque[:3])})" if architecture.opaque else ""
        raise InputError(
            f"quantizing {architecture.model_type} is not supported: its layers have no Linear modules with a weight "
            f"of their own on disk{left}; {instead}"
        )
