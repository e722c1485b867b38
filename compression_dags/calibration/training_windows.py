"""Windows of training tokens for distillation: equal shares of several corpora, some held out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compression_dags.calibration.corpora import read_documents
from compression_dags.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Times that a small corpus may be seen to fill its share of a training set.
MAX_EPOCHS = 4


@dataclass(frozen=True)
class TrainingWindows:
    """Windows of training tokens in the order of training, and some held out of it.

    Attributes:
        ids: (N, T) int32, distinct windows.
        order: (M,) indices into `ids`: the training order; a window may come up to `MAX_EPOCHS` times.
        held: (H, T) int32, never trained on.
        corpora: corpus → windows trained on, repetitions counted.
    """

    ids: np.ndarray
    order: np.ndarray
    held: np.ndarray
    corpora: dict[str, int]

    @property
    def tokens(self) -> int:
        return int(len(self.order) * self.ids.shape[1])


def training_windows(
    corpora: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    tokens: int,
    held_windows: int,
    seed: int,
) -> TrainingWindows:
    """Equal shares of several corpora, tokenised as far as needed, packed, cut and shuffled.

    A corpus smaller than its share is seen up to `MAX_EPOCHS` times, and the rest of its share goes to the larger ones.
    Held-out windows come from every corpus alike, and from its own end.

    Raises:
        InputError: a corpus is unknown, or too small for the held-out windows and one window more.
    """
    names = list(dict.fromkeys(corpora))
    wanted, held_each = max(1, tokens // length), max(1, held_windows // len(names))
    found = {name: _windows_of(name, tokenizer, length, wanted + held_each, seed) for name in names}
    parts: list[np.ndarray] = []
    held: list[np.ndarray] = []
    order: list[np.ndarray] = []
    counts: dict[str, int] = {}
    rng, start, left = np.random.default_rng(seed), 0, wanted
    for rank, name in enumerate(sorted(names, key=lambda n: len(found[n]))):  # equal sizes: as listed
        windows = found[name]
        if len(windows) <= held_each:
            raise InputError(
                f"corpus {name!r} gives {len(windows)} windows of {length} tokens; {held_each} are held out and at "
                "least one must be left to train on: use a shorter length or a larger corpus"
            )
        held.append(windows[-held_each:])
        parts.append(windows[:-held_each])
        count = min(left // (len(names) - rank), MAX_EPOCHS * len(parts[-1]))
        order += [
            start + rng.permutation(len(parts[-1]))[: max(0, count - e * len(parts[-1]))] for e in range(MAX_EPOCHS)
        ]
        counts[name], start, left = count, start + len(parts[-1]), left - count
    return TrainingWindows(np.concatenate(parts), rng.permutation(np.concatenate(order)), np.concatenate(held), counts)


def _windows_of(corpus: str, tokenizer: Any, length: int, wanted: int, seed: int) -> np.ndarray:
    """At most `wanted` windows (n, T) int32 of a corpus, its documents shuffled and joined as `make_blocks` does."""
    documents = read_documents(corpus)
    order = np.random.default_rng(seed).permutation(len(documents))
    stream: list[np.ndarray] = []
    have = 0
    for start in range(0, len(order), 8):  # in batches: fast tokenizers use every core
        texts = [documents[i] for i in order[start : start + 8]]
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
            end = [] if adds_bos or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            stream.append(np.asarray([*ids, *end], dtype=np.int32))
            have += len(stream[-1])
        if have >= wanted * length:
            break
    count = min(wanted, have // length)
    return np.concatenate(stream)[: count * length].reshape(count, length)
