"""Magnitude pruning: the smallest weights of every matrix go. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compression_dags.sparsity.stage import SparsifyStage

if TYPE_CHECKING:
    pass


class Magnitude(SparsifyStage):
    """Zero the smallest |W|: over a whole matrix, or in every group of M inputs."""

    rule: ClassVar[str] = "the smallest |W|"
    implementation: ClassVar[str] = "compression_dags.sparsity.pruners.by_score:by_magnitude"
    method: Literal["magnitude"] = "magnitude"
