"""Hessians, factors and the column sweep against a naive reference in float64."""

import numpy as np
import pytest
import torch

from compression_dags.errors import InputError, IntegrityError
from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.hessian import Hessian
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.sweep import Rows, group_ranks, prune_sweep, smallest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows=24, d=40, tokens=400, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=rng, dtype=torch.float64)
    x = torch.randn(tokens, d, generator=rng, dtype=torch.float64) @ mix + 0.3
    return torch.randn(rows, d, generator=rng, dtype=torch.float64).to(dtype), (x.T @ x).to(dtype), x


def output_error(weight, pruned, x):
    return float(((weight - pruned) @ x.T).square().sum())


def reference(weight, hessian, sparsity, block, damping=0.01):
    """SparseGPT as printed: three factorisations, a column at a time, no stacking."""
    h = hessian.clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    rows, d = w.shape
    done = 0
    for start in range(0, d, block):
        stop = min(start + block, d)
        count = int(sparsity * rows * stop + 0.5) - done
        done += count
        score = (w[:, start:stop] / u.diagonal()[start:stop]).square().flatten()
        chosen = torch.from_numpy(np.argsort(score.numpy(), kind="stable")[:count].copy())
        flat = torch.ones(score.numel(), dtype=torch.bool)
        flat[chosen] = False
        kept[:, start:stop] = flat.view(rows, -1)
        for j in range(start, stop):
            e = torch.where(kept[:, j], 0, w[:, j]) / u[j, j]
            w[:, j:] -= e[:, None] * u[j, j:][None]
            w[:, j] = torch.where(kept[:, j], w[:, j], 0)
    return w, kept


def test_factor_is_that_of_the_damped_inverse():
    _, hessian, _ = problem()
    found = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    assert torch.allclose(found.upper.T @ found.upper, torch.linalg.inv(damped), rtol=1e-8, atol=1e-12)
    assert torch.equal(found.upper, found.upper.triu()) and found.attempts == 1 and found.damping == 0.01


@pytest.mark.parametrize("block", [8, 16, 40, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.73])
def test_unstructured_is_sparsegpt(block, sparsity):
    weight, hessian, _ = problem()
    found = prune_sweep(
        weight, inverse_factor(hessian), [Rows(0, 24, Pattern.unstructured(sparsity))], block=block, backend="torch"
    )
    wanted, kept = reference(weight, hessian, sparsity, block)
    assert torch.equal(found.mask, kept) and torch.allclose(found.weight, wanted, rtol=1e-9, atol=1e-10)
    assert int((~found.mask).sum()) == int(sparsity * weight.numel() + 0.5)
    assert bool((found.weight[~found.mask] == 0).all())


def test_a_stack_is_pruned_part_by_part():
    weight, hessian, _ = problem(rows=30)
    factor = inverse_factor(hessian)
    patterns = [Pattern.unstructured(0.2), Pattern.unstructured(0.6), Pattern.unstructured(0.5)]
    edges = [(0, 8), (8, 20), (20, 30)]
    stacked = prune_sweep(weight, factor, [Rows(a, b, p) for (a, b), p in zip(edges, patterns, strict=True)], block=16)
    for (a, b), pattern in zip(edges, patterns, strict=True):
        alone = prune_sweep(weight[a:b], factor, [Rows(0, b - a, pattern)], block=16)
        assert torch.equal(stacked.mask[a:b], alone.mask) and torch.allclose(stacked.weight[a:b], alone.weight)


def test_a_stack_may_mix_groups_and_free_masks():
    weight, hessian, _ = problem(rows=20)
    factor, free, grouped = inverse_factor(hessian), Pattern.unstructured(0.4), Pattern.n_of_m(2, 4)
    stacked = prune_sweep(weight, factor, [Rows(0, 9, free), Rows(9, 20, grouped)], block=8)
    above, below = (
        prune_sweep(w, factor, [Rows(0, len(w), p)], block=8) for w, p in ((weight[:9], free), (weight[9:], grouped))
    )
    assert torch.equal(stacked.mask, torch.cat([above.mask, below.mask]))
    assert torch.allclose(stacked.weight, torch.cat([above.weight, below.weight]))
    with pytest.raises(InputError, match="parts of one stack must have one M"):
        prune_sweep(weight, factor, [Rows(0, 9, Pattern.n_of_m(4, 8)), Rows(9, 20, grouped)])


def test_groups_choose_from_updated_weights():
    weight, hessian, x = problem(rows=32)
    factor = inverse_factor(hessian)
    mixed = [Rows(0, 16, Pattern.n_of_m(2, 4)), Rows(16, 32, Pattern.n_of_m(3, 4))]
    found = prune_sweep(weight, factor, mixed, block=8)
    counts = found.mask.view(32, -1, 4).sum(-1)
    assert bool((counts[:16] == 2).all()) and bool((counts[16:] == 3).all())
    same = prune_sweep(weight, factor, mixed, block=40)
    assert torch.equal(found.mask, same.mask)  # groups never look past their block
    before = (weight.view(32, -1, 4).abs() * hessian.diagonal().sqrt().view(-1, 4)).argsort(-1)[:16, :, :2]
    static = torch.ones(16, 10, 4, dtype=torch.bool).scatter(-1, before, False).view(16, 40)
    assert not torch.equal(static, found.mask[:16])
    fixed = prune_sweep(weight[:16], factor, [mixed[0]], mask=static)
    assert output_error(weight[:16], found.weight[:16], x) < output_error(weight[:16], fixed.weight, x)


