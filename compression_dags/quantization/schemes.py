"""Which matrices a scheme is for, and which schemes may share a checkpoint; read without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from compression_dags.architectures import ModelShape
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
    """Group of projections → the dimension of the input that they read."""
    config = shape.config
    heads = int(config["num_attention_heads"])
    return {
        "attention_input": shape.hidden,
        "attention_output": heads * int(config.get("head_dim") or shape.hidden // heads),
        "mlp_input": shape.hidden,
        "mlp_output": int(config.get("intermediate_size") or config["ffn_dim"]),
    }
