"""SparseGPT's sweep over the columns of matrices that read one input."""

from __future__ import annotations

import torch

from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.hessian import energy
from compression_dags.solvers.sweep import Rows, prune_sweep, row_spans
from compression_dags.sparsity.pruner import Problem, Pruned
from compression_dags.sparsity.pruners.sparsegpt import SparseGPT


def prune(options: SparseGPT, problem: Problem) -> list[Pruned]:
    """The matrices as the sweep leaves them, each with its relative output error."""
    assert problem.hessian is not None
    label = " + ".join(problem.names)
    problem.hessian.require_finite(label)
    factor = inverse_factor(problem.hessian.matrix, options.damping, label)
    stack = torch.cat([w.float() for w in problem.weights])
    spans = row_spans(problem.weights)
    parts = [Rows(a, b, p) for (a, b), p in zip(spans, problem.patterns, strict=True)]
    swept = prune_sweep(stack, factor, parts, block=options.block)
    found = []
    for (a, b), weight in zip(spans, problem.weights, strict=True):
        new, mask = swept.weight[a:b].to(weight.dtype), swept.mask[a:b]
        lost, whole = swept.error[a:b].double().sum(), energy(stack[a:b], problem.hessian.matrix)
        error = float((lost / whole).sqrt()) if whole > 0 else 0.0
        found.append(Pruned(new, mask, {"output_error": error, **factor.evidence}))
    return found
