"""Pruners that score every weight by itself: the least scores go, the others stay as they are."""

from __future__ import annotations

from compression_dags.sparsity.masks import mask_of_matrix, mask_of_rows
from compression_dags.sparsity.pruner import Problem, Pruned, masked
from compression_dags.sparsity.pruners.magnitude import Magnitude
from compression_dags.sparsity.pruners.wanda import Wanda


def by_magnitude(options: Magnitude, problem: Problem) -> list[Pruned]:
    """The matrices without their smallest |W|."""
    pairs = zip(problem.weights, problem.patterns, strict=True)
    return masked(problem, [mask_of_matrix(w.float().abs(), p) for w, p in pairs])


def by_activation(options: Wanda, problem: Problem) -> list[Pruned]:
    """The matrices without their smallest |W|·‖x‖ of every output."""
    assert problem.mean_square is not None
    norms = problem.mean_square.sqrt().float()
    pairs = zip(problem.weights, problem.patterns, strict=True)
    masks = [mask_of_rows(w.float().abs() * norms, p) for w, p in pairs]
    return masked(problem, masks, {"dead_inputs": int((norms == 0).sum())})
