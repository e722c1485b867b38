"""ADMM's masks for matrices that read one input, and the exact refit of what they keep."""

from __future__ import annotations

import torch

from compression_dags.solvers.admm import admm_mask
from compression_dags.solvers.refit import propagated_target, reconstruction_error, refit
from compression_dags.solvers.sweep import Rows, row_spans
from compression_dags.sparsity.pruner import Problem, Pruned
from compression_dags.sparsity.pruners.admm import ADMM


def prune(options: ADMM, problem: Problem) -> list[Pruned]:
    """The matrices with the masks that ADMM chose, and the weights refitted to them."""
    assert problem.hessian is not None
    problem.hessian.require_finite(" + ".join(problem.names))
    hessian = problem.hessian.matrix
    stack = torch.cat([w.float() for w in problem.weights])
    target = stack
    if problem.cross is not None:
        target = propagated_target(stack, hessian, problem.cross, options.damping, problem.drift)
    spans = row_spans(problem.weights)
    parts = [Rows(a, b, p) for (a, b), p in zip(spans, problem.patterns, strict=True)]
    chosen = admm_mask(target, hessian, parts, damping=options.damping)
    aim = "own" if problem.cross is None else "dense" if problem.drift is None else "residual"
    fitted = refit(target, hessian, chosen.mask, start=chosen.values, damping=options.damping)
    found = []
    for (a, b), weight in zip(spans, problem.weights, strict=True):
        new, mask = fitted.weight[a:b].to(weight.dtype), chosen.mask[a:b]
        lost = reconstruction_error(target[a:b], new.float(), hessian).double().sum()
        whole = reconstruction_error(target[a:b], torch.zeros_like(target[a:b]), hessian).double().sum()
        evidence = {"target": aim, "output_error": float((lost / whole).sqrt()) if whole > 0 else 0.0}
        found.append(Pruned(new, mask, evidence | chosen.evidence | fitted.evidence))
    return found
