"""Swaps in masks: exact changes, local optima against brute force, counts, monotony."""

from itertools import combinations

import pytest
import torch

from compression_dags.errors import InputError, IntegrityError
from compression_dags.solvers.admm import keep_largest
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.refit import reconstruction_error
from compression_dags.solvers.swaps import swap_refine
from compression_dags.solvers.sweep import Rows

F64 = {"dtype": torch.float64}


def problem(rows=24, d=32, tokens=400, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=rng, **F64) @ torch.randn(d, d, generator=rng, **F64) + 0.5
    return torch.randn(rows, d, generator=rng, **F64), x.T @ x


def error(w, mask, h):
    return reconstruction_error(w, w * mask, h)


def wanda(w, h, parts):
    return keep_largest(w * h.diagonal().sqrt(), parts, "row")


def best_neighbour(w, mask, h, m=0):
    """(rows,) the least error that any one swap leads to, by trying them all."""
    pairs = [(p, q) for p, q in combinations(range(w.shape[1]), 2) if not m or p // m == q // m]
    swapped = mask.repeat(len(pairs), 1, 1)
    for number, (p, q) in enumerate(pairs):
        swapped[number, :, p], swapped[number, :, q] = mask[:, q], mask[:, p]
    away = torch.where(swapped, 0, w)
    return ((away @ h) * away).sum(2).amin(0)


@pytest.mark.parametrize("pattern", [Pattern.unstructured(0.5), Pattern.n_of_m(2, 4), Pattern.n_of_m(3, 8)])
@pytest.mark.parametrize("candidates", [8, 16, 64])
def test_ends_in_a_local_optimum(pattern, candidates):
    w, h = problem()
    parts = [Rows(0, 24, pattern)]
    start = wanda(w, h, parts)
    mask = swap_refine(w, h, start, parts, candidates=candidates)
    before, after = error(w, start, h), error(w, mask, h)
    assert (after <= before * (1 + 1e-12)).all() and after.sum() < 0.8 * before.sum()
    assert torch.equal(mask.sum(1), start.sum(1))
    if pattern.m:
        assert ((~mask).unflatten(1, (-1, pattern.m)).sum(-1) == pattern.zeros).all()
    if candidates >= 32 or pattern.m:
        # all swaps were among the candidates, or the best one always is: its group comes first
        assert (best_neighbour(w, mask, h, pattern.m or 0) >= after * (1 - 2e-5)).all()
    assert (best_neighbour(w, start, h, pattern.m or 0) < before * (1 - 2e-5)).any()


def test_a_swap_is_the_best_of_all_and_changes_what_it_says():
    """Rows of 3 inputs: a round makes one swap."""
    w, h = problem(rows=200, d=3)
    parts = [Rows(0, 200, Pattern.unstructured(1 / 3))]
    start = torch.tensor([True, True, False]).expand(200, 3).clone()
    mask = swap_refine(w, h, start, parts, rounds=1)
    expected = torch.minimum(best_neighbour(w, start, h), error(w, start, h))
    assert ((mask != start).sum(1) <= 2).all() and (mask != start).any()
    assert torch.allclose(error(w, mask, h), expected, rtol=1e-9)


def test_finds_the_best_support_of_small_rows():
    """d = 8, keep 4: the best of all 70 masks for most rows, and far better than Wanda's."""
    w, h = problem(rows=60, d=8, seed=4)
    parts = [Rows(0, 60, Pattern.unstructured(0.5))]
    best = torch.full((60,), torch.inf, **F64)
    for kept in combinations(range(8), 4):
        mask = torch.zeros(60, 8, dtype=torch.bool)
        mask[:, list(kept)] = True
        best = torch.minimum(best, error(w, mask, h))
    start = wanda(w, h, parts)
    after = error(w, swap_refine(w, h, start, parts), h)
    assert (after >= best * (1 - 1e-9)).all()
    hits = [float((e <= best * (1 + 1e-4)).double().mean()) for e in (error(w, start, h), after)]
    assert hits[1] > 0.7 and hits[1] > 1.5 * hits[0]


def test_rows_keep_their_own_counts_and_parts_their_patterns():
    w, h = problem(rows=36)
    start = torch.rand(36, 32, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, 36)[:, None]
    parts = [Rows(0, 20, Pattern.unstructured(0.5)), Rows(20, 36, Pattern.n_of_m(2, 4))]
    start[20:] = wanda(w, h, parts)[20:]
    start[0], start[1], start[2] = False, True, True
    start[2, 5] = False
    for candidates in (4, 12):  # more places for candidates than rows 0 to 2 have: padding must do nothing
        mask = swap_refine(w, h, start, parts, candidates=candidates)
        assert torch.equal(mask.sum(1), start.sum(1)) and not torch.equal(mask, start)
        assert ((~mask[20:]).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert (error(w, mask, h) <= error(w, start, h) * (1 + 1e-12)).all()


def test_float32_and_chunks_and_caps(monkeypatch):
    w, h = problem(rows=40, d=64, tokens=900)
    parts = [Rows(0, 40, Pattern.unstructured(0.6))]
    start = wanda(w, h, parts)
    exact = swap_refine(w, h, start, parts, candidates=16)
    single = swap_refine(w.float(), h.float(), start, parts, candidates=16)
    assert torch.equal(single, swap_refine(w.float(), h.float(), start, parts, candidates=16))
    assert (error(w, single, h) <= error(w, start, h)).all()
    assert abs(float(error(w, single, h).sum() / error(w, exact, h).sum()) - 1) < 0.02
    one, two = (swap_refine(w, h, start, parts, candidates=4, rounds=r) for r in (1, 2))
    assert error(w, two, h).sum() < error(w, one, h).sum() < error(w, start, h).sum()
    monkeypatch.setattr("compression_dags.solvers.swaps.BATCH", 16 * 16 * 7)
    assert torch.equal(swap_refine(w, h, start, parts, candidates=16), exact)


def test_dead_inputs_end_up_pruned():
    w, h = problem()
    h[:4], h[:, :4] = 0, 0
    start = torch.zeros(24, 32, dtype=torch.bool)
    start[:, :16] = True
    mask = swap_refine(w, h, start, [Rows(0, 24, Pattern.unstructured(0.5))])
    assert not mask[:, :4].any()


def test_says_what_is_wrong():
    w, h = problem()
    parts = [Rows(0, 24, Pattern.unstructured(0.5))]
    start = wanda(w, h, parts)
    broken = h.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        swap_refine(w, broken, start, parts)
    with pytest.raises(InputError, match="must be bool"):
        swap_refine(w, h, start[:5], parts)
    with pytest.raises(InputError, match="multiple of 5"):
        swap_refine(w, h, start, [Rows(0, 24, Pattern.n_of_m(2, 5))])
