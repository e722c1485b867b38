"""Masks with exact counts, and their packed form. True is a kept weight everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from compression_dags.errors import IntegrityError
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.sweep import group_ranks, smallest

if TYPE_CHECKING:
    from torch import Tensor

#: Where a checkpoint's masks lie. In a folder of their own, because engines read every `*.safetensors` file beside
#: `config.json` when there is no index, and because files beside the weights travel to the next stage.
MASKS = "sparsity/masks.safetensors"
#: Where older artifacts have them.
BESIDE = "masks.safetensors"


def mask_of_matrix(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest scores of a whole matrix (rows, columns); ties go by index. N:M: of every group."""
    if pattern.m is not None:
        return mask_of_groups(score, pattern)
    return ~smallest(score.flatten(), int(pattern.sparsity * score.numel() + 0.5)).view_as(score)


def mask_of_rows(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest scores of every row, the same number in each: floor(columns · sparsity) go, as in Wanda."""
    if pattern.m is not None:
        return mask_of_groups(score, pattern)
    count = int(score.shape[1] * pattern.sparsity + 1e-9)
    if not count:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values  # a selection: no row is sorted
    below, equal = score < threshold, score == threshold
    owed = count - below.sum(1, keepdim=True, dtype=torch.int32)
    return ~(below | (equal & (equal.cumsum(1, dtype=torch.int32) <= owed)))


def mask_of_groups(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep all but `pattern.zeros` of every `pattern.m` consecutive inputs."""
    assert pattern.m is not None and pattern.zeros is not None
    ranks = group_ranks(score.unflatten(1, (-1, pattern.m)))
    return (ranks >= pattern.zeros).flatten(1)


def pack_mask(mask: Tensor) -> Tensor:
    """(rows, columns) bool → (rows, ⌈columns / 8⌉) uint8 on the same device, the first input in the highest bit."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = bits[..., 0] << 7
    for place in range(1, 8):
        packed |= bits[..., place] << (7 - place)
    return packed


def unpack_mask(packed: np.ndarray, columns: int) -> np.ndarray:
    return np.unpackbits(packed, axis=1, count=columns).astype(bool)


def mask_digest(packed: np.ndarray) -> str:
    """sha256 of a packed mask, for the ledger."""
    return hashlib.sha256(packed.data).hexdigest()


def save_masks(packed: Mapping[str, np.ndarray], columns: Mapping[str, int], directory: Path) -> Path:
    """The file `MASKS`: module name → packed mask, the row lengths in the metadata. Equal masks are equal bytes.

    The metadata has one key, because safetensors writes several in an order that changes with every call.
    """
    file = directory / MASKS
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(packed.items())), file, metadata={"columns": json.dumps(dict(sorted(columns.items())))})
    return file


def settle_masks(directory: Path) -> bool:
    """Whether a checkpoint has masks; those of an older artifact are moved to `MASKS`."""
    if (directory / BESIDE).is_file():
        (directory / MASKS).parent.mkdir(exist_ok=True)
        (directory / BESIDE).replace(directory / MASKS)
    return (directory / MASKS).is_file()


def load_masks(directory: Path) -> dict[str, np.ndarray]:
    """Module name → (rows, columns) bool."""
    path = directory / MASKS
    with safe_open(path if path.is_file() else directory / BESIDE, framework="numpy") as file:
        noted = file.metadata()
        columns = json.loads(noted["columns"]) if noted.keys() == {"columns"} else noted
        return {name: unpack_mask(file.get_tensor(name), int(columns[name])) for name in file.keys()}  # noqa: SIM118


def check_pattern(name: str, mask: Tensor, pattern: Pattern) -> None:
    """
    Raises:
        IntegrityError: a group of an N:M mask has another number of zeros.
    """
    if pattern.m is None:
        return
    zeros = (~mask).unflatten(1, (-1, pattern.m)).sum(-1)
    if not bool((zeros == pattern.zeros).all()):
        raise IntegrityError(f"{name}: a group of {pattern.m} inputs does not have {pattern.zeros} zeros")
