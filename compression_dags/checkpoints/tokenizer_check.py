"""A tokenizer that loads, and that belongs to the weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compression_dags.checkpoints.gate import quiet
from compression_dags.checkpoints.headers import one_line
from compression_dags.errors import InputError

#: Share of the embedding's rows that the tokenizer must name.
_FILLED = 0.9


def check_tokenizer(directory: Path, source: Path, rows: int) -> list[str]:
    """Notes on tokens that have no row of the embedding. The tokenizer is fast, and its ids nearly fill the embedding.

    Args:
        directory: holds config.json and the tokenizer's files.
        source: what errors call the directory.
        rows: of the embedding.

    Raises:
        InputError: it does not load, is a slow one, or is not this model's.
    """
    tokenizer = _load(directory, source)
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {source} is a slow one ({type(tokenizer).__name__}); tokenizer.json is needed"
        )
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    special = {t for n, t in ((n, str(t)) for n, t in tokenizer.added_tokens_decoder.items() if t.special) if n >= rows}
    if beyond.keys() - special:
        highest = max(beyond.values())
        raise InputError(
            f"{source}: the tokenizer's highest id is {highest}, the embedding has {rows} rows; not its own?"
        )
    for role in ("bos_token", "unk_token"):  # these get into texts that name no special token
        if (token := getattr(tokenizer, role, None)) in beyond:
            raise InputError(f"{source}: {role} {token!r} has id {beyond[token]}, the embedding has {rows} rows")
    if len(tokenizer) < _FILLED * rows:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens for {rows} embedding rows (below 90 %); not its own?"
        )
    if not beyond:
        return []
    named = ", ".join(sorted(beyond, key=lambda token: beyond[token])[:3])
    return [f"the tokenizer has {len(beyond)} added special tokens past the embedding's {rows} rows: {named[:100]}"]


def _load(directory: Path, source: Path) -> Any:
    # the code location loads this module without transformers
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            tokenizer("a", add_special_tokens=True)
            return tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"the tokenizer in {source} does not load: {one_line(error)}") from None
