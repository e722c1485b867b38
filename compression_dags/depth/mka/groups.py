"""What the search of `mka` merges: groups of layers, and candidates for the place of two of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compression_dags.passes.variant_scoring import Piece


@dataclass(frozen=True)
class Group:
    """Adjacent original layers [start, stop) that one layer of the student stands for.

    Attributes:
        shares: of every original layer in [start, stop).
        form: how the last merge was done; None for a layer as it is.
        tensors: what differs from layer `start`, by local name, in the stored dtype.
    """

    start: int
    stop: int
    shares: tuple[float, ...] = (1.0,)
    form: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def piece(self) -> Piece:
        return Piece(self.start, self.tensors)


@dataclass(frozen=True)
class MergeCandidate:
    """One layer in the place of groups p and p+1, and what is known of it before it is scored."""

    position: int
    group: Group
    note: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.group.start}-{self.group.stop - 1} {self.group.form}"
