"""Wanda (Sun et al., ICLR 2024, locuslab/wanda): weights times the norms of their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import StatisticKind

if TYPE_CHECKING:
    from compression_dags.sparsity.pruner import Problem, Pruned


class Wanda(SparsifyStage):
    """Zero the smallest |W_ij| · ‖X_j‖ of every output row (or group of M inputs); no weight is changed."""

    statistic: ClassVar[StatisticKind] = "mean_square"
    rule: ClassVar[str] = "the smallest |W|·‖x‖ of every output"
    method: Literal["wanda"] = "wanda"

    def prune(self, problem: Problem) -> list[Pruned]:
        from compression_dags.sparsity.masks import mask_of_rows
        from compression_dags.sparsity.pruner import masked

        assert problem.mean_square is not None
        norms = problem.mean_square.sqrt().float()
        pairs = zip(problem.weights, problem.patterns, strict=True)
        masks = [mask_of_rows(w.float().abs() * norms, p) for w, p in pairs]
        return masked(problem, masks, {"dead_inputs": int((norms == 0).sum())})
