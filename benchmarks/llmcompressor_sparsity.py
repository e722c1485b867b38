"""llm-compressor's one-shot pruning, as its users call it: the other side of the speed and quality tables.

    python benchmarks/llmcompressor_sparsity.py MODEL_DIR --tokens ids.npy --out FOLDER \
        --recipes wanda-0.5 sparsegpt-0.5 sparsegpt-0.7 sparsegpt-2:4

Needs llm-compressor 0.14.0.1 (not a dependency of this project: it pins an older transformers). `ids.npy` holds the
calibration tokens (n, T) that `sparsity_quality.py --tokens` wrote; every recipe leaves a checkpoint in its own folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def modifier(recipe: str) -> Any:
    """`wanda-0.5`, `sparsegpt-2:4` → its pruning modifier over all projections but the head."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    method, asked = recipe.split("-")
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    if ":" in asked:
        kept, of = map(int, asked.split(":"))
        return kind(sparsity=1 - kept / of, mask_structure=asked, ignore=["re:.*lm_head"], targets=["Linear"])
    return kind(sparsity=float(asked), ignore=["re:.*lm_head"], targets=["Linear"])


def tokenizer_for(vocab: int) -> Any:
    """A tokenizer that knows as many words: it is asked for, and only pads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w0", eos_token="w2")


def prune(model: Any, tokenizer: Any, ids: np.ndarray, recipe: str, batch_size: int = 1) -> float:
    """Prune `model` in place; seconds of `oneshot`, weights in host memory before and after."""
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    dataset = Dataset.from_dict(rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=[modifier(recipe)],
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=batch_size,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def load(directory: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recipes", nargs="+", default=["sparsegpt-0.5"])
    args = parser.parse_args()
    tokenizer, ids = AutoTokenizer.from_pretrained(args.model), np.load(args.tokens)
    for recipe in args.recipes:
        model = load(args.model, args.dtype)
        seconds = prune(model, tokenizer, ids, recipe)
        folder = args.out / f"llmcompressor-{recipe.replace(':', 'of')}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(json.dumps({"checkpoint": folder.name, "seconds": round(seconds, 2)}), flush=True)


if __name__ == "__main__":
    main()
