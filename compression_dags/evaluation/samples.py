"""What a checkpoint writes: greedy continuations of a few fixed prompts, to be read beside the base model's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compression_dags.checkpoints.importing import TOKENIZERS
from compression_dags.provenance.escaping import markdown_text

VERSION = "1"
PROMPTS = ("Once upon a time", "The old house at the end of the street", "The capital of France is")
NEW_TOKENS = 40
#: The file of an artifact: `prompts`, and their `texts` or null.
WRITTEN = "samples.json"
NO_TOKENIZER = "the model has no tokenizer, so nothing was generated"


def has_tokenizer(directory: Path) -> bool:
    """Whether tokenizer files lie there; without any, transformers may build an empty one for the family."""
    return any((directory / name).is_file() for name in TOKENIZERS)


def as_markdown(directory: Path) -> str:
    """Stored prompts in bold, each with its continuation; empty where none were generated."""
    found = json.loads((directory / WRITTEN).read_text())
    pairs = zip(found["prompts"], found["texts"] or [], strict=False)
    return "\n\n".join(f"**{markdown_text(prompt)}** {markdown_text(text)}" for prompt, text in pairs)


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """What stock `generate` adds to each prompt: the likeliest token each time, until the end of text.

    One prompt at a time, so that no padding touches the result; the checkpoint's own sampling options do not count.

    Args:
        new_tokens: at most so many, and no more than the model's context holds.

    Returns:
        A text a prompt, without the prompt and without special tokens.
    """
    with _greedy(model):
        return [_continuation(model, tokenizer, prompt, new_tokens) for prompt in prompts]


def _continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    # the code location loads this module for its prompts
    import torch  # noqa: PLC0415

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    room = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + new_tokens
    new_tokens = min(new_tokens, room - ids.shape[1])
    if new_tokens < 1:
        return ""
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)[0]
    # the text after the prompt's: decoding the new tokens alone would lose the first one's leading space
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0], out))
    return whole[len(before) :]


@contextlib.contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """The checkpoint's generation config would fill in whatever an argument leaves open; this one has only its ids."""
    # the code location loads this module for its prompts
    from transformers import GenerationConfig  # noqa: PLC0415

    own = model.generation_config
    ids = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**{**ids, "pad_token_id": ids["pad_token_id"] or 0})
    try:
        yield
    finally:
        model.generation_config = own
