"""Why a matrix got its scheme, or was kept as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression_dags.provenance.wording import number
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.stage import QuantizeStage


def why_scheme(stage: QuantizeStage, module: str, choice: Choice, columns: int, evidence: Mapping[str, Any]) -> str:
    """Who chose the scheme of a module: the plan of an average of bits, an override, the recipe, or a fallback.

    Args:
        columns: inputs of the matrix.
        evidence: what the method noted of it.
    """
    asked, entry = stage.asked(module), stage.override_of(module)
    if stage.bits is not None:
        who = f"the plan for {number(stage.bits)} bits a weight chose it for this group"
    elif choice != asked:
        told = "the recipe" if entry is None else f"override {entry!r}"
        who = f"{told} asks for {scheme_said(asked)}, but {asked.group_size} does not divide its {columns} inputs"
    elif entry is not None:
        who = f"override {entry!r} names it"
    else:
        who = "the recipe's scheme, and no override names it"
    remark = stage.remark(evidence)
    return f"quantized by {stage.method} to {scheme_said(choice)}: {who}{'; ' if remark else ''}{remark}"


def why_kept(stage: QuantizeStage, module: str, layer: int | None, tied: bool, linear: bool) -> str:
    """Why a matrix stays as it is.

    Args:
        layer: that it belongs to; None for matrices outside the layers.
        tied: whether it has no weight of its own.
        linear: whether it is a Linear module.
    """
    if not linear:
        return "kept: an embedding, and only Linear modules are quantized"
    same = ", and its weight is the embedding's" if tied else ""
    if (entry := stage.ignored_by(module)) is not None:
        return f"kept: ignore names it ({entry!r}){same}"
    if layer is None:
        return f"kept: it belongs to no decoder layer, and only their projections are quantized{same}"
    if stage.bits is not None:
        return f"kept: the plan for {number(stage.bits)} bits a weight leaves its group as it is"
    return "kept: it is none of the projections of its layer that are quantized"


def scheme_said(choice: Choice) -> str:
    """`W4A16 in groups of 64`, `W8A16 with one scale a row`, with zero points where it has them."""
    size = f"in groups of {choice.group_size}" if choice.group_size else "with one scale a row"
    return f"{choice.scheme} {size}{'' if choice.symmetric else ' with zero points'}"
