"""llm-compressor's `oneshot`, as its users call it: loading, timing, and a checkpoint a recipe.

A module of other benchmarks. There is no --tiny: llm-compressor is not among the project's dependencies.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Recipe, as the command line names it → its modifiers.
Modifiers = Callable[[str], list[Any]]


def load(directory: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))


def tokenizer_for(vocab: int) -> Any:
    """A tokenizer that knows as many words: it is asked for, and only pads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w0", eos_token="w2")


def compress(model: Any, tokenizer: Any, ids: np.ndarray, modifiers: list[Any], batch_size: int = 1) -> float:
    """Apply `modifiers` to `model` in place; seconds of `oneshot`, weights in host memory before and after."""
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]

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
        recipe=modifiers,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=batch_size,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def write_checkpoints(doc: str | None, modifiers: Modifiers, recipes: list[str]) -> None:
    """The command line of a kind of recipe: each leaves a checkpoint in a folder of its own, and a line of seconds."""
    from transformers import AutoTokenizer

    args = _arguments(doc, recipes)
    tokenizer, ids = AutoTokenizer.from_pretrained(args.model), np.load(args.tokens)
    for recipe in args.recipes:
        model = load(args.model, args.dtype)
        seconds = compress(model, tokenizer, ids, modifiers(recipe))
        folder = args.out / f"llmcompressor-{recipe.replace(':', 'of')}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(json.dumps({"checkpoint": folder.name, "seconds": round(seconds, 2)}), flush=True)


def _arguments(doc: str | None, recipes: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recipes", nargs="+", default=recipes)
    return parser.parse_args()
