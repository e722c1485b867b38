"""ADMM masks: exact counts, valid patterns, near the best of all supports, better than the sweep's and Wanda's."""

from itertools import combinations

import pytest
import torch

from compression_dags.errors import InputError, IntegrityError
from compression_dags.solvers.admm import Schedule, admm_mask, keep_largest, smallest_of_many
from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.refit import reconstruction_error, refit
from compression_dags.solvers.sweep import Rows, prune_sweep, smallest


def admm_prune(weight, hessian, parts, *, damping=0.01, **options):
    """What the pruner does: masks, then the exact refit."""
    found = admm_mask(weight, hessian, parts, damping=damping, **options)
    return refit(weight, hessian, found.mask, start=found.values, damping=damping).weight, found.mask


def refit_kept(*problem, **options):
    return refit(*problem, **options).weight


def problem(rows=48, d=64, tokens=1500, seed=0, dtype=torch.float32):
    """Correlated inputs with a few strong channels, as a transformer's are."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=rng) @ torch.diag(torch.rand(d, generator=rng) ** 3)
    x = torch.randn(tokens, d, generator=rng) @ mix.T + 0.3
    x[:, :3] *= 5
    return torch.randn(rows, d, generator=rng).to(dtype), (x.T @ x).to(dtype)


def total(w, pruned, h):
    return float(reconstruction_error(w, pruned, h).sum())


PATTERNS = [Pattern.unstructured(0.5), Pattern.unstructured(0.7), Pattern.n_of_m(2, 4), Pattern.n_of_m(4, 8)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=["50", "70", "2of4", "4of8"])
def test_beats_the_sweep_and_wanda(pattern):
    w, h = problem()
    parts = [Rows(0, 48, pattern)]
    found, mask = admm_prune(w, h, parts)
    swept = prune_sweep(w, inverse_factor(h), parts, block=32)
    wanda = keep_largest(w * h.diagonal().sqrt(), parts, "row")
    assert total(w, found, h) < 0.97 * total(w, refit_kept(w, h, swept.mask, start=swept.weight), h)
    assert total(w, found, h) < 0.9 * total(w, refit_kept(w, h, wanda), h)
    assert int((~mask).sum()) == round(pattern.sparsity * mask.numel()) and torch.equal(found != 0, mask)
    if pattern.m:
        assert ((~mask).unflatten(1, (-1, pattern.m)).sum(-1) == pattern.zeros).all()


def test_comes_near_the_best_of_all_supports():
    """Every row's best 4 of 8 inputs by trying all 70 supports."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(500, 8, generator=rng) + 1.5 * torch.randn(500, 2, generator=rng) @ torch.randn(2, 8, generator=rng)
    w, h = torch.randn(40, 8, generator=rng).double(), (x.T @ x).double()
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for kept in combinations(range(8), 4):
        mask = torch.zeros(40, 8, dtype=torch.bool)
        mask[:, list(kept)] = True
        best = torch.minimum(best, reconstruction_error(w, refit_kept(w, h, mask, damping=0), h))
    found, _ = admm_prune(w, h, [Rows(0, 40, Pattern.unstructured(0.5))], scope="row", damping=0)
    errors = reconstruction_error(w, found, h)
    assert (errors >= best * (1 - 1e-9)).all()
    assert float(errors.sum() / best.sum()) < 1.03
    assert float((errors <= best * (1 + 1e-6)).double().mean()) > 0.6
    wanda = keep_largest(w * h.diagonal().sqrt(), [Rows(0, 40, Pattern.unstructured(0.5))], "row")
    assert total(w, refit_kept(w, h, wanda, damping=0), h) / float(best.sum()) > 1.1  # the bound above says something


def test_orthogonal_inputs_leave_nothing_to_choose():
    """H diagonal: the best mask is by w²H_jj, and kept weights stay as they are."""
    w, h = problem()
    h = torch.diag(h.diagonal())
    parts = [Rows(0, 48, Pattern.unstructured(0.6))]
    found, mask = admm_prune(w, h, parts, damping=0)
    best = keep_largest(w * h.diagonal().sqrt(), parts)
    assert total(w, found, h) < 1.01 * total(w, w * best, h)
    assert torch.allclose(found, w * mask, rtol=1e-5)


