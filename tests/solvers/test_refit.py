"""The refit of kept weights against least squares on explicit inputs."""

import numpy as np
import pytest
import torch

from compression_dags.errors import InputError, IntegrityError
from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.refit import propagated_target, reconstruction_error, refit
from compression_dags.solvers.sweep import Rows, prune_sweep


def refit_kept(*problem, **options):
    return refit(*problem, **options).weight


F64 = {"dtype": torch.float64}


def problem(rows=12, d=24, tokens=300, seed=0):
    """Weights (rows, d), correlated inputs (tokens, d), and a mask with another count in every row."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=rng, **F64) @ torch.randn(d, d, generator=rng, **F64) + 0.5
    mask = torch.rand(rows, d, generator=rng) < torch.linspace(0.2, 0.8, rows)[:, None]
    return torch.randn(rows, d, generator=rng, **F64), x, mask


def least_squares(x, target, mask):
    """Row by row, numpy's lstsq on the kept inputs alone."""
    out = np.zeros(mask.shape)
    for i, kept in enumerate(mask.numpy()):
        if kept.any():
            out[i, kept] = np.linalg.lstsq(x.numpy()[:, kept], target.numpy()[:, i], rcond=None)[0]
    return torch.from_numpy(out)


def test_error_is_that_of_the_outputs():
    w, x, mask = problem()
    expected = ((w - w * mask) @ x.T).square().sum(1)
    assert torch.allclose(reconstruction_error(w, w * mask, x.T @ x), expected, rtol=1e-10)
    assert reconstruction_error(w.float(), w.float(), x.T @ x).abs().max() == 0


@pytest.mark.parametrize("method", ["auto", "cholesky", "cg"])
def test_equals_least_squares_row_by_row(method):
    w, x, mask = problem()
    mask[3], mask[5] = False, True
    expected = least_squares(x, x @ w.T, mask)
    found = refit(w, x.T @ x, mask, damping=0, method=method, tolerance=1e-12, iterations=500)
    assert torch.allclose(found.weight, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.weight != 0, mask) and found.unfinished == 0
    assert torch.equal(found.weight[5], w[5])


def test_batches_of_cholesky_do_not_matter(monkeypatch):
    w, x, mask = problem(rows=40)
    whole = refit(w, x.T @ x, mask, method="cholesky").weight
    monkeypatch.setattr("compression_dags.solvers.refit.BATCH", 150)
    assert torch.allclose(refit(w, x.T @ x, mask, method="cholesky").weight, whole, rtol=1e-9)


def test_damping_pulls_towards_the_original():
    w, x, mask = problem()
    ridge = 0.3 * (x.T @ x).diagonal().mean()
    rows = torch.cat([x, ridge.sqrt() * torch.eye(len(mask.T), **F64)])
    expected = least_squares(rows, rows @ w.T, mask)
    assert torch.allclose(refit(w, x.T @ x, mask, damping=0.3, tolerance=1e-12).weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_cross_aims_at_the_dense_output(method):
    w, x, mask = problem()
    seen = 0.6 * x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5), **F64)
    expected = least_squares(seen, x @ w.T, mask)
    found = refit(w, seen.T @ seen, mask, cross=x.T @ seen, damping=0, method=method, tolerance=1e-12).weight
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    plain = refit(w, seen.T @ seen, mask, damping=0).weight
    assert ((seen @ found.T - x @ w.T).norm() < 0.99 * (seen @ plain.T - x @ w.T).norm()).item()
    dense = least_squares(seen, x @ w.T, torch.ones_like(mask))
    assert torch.allclose(propagated_target(w, seen.T @ seen, x.T @ seen, 0.0), dense, rtol=1e-6, atol=1e-8)


def test_float32_reaches_the_optimum():
    w, x, mask = problem(rows=64, d=96, tokens=2000, seed=3)
    h = x.T @ x
    best = refit(w, h, mask, method="cholesky").weight
    found = refit(w.float(), h.float(), mask, method="cg")
    assert found.weight.dtype == torch.float32 and found.method == "cg" and found.unfinished == 0
    excess = reconstruction_error(w, found.weight, h).sum() / reconstruction_error(w, best, h).sum()
    assert excess < 1 + 1e-3


