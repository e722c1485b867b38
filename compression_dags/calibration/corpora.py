"""Calibration corpora → exact blocks of tokens.

A corpus is an embedded name, a local file that `texts` reads, or a hub data set (`hub:org/name[/config][:split]`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from safetensors import safe_open
from safetensors.numpy import save_file

from compression_dags.calibration import texts
from compression_dags.errors import InputError
from compression_dags.options import Options
from compression_dags.paths import PROJECT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


EMBEDDED = {"c4-sample": PROJECT / "data" / "c4-sample" / "c4_1800.jsonl"}
#: Named corpora that are not shipped: where they are looked for, under $COMPRESSION_DAGS_DATA and the project's data/.
NAMED = {"novels": "novels/novels.jsonl.xz"}
#: Rows taken of a hub data set.
HUB_ROWS = 20_000


class Calibration(Options):
    """What calibration data a recipe asks for.

    Attributes:
        corpus: `c4-sample`, a path to .txt / .jsonl / .parquet, or `hub:org/name[/config][:split]`.
        sequences: N, the number of token blocks.
        length: T, tokens in a block; clipped to the model's context, and the clipped value is recorded.
        seed: shuffles the documents, and picks the sampled tokens.
        packing: `concat` joins documents into one stream and cuts it. `document` takes one truncated document a
            block and pads the rest, which every statistic then masks.
        samples: n, tokens whose hidden states are kept for similarity metrics.
    """

    version: ClassVar[str] = "1"

    corpus: str = "c4-sample"
    sequences: int = Field(128, ge=1)
    length: int = Field(2048, ge=8)
    seed: int = Field(0, ge=0)
    packing: Literal["concat", "document"] = "concat"
    samples: int = Field(2048, ge=64)

    @property
    def slug(self) -> str:
        """Name of the shared analysis that uses this calibration, as an asset key prefix."""
        stem = self.corpus.split("/")[-1].split(".")[0] if self.corpus not in EMBEDDED else self.corpus
        name = f"{stem}_{self.sequences}x{self.length}"
        defaults = Calibration.model_validate({})
        if self.seed != defaults.seed:
            name += f"_s{self.seed}"
        if self.packing != defaults.packing:
            name += f"_{self.packing}"
        if self.samples != defaults.samples:
            name += f"_n{self.samples}"
        if self.corpus not in EMBEDDED:
            name += "_" + hashlib.sha256(self.corpus.encode()).hexdigest()[:6]
        return "".join(c if c.isalnum() else "_" for c in name).lower()


@dataclass(frozen=True)
class TokenBlocks:
    """Calibration tokens: ids (N, T) int32 and the number of real tokens of each row (N,) int32."""

    ids: np.ndarray
    lengths: np.ndarray
    documents: int

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def resolve_corpus(corpus: str) -> Path | None:
    """The corpus's file, or None for a hub data set.

    Raises:
        InputError: neither embedded, nor a file of a known form, nor a hub reference.
    """
    if corpus.startswith("hub:"):
        return None
    path = EMBEDDED.get(corpus) or _named(corpus) or Path(corpus).expanduser()
    if not path.exists() and not path.is_symlink():
        raise InputError(
            f"calibration corpus {corpus!r} is unknown; allowed: {', '.join(EMBEDDED)}, a file that ends in "
            f"{', '.join(texts.SUFFIXES)}, or hub:org/name[/config][:split]"
        )
    texts.regular(path)
    return path


#: Tokens that a byte of a plain text file can give at most, a mark at both ends of every document included.
TOKENS_A_BYTE = 2


def check_size(corpus: str, sequences: int, length: int, option: str = "sequences") -> None:
    """Refuse more tokens than a plain text file has bytes for, whatever the tokenizer. Others are counted when read.

    Args:
        option: what the user may lower to need fewer sequences.

    Raises:
        InputError: with the size, the need and the remedy.
    """
    path = resolve_corpus(corpus)
    if path is None or path.suffix not in {".txt", ".jsonl"}:
        return
    size, need = path.stat().st_size, sequences * length
    if need > TOKENS_A_BYTE * size:
        raise InputError(
            f"corpus {corpus!r} has {size:,} bytes and cannot give {sequences:,} × {length:,} = {need:,} "
            f"tokens: lower `{option}` or `length`, or name a larger corpus"
        )


def _named(corpus: str) -> Path | None:
    """The file of a named corpus that the project does not ship.

    Raises:
        InputError: the name is known and the file is in neither place.
    """
    if corpus not in NAMED:
        return None
    folders = [Path.cwd() / "data", PROJECT / "data"]
    if given := os.environ.get("COMPRESSION_DAGS_DATA"):
        folders.insert(0, Path(given))
    for folder in folders:
        if (folder / NAMED[corpus]).is_file():
            return folder / NAMED[corpus]
    raise InputError(
        f"corpus {corpus!r} is not shipped: put {NAMED[corpus]} under ./data, or set "
        "COMPRESSION_DAGS_DATA to a folder that holds it"
    )


def check_corpus(corpus: str) -> None:
    """Read a corpus once, and refuse what `read_documents` would; of a hub data set only whether it is there.

    Raises:
        InputError: naming the file and its row.
    """
    path = resolve_corpus(corpus)
    if path is None:
        _hub_revision(corpus)
    elif not texts.check(path):
        raise _empty(corpus)


def corpus_digest(corpus: str) -> str:
    """sha256 of the corpus file; of a hub data set, of its reference and its commit."""
    path = resolve_corpus(corpus)
    if path is not None:
        return texts.digest(path)
    return hashlib.sha256(f"{corpus}@{_hub_revision(corpus)}".encode()).hexdigest()


def corpora_digests(corpora: Iterable[str]) -> dict[str, str]:
    """Corpus → its digest, of every corpus named."""
    return {name: corpus_digest(name) for name in corpora}


def read_documents(corpus: str) -> list[str]:
    """All non-empty documents of a corpus, in file order; those of a .txt are separated by empty lines.

    Raises:
        InputError: the corpus is empty, or a row is no text.
    """
    path = resolve_corpus(corpus)
    found = _read_hub(corpus) if path is None else texts.rows(path)
    if path is not None and path.name.lower().endswith(".txt"):
        found = (part for text in found for part in text.split("\n\n"))
    kept = [text for text in found if text.strip()]
    if not kept:
        raise _empty(corpus)
    return kept


def _empty(corpus: str) -> InputError:
    return InputError(f"calibration corpus {corpus!r} is empty: it holds no text")


def _hub_parts(corpus: str) -> tuple[str, list[str], str]:
    """Repository, configuration if any, split.

    Raises:
        InputError: not of the form `hub:org/name[/config][:split]`.
    """
    name, _, split = corpus.removeprefix("hub:").partition(":")
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"calibration corpus {corpus!r} must look like hub:org/name[/config][:split]")
    return "/".join(parts[:2]), parts[2:3], split or "train"


@functools.cache
def _hub_revision(corpus: str) -> str:
    """Commit of a hub data set: what the hub says, asked once a process; offline, what its cache holds.

    Raises:
        InputError: neither knows it.
    """
    # recipes are read without the hub's client
    from huggingface_hub import HfApi, constants  # noqa: PLC0415

    repository, _, _ = _hub_parts(corpus)
    reason = "HF_HUB_OFFLINE is set"
    try:
        if not constants.HF_HUB_OFFLINE and (sha := HfApi().dataset_info(repository, timeout=15).sha):
            return sha
    except Exception as error:  # every HTTP client and proxy has its own types
        reason = type(error).__name__
    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "refs" / "main"
    with contextlib.suppress(OSError):
        return cached.read_text(encoding="utf-8").strip()
    raise InputError(f"calibration corpus {corpus!r}: the hub does not say its commit ({reason}); give a local file")


def _read_hub(corpus: str) -> Iterator[str]:
    # recipes are read without datasets, which imports pandas and torch
    from datasets import load_dataset  # noqa: PLC0415

    repository, config, split = _hub_parts(corpus)
    revision = _hub_revision(corpus)
    try:
        data = load_dataset(repository, *config, split=split, streaming=True, revision=revision)
        for number, row in zip(range(1, HUB_ROWS + 1), data, strict=False):
            if "text" not in row:
                raise InputError(f"{corpus}: row {number}: needs a `text` column; it has {', '.join(row)}")
            yield texts.checked_text(row["text"], f"{corpus}: row {number}")
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"calibration corpus {corpus!r} could not be read from the hub: {said}") from None


def make_blocks(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, request: Calibration, context: int
) -> TokenBlocks:
    """Tokenise shuffled documents and cut them into blocks; only as many documents as needed are tokenised.

    Documents are tokenised as the tokenizer does it by default (with BOS where it adds one) and, when it adds none,
    separated by EOS where there is one.

    Raises:
        InputError: the corpus gives too few tokens for `sequences × length`.
    """
    length = min(request.length, context)
    order = np.random.default_rng(request.seed).permutation(len(documents))
    encoded = _encode(documents, order, tokenizer)
    if request.packing == "document":
        return _one_document_a_row(
            encoded, request.sequences, length, int(pad) if isinstance(pad := tokenizer.pad_token_id, int) else 0
        )
    need, stream, used = request.sequences * length, [], 0
    for ids in encoded:
        stream.extend(ids)
        used += 1
        if len(stream) >= need:
            break
    if len(stream) < need:
        raise InputError(
            f"calibration corpus {request.corpus!r} gives {len(stream):,} tokens with this tokenizer; "
            f"{request.sequences} × {length} needs {need:,}: lower `sequences` to at most {len(stream) // length}"
        )
    ids = np.asarray(stream[:need], dtype=np.int32).reshape(request.sequences, length)
    return TokenBlocks(ids, np.full(request.sequences, length, dtype=np.int32), used)


def _encode(documents: list[str], order: np.ndarray, tokenizer: Any) -> Iterator[list[int]]:
    for index in order:
        ids = tokenizer(documents[index], verbose=False)["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        yield ids if adds_bos or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _one_document_a_row(encoded: Iterator[list[int]], rows: int, length: int, pad: int) -> TokenBlocks:
    ids = np.full((rows, length), pad, dtype=np.int32)
    lengths = np.zeros(rows, dtype=np.int32)
    row = 0
    for document in encoded:
        if row == rows:
            break
        if len(document) >= 8:  # shorter ones say nothing about a context
            ids[row, : len(document[:length])] = document[:length]
            lengths[row] = len(document[:length])
            row += 1
    if row < rows:
        raise InputError(f"the corpus holds {row} documents of at least 8 tokens; `sequences: {rows}` needs as many")
    return TokenBlocks(ids, lengths, rows)


def save_blocks(blocks: TokenBlocks, path: Path) -> None:
    save_file({"ids": blocks.ids, "lengths": blocks.lengths}, path, metadata={"documents": str(blocks.documents)})


def load_blocks(path: Path) -> TokenBlocks:
    with safe_open(path, framework="numpy") as f:
        return TokenBlocks(f.get_tensor("ids"), f.get_tensor("lengths"), int(f.metadata()["documents"]))
