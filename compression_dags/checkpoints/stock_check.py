"""An imported copy loads in stock transformers and computes: checked once, within bounded memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from compression_dags.checkpoints.gate import check_causal, check_finite_logits, load_stock
from compression_dags.checkpoints.headers import one_line
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.writer import unchanged, write_checkpoint
from compression_dags.errors import InputError, IntegrityError

#: Weights above this are never loaded whole, and above 1 GB only if two of their files would fill as much memory.
STOCK_LOAD_LIMIT = 8 * 10**9
_SMALL = 10**9
_TINY = 64 * 10**6


def check_stock_load(checkpoint: Checkpoint, source: Path) -> None:
    """Stock transformers loads it with nothing missing, unexpected or of another shape; its logits are finite.

    A model that is too large is cut to the first two layers and the first of each kind, beside embedding and head.
    That the others have the same tensors is known from the headers.

    Args:
        source: what errors call the directory.

    Raises:
        InputError: naming what is wrong.
    """
    try:
        if loads_whole(checkpoint):
            _check(checkpoint)
            return
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=checkpoint.path.parent) as folder:
            _check(_cut(checkpoint, Path(folder)))
    except IntegrityError as error:
        raise InputError(str(error).replace(str(checkpoint.path), str(source))) from None
    except (InputError, OSError):
        raise
    except Exception as error:  # shape mismatches are RuntimeErrors, bad fields have types of their own
        raise InputError(f"{source} does not load in stock transformers: {one_line(error)}") from error


def loads_whole(checkpoint: Checkpoint) -> bool:
    """Whether the model fits in the memory of two of its files, or is small."""
    largest = max((checkpoint.path / file).stat().st_size for file in checkpoint.files)
    return checkpoint.nbytes <= min(STOCK_LOAD_LIMIT, max(_SMALL, 2 * largest))


def _cut(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    architecture, config = checkpoint.architecture, checkpoint.config
    kinds = {architecture.layer_kind(config, i): i for i in reversed(range(checkpoint.num_layers))}
    kept = sorted({0, min(1, checkpoint.num_layers - 1), *kinds.values()})
    tensors = {name: unchanged(checkpoint, name) for name in checkpoint.outside_layers()}
    for position, index in enumerate(kept):
        for local, name in checkpoint.layer(index).items():
            new = architecture.layer_prefix(position) + local
            tensors[new] = unchanged(checkpoint, name, new)
    return write_checkpoint(folder / "cut", checkpoint, architecture.remap_config(config, kept), tensors, kept=kept)


def _check(checkpoint: Checkpoint) -> None:
    model: Any = load_stock(checkpoint.path, dtype="float32" if checkpoint.nbytes <= _TINY else "auto")
    check_finite_logits(model, checkpoint.path, rows=int(checkpoint.text_config["vocab_size"]))
    if checkpoint.architecture.kinds:
        check_causal(model, checkpoint.path)