def test_parts_have_their_own_patterns():
    w, h = problem(rows=60)
    parts = [Rows(0, 20, Pattern.unstructured(0.3)), Rows(20, 40, Pattern.n_of_m(2, 4)), Rows(40, 60, Pattern(0.7))]
    mask = admm_mask(w, h, parts).mask
    assert [int((~mask[p.start : p.stop]).sum()) for p in parts] == [384, 640, 896]
    assert ((~mask[20:40]).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    rows = admm_mask(w, h, parts, scope="row").mask
    assert ((~rows[40:]).sum(1) == int(0.7 * 64 + 0.5)).all() and ((~rows[:20]).sum(1) == 19).all()


def test_same_again_and_bfloat16_products_cost_little():
    w, h = problem()
    parts = [Rows(0, 48, Pattern.unstructured(0.6))]
    found, again = admm_mask(w, h, parts), admm_mask(w, h, parts)
    assert torch.equal(found.mask, again.mask) and torch.equal(found.values, again.values)
    half = admm_mask(w, h, parts, half=True)
    assert not torch.equal(half.values, found.values)
    errors = [total(w, refit_kept(w, h, f.mask), h) for f in (found, half)]
    assert errors[1] < 1.03 * errors[0]


def test_a_first_rho_that_is_too_large_is_lowered():
    w, h = problem()
    parts = [Rows(0, 48, Pattern.unstructured(0.5))]
    found = admm_mask(w, h, parts, schedule=Schedule(rho=100))
    start = keep_largest(w * h.diagonal().sqrt(), parts)
    assert found.rho < 10 and not torch.equal(found.mask, start)
    assert total(w, refit_kept(w, h, found.mask), h) < 0.9 * total(w, refit_kept(w, h, start), h)
    assert admm_mask(w, h, parts, schedule=Schedule(iterations=5)).iterations == 5


def test_dead_inputs_go_first_and_nothing_to_prune_is_fine():
    w, h = problem()
    h[:16], h[:, :16] = 0, 0
    found, mask = admm_prune(w, h, [Rows(0, 48, Pattern.unstructured(0.25))])
    assert not mask[:, :16].any() and mask[:, 16:].all()
    assert torch.allclose(found[:, 16:], w[:, 16:], rtol=1e-5)
    kept, mask = admm_prune(w, h, [Rows(0, 48, Pattern.unstructured(0.0))])
    assert mask.all() and torch.allclose(kept[:, 16:], w[:, 16:], rtol=1e-5)


def test_ties_are_pruned_by_index():
    parts = [Rows(0, 2, Pattern.unstructured(0.5))]
    ones = torch.ones(2, 6)
    assert keep_largest(ones, parts).tolist() == [[False] * 6, [True] * 6]
    assert keep_largest(ones, parts, "row").tolist() == [[False] * 3 + [True] * 3] * 2
    assert keep_largest(ones, [Rows(0, 2, Pattern.n_of_m(1, 3))]).tolist() == [[False, False, True] * 2] * 2


@pytest.mark.parametrize("kind", ["normal", "ties", "ordered", "misleading"])
def test_threshold_among_many_is_the_sorted_one(kind):
    rng = torch.Generator().manual_seed(0)
    score = torch.randn(50_000, generator=rng)
    if kind == "ties":
        score = (score * 4).round()
    elif kind == "ordered":
        score = score.sort().values
    elif kind == "misleading":  # the sample sees none of the small ones
        score[:: len(score) // 1024] += 100
    for count in (0, 1, 7, 25_000, 40_001, 49_999, 50_000):
        assert torch.equal(smallest_of_many(score, count, sample=1024), smallest(score, count))


def test_says_what_is_wrong():
    w, h = problem()
    parts = [Rows(0, 48, Pattern.unstructured(0.5))]
    broken = h.clone()
    broken[1, 2] = torch.inf
    with pytest.raises(IntegrityError, match="not finite"):
        admm_prune(w, broken, parts)
    indefinite = -h
    with pytest.raises(IntegrityError, match="positive definite"):
        admm_prune(w, indefinite, parts)
    with pytest.raises(InputError, match="do not cover"):
        admm_prune(w, h, [Rows(0, 40, Pattern.unstructured(0.5))])
    with pytest.raises(InputError, match="multiple of 5"):
        admm_prune(w, h, [Rows(0, 48, Pattern.n_of_m(2, 5))])
    with pytest.raises(InputError, match="column"):
        admm_mask(w, h, parts, scope="column")
