"""Magnitude pruning: the smallest weights of every matrix go. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compression_dags.sparsity.stage import SparsifyStage

if TYPE_CHECKING:
    from compression_dags.sparsity.pruner import Problem, Pruned


class Magnitude(SparsifyStage):
    """Zero the smallest |W|: over a whole matrix, or in every group of M inputs."""

    rule: ClassVar[str] = "the smallest |W|"
    method: Literal["magnitude"] = "magnitude"

    def prune(self, problem: Problem) -> list[Pruned]:
        from compression_dags.sparsity.masks import mask_of_matrix
        from compression_dags.sparsity.pruner import masked

        pairs = zip(problem.weights, problem.patterns, strict=True)
        return masked(problem, [mask_of_matrix(w.float().abs(), p) for w, p in pairs])