def test_never_falls_behind_its_start():
    """Also with few tokens, where H is singular, and from a start that is the optimum already."""
    w, x, mask = problem(rows=30, d=40, tokens=60, seed=2)
    for tokens in (60, 15):
        h = x[:tokens].T @ x[:tokens]
        ridged = h + 0.01 * h.diagonal().mean() * torch.eye(40, **F64)
        swept = prune_sweep(w, inverse_factor(h), [Rows(0, 30, Pattern.unstructured(0.5))], block=8)
        for start, kept in ((swept.weight, swept.mask), (w * mask, mask), (refit_kept(w, h, mask), mask)):
            for method, cap in (("cg", 1), ("cg", 200), ("cholesky", 0)):
                found = refit(w, h, kept, start=start, method=method, iterations=cap).weight
                before, after = (reconstruction_error(w, v, ridged) for v in (start, found))
                assert (after <= before * (1 + 1e-9)).all()
        assert (
            reconstruction_error(w, refit_kept(w, h, swept.mask), h).sum()
            < 0.95 * reconstruction_error(w, swept.weight, h).sum()
        )


def test_keeps_the_start_of_rows_that_a_solver_fails(monkeypatch):
    w, x, mask = problem()
    h = x.T @ x
    good = refit_kept(w, h, mask, damping=0)

    def failing(matrix, mask, residual, *_):
        delta = good - w * mask
        delta[0], delta[1, mask[1]], delta[2] = 10 * residual[0], torch.nan, 0
        return delta, 1, 0

    monkeypatch.setattr("compression_dags.solvers.refit.conjugate_gradients", failing)
    found = refit(w, h, mask, damping=0, method="cg")
    assert found.kept_start == 3 and torch.equal(found.weight[:3], (w * mask)[:3])
    assert torch.allclose(found.weight[3:], good[3:]) and found.evidence["refit_kept_start"] == 3


def test_singular_blocks_go_to_cg():
    w, x, mask = problem(d=24)
    x[:, 7] = x[:, 3]  # two equal inputs: blocks with both are singular without damping
    mask[:6, [3, 7]], mask[6:, 3] = True, False
    found = refit(w, x.T @ x, mask, damping=0, method="cholesky", tolerance=1e-12)
    assert found.method == "cholesky+cg" and found.iterations > 0
    best = reconstruction_error(w, least_squares(x, x @ w.T, mask), x.T @ x)
    assert torch.allclose(reconstruction_error(w, found.weight, x.T @ x), best, rtol=1e-4)


def test_weights_of_dead_inputs_stay():
    w, x, mask = problem()
    x[:, 4], mask[:, 4] = 0, True
    for method in ("cg", "cholesky"):
        found = refit(w, x.T @ x, mask, damping=0, method=method).weight
        assert torch.equal(found[:, 4], w[:, 4]) and bool(torch.isfinite(found).all())
    assert torch.equal(refit(w, torch.zeros(24, 24, **F64), mask).weight, w * mask)


def test_says_what_is_wrong():
    w, x, mask = problem()
    h = x.T @ x
    broken = h.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        refit_kept(w, broken, mask)
    with pytest.raises(IntegrityError, match="cross sums are not finite"):
        refit_kept(w, h, mask, cross=broken)
    with pytest.raises(IntegrityError, match="weights are not finite"):
        refit_kept(w / 0, h, mask)
    with pytest.raises(InputError, match="do not fit"):
        refit_kept(w, h[:5, :5], mask)
    with pytest.raises(InputError, match="do not fit"):
        refit_kept(w, h, mask, cross=h[:5, :5])
    with pytest.raises(InputError, match="must be bool"):
        refit_kept(w, h, mask.float())
    with pytest.raises(InputError, match="float32 or float64"):
        refit_kept(w.half(), h, mask)
    with pytest.raises(InputError, match="newton"):
        refit(w, h, mask, method="newton")