def test_a_given_mask_is_kept_whatever_the_block():
    weight, hessian, _ = problem()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    parts = [Rows(0, 24, Pattern.unstructured(0.5))]
    a = prune_sweep(weight, inverse_factor(hessian), parts, mask=mask, block=8)
    b = prune_sweep(weight, inverse_factor(hessian), parts, mask=mask, block=32)
    assert torch.equal(a.mask, mask) and torch.allclose(a.weight, b.weight, rtol=1e-9)
    assert torch.allclose(a.error, b.error)


def test_the_update_pays_for_every_mask():
    weight, hessian, x = problem(rows=64)
    factor, parts = inverse_factor(hessian), [Rows(0, 64, Pattern.unstructured(0.5))]
    for score in (weight.abs(), weight.abs() * hessian.diagonal().sqrt()):
        mask = score >= score.median(dim=1, keepdim=True).values
        updated = prune_sweep(weight, factor, parts, mask=mask)
        assert output_error(weight, updated.weight, x) < output_error(weight, weight * mask, x)


def test_float32_agrees_with_float64():
    weight, hessian, _ = problem(rows=16, d=128, tokens=2000)
    parts = [Rows(0, 16, Pattern.unstructured(0.5))]
    exact = prune_sweep(weight, inverse_factor(hessian), parts)
    single = prune_sweep(
        weight.float(), inverse_factor(hessian.float()), [Rows(0, 16, Pattern.unstructured(0.5))], mask=exact.mask
    )
    assert torch.allclose(single.weight.double(), exact.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu(interpreted=True)
@pytest.mark.parametrize("pattern", [Pattern.unstructured(0.5), Pattern.n_of_m(2, 4), Pattern.n_of_m(4, 8)])
def test_the_kernel_is_the_portable_form(pattern):
    # two tiles of rows, parts that end within one; in the interpreter every element costs
    rows, columns = (37, 72) if DEVICE == "cuda" else (19, 48)
    weight, hessian, _ = problem(rows=rows, d=columns, dtype=torch.float32)
    factor = inverse_factor(hessian.to(DEVICE))
    parts = [Rows(0, rows // 2, pattern), Rows(rows // 2, rows, pattern)]
    a = prune_sweep(weight.to(DEVICE), factor, parts, block=32, backend="torch")
    b = prune_sweep(weight.to(DEVICE), factor, parts, block=32, backend="triton")
    assert torch.equal(a.mask, b.mask) and torch.allclose(a.weight, b.weight, rtol=1e-5, atol=1e-5)
    assert torch.allclose(a.error, b.error, rtol=1e-4)


def test_dead_inputs_go_and_are_counted():
    weight, hessian, _ = problem()
    hessian[[3, 7]] = 0
    hessian[:, [3, 7]] = 0
    factor = inverse_factor(hessian)
    assert factor.evidence["dead_inputs"] == 2
    found = prune_sweep(weight, factor, [Rows(0, 24, Pattern.unstructured(0.5))])
    assert bool((found.weight[:, [3, 7]] == 0).all()) and bool(torch.isfinite(found.weight).all())


def test_a_singular_hessian_is_damped_more_and_says_so():
    hessian = torch.ones(6, 6) * 1e4
    hessian[0, 1] = hessian[1, 0] = 2e4  # not positive semi-definite
    found = inverse_factor(hessian, 0.01)
    assert found.attempts > 1 and found.damping > 0.01
    with pytest.raises(IntegrityError, match="q_proj: the Hessian is not positive definite with damping up to 10;"):
        inverse_factor(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01, "q_proj")
    with pytest.raises(IntegrityError, match="q_proj: the Hessian is not finite"):
        inverse_factor(torch.full((2, 2), float("nan")), 0.01, "q_proj")


def test_hessian_sums_and_refuses_overflow():
    x = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = Hessian.empty(8, "cpu")
    for row in x:
        found.add(row)
    wanted = x.reshape(-1, 8).double()
    assert torch.allclose(found.matrix.double(), wanted.T @ wanted, rtol=1e-6, atol=1e-5) and found.tokens == 150
    assert torch.allclose(found.mean_square(), wanted.square().mean(0), rtol=1e-6)
    found.add(torch.full((1, 8), float("inf")))
    with pytest.raises(IntegrityError, match="mlp_input: activations are not finite"):
        found.require_finite("mlp_input")


def test_smallest_and_ranks_break_ties_by_index():
    score = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert smallest(score, 3).tolist() == [False, True, True, False, True]
    assert smallest(score, 0).sum() == 0 and smallest(score, 5).all()
    assert group_ranks(torch.tensor([[1.0, 1.0, 0.0, 2.0]])).tolist() == [[1, 2, 0, 3]]


def test_bad_input():
    weight, hessian, _ = problem()
    factor = inverse_factor(hessian)
    with pytest.raises(InputError, match="do not cover 24 rows"):
        prune_sweep(weight, factor, [Rows(0, 20, Pattern.unstructured(0.5))])
    with pytest.raises(InputError, match="rows of 40 inputs are not a multiple of 16"):
        prune_sweep(weight, factor, [Rows(0, 24, Pattern.n_of_m(8, 16))])
    with pytest.raises(InputError, match="block of 6 columns is not a multiple of 4"):
        prune_sweep(weight, factor, [Rows(0, 24, Pattern.n_of_m(2, 4))], block=6)
    with pytest.raises(InputError, match="backend 'fast' is unknown"):
        prune_sweep(weight, factor, [Rows(0, 24, Pattern.unstructured(0.5))], backend="fast")
