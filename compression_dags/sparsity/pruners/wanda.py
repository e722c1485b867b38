"""Wanda (Sun et al., ICLR 2024, locuslab/wanda): weights times the norms of their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import StatisticKind

if TYPE_CHECKING:
    pass


class Wanda(SparsifyStage):
    """Zero the smallest |W_ij| · ‖X_j‖ of every output row (or group of M inputs); no weight is changed."""

    statistic: ClassVar[StatisticKind] = "mean_square"
    rule: ClassVar[str] = "the smallest |W|·‖x‖ of every output"
    implementation: ClassVar[str] = "compression_dags.sparsity.pruners.by_score:by_activation"
    method: Literal["wanda"] = "wanda"
