"""llm-compressor's one-shot pruning, as its users call it: the other side of the speed and quality tables.

    python benchmarks/llmcompressor_sparsity.py MODEL_DIR --tokens ids.npy --out FOLDER \
        --recipes wanda-0.5 sparsegpt-0.5 sparsegpt-0.7 sparsegpt-2:4

Needs llm-compressor 0.14.0.1 (not a dependency of this project: it pins an older transformers). `ids.npy` holds the
calibration tokens (n, T) that `sparsity_quality.py --tokens` wrote; every recipe leaves a checkpoint in its own folder.
"""

from __future__ import annotations

from typing import Any

from llmcompressor_oneshot import write_checkpoints


def modifiers(recipe: str) -> list[Any]:
    """`wanda-0.5`, `sparsegpt-2:4` → its pruning modifier over all projections but the head."""
    from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
        SparseGPTModifier,
        WandaPruningModifier,
    )

    method, asked = recipe.split("-")
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    if ":" in asked:
        kept, of = map(int, asked.split(":"))
        return [kind(sparsity=1 - kept / of, mask_structure=asked, ignore=["re:.*lm_head"], targets=["Linear"])]
    return [kind(sparsity=float(asked), ignore=["re:.*lm_head"], targets=["Linear"])]


if __name__ == "__main__":
    write_checkpoints(__doc__, modifiers, ["sparsegpt-0.5"])
