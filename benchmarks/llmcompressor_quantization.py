"""llm-compressor's one-shot quantization, as its users call it: the other side of the speed and quality tables.

    python benchmarks/llmcompressor_quantization.py MODEL_DIR --tokens ids.npy --out FOLDER \
        --recipes gptq-W4A16-64 gptq-W8A8 awq-W4A16-64 smoothquant-W8A8 rtn-W4A16-64

A recipe is a method, a scheme, and a group size where it is not the scheme's own. AWQ and SmoothQuant round to nearest
after they have scaled. Needs llm-compressor 0.14.0.1 (not a dependency of this project: it pins an older transformers).
`ids.npy` holds the calibration tokens (n, T) that `sparsity_quality.py --tokens` wrote; every recipe leaves a
compressed checkpoint in its own folder, which `sparsity_quality.py --checkpoints` scores. What is not quantized, and
the scales, are stored in `--dtype`.
"""

from __future__ import annotations

from typing import Any

from llmcompressor_oneshot import write_checkpoints

METHODS = ("gptq", "awq", "smoothquant", "rtn")
IGNORED = ["lm_head"]


def parts(recipe: str) -> tuple[str, str, int | None]:
    """`gptq-W4A16-64` → method, scheme, group size; None for the scheme's own."""
    method, scheme, *group = recipe.split("-")
    if len(group) > 1:
        raise ValueError(f"{recipe!r} is not METHOD-SCHEME or METHOD-SCHEME-GROUP")
    return method, scheme, int(group[0]) if group else None


def modifiers(recipe: str) -> list[Any]:
    """What scales, if the method does, and then what rounds."""
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.transform.smoothquant import (  # pyright: ignore[reportMissingImports]
        SmoothQuantModifier,
    )

    method, scheme, group = parts(recipe)
    if method not in METHODS:
        raise ValueError(f"method {method!r} of {recipe!r} is none of {', '.join(METHODS)}")
    scaling = {"awq": [AWQModifier], "smoothquant": [SmoothQuantModifier]}.get(method, [])
    rounding = GPTQModifier if method == "gptq" else QuantizationModifier
    return [*(kind() for kind in scaling), rounding(ignore=IGNORED, **_asked(scheme, group))]


def _asked(scheme: str, group: int | None) -> dict[str, Any]:
    """A preset by its name, or with another group size written out."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    preset = preset_name_to_scheme(scheme, ["Linear"])
    assert preset.weights is not None
    if group is None or group == preset.weights.group_size:
        return {"targets": ["Linear"], "scheme": scheme}
    own = {"strategy": "group", "group_size": group}
    weights = QuantizationArgs.model_validate({**preset.weights.model_dump(), **own})
    inputs = preset.input_activations
    asked = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return {"config_groups": {"group_0": asked}}


if __name__ == "__main__":
    write_checkpoints(__doc__, modifiers, ["gptq-W4A16-64"])
