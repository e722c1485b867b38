"""Similarity of layers: estimators against their definitions and scikit-learn, safety rules, intervals, artifacts."""

import math

import numpy as np
import pytest
import torch
from similarity_cases import broken, noise, one_entry, stream

from compression_dags.errors import InputError
from compression_dags.similarity import cka, ksg, npib
from compression_dags.similarity.diffusion import (
    diffusion_embedding,
    diffusion_operator,
    distinct_rows,
    pairwise_distances,
)
from compression_dags.similarity.resampling import half_samples, interval


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of products of tiny matrices: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the embedding ----------------------------------------------------------------------------------------------


def embedded_by_svd(x: np.ndarray, sigma: float) -> np.ndarray:
    """The released steps for one layer, entry by entry and with a singular value decomposition."""
    n = len(x)
    kernel = np.array([[math.exp(-math.sqrt(np.linalg.norm(a - b) / sigma)) for b in x] for a in x])
    density = kernel.sum(axis=0)
    kernel = np.array([[kernel[i, j] / (density[i] * density[j]) ** 0.5 for j in range(n)] for i in range(n)])
    root = np.sqrt(kernel.sum(axis=0))
    vectors = np.linalg.svd(kernel / np.outer(root, root))[0]
    return vectors[:, 1:3] / vectors[:, :1]


@pytest.mark.parametrize("tokens", [57, 140])  # a full decomposition, and Lanczos
def test_embedding_equals_the_released_steps(tokens):
    hidden = stream(2, tokens).double()
    found = diffusion_embedding(hidden, sigma=8.0)
    for layer, mine in zip(hidden, found.coordinates, strict=True):
        theirs = embedded_by_svd(layer.numpy(), 8.0)
        signs = np.sign((theirs * mine.numpy()).sum(axis=0))
        np.testing.assert_allclose(mine.numpy(), theirs * signs, atol=1e-8)
    assert torch.all((found.spectrum[:, 0] - 1).abs() < 1e-10) and torch.all(found.sigma == 8)


def test_bandwidth_follows_the_data():
    hidden = stream(3)
    found, larger = diffusion_embedding(hidden), diffusion_embedding(1000 * hidden)
    for layer, sigma in zip(hidden, found.sigma, strict=True):
        distance = torch.cdist(layer.double(), layer.double(), compute_mode="donot_use_mm_for_euclid_dist")
        apart = np.sort(distance[np.triu_indices(len(layer), 1)].numpy())
        assert float(sigma) == pytest.approx(apart[(len(apart) - 1) // 2], rel=1e-6)
    torch.testing.assert_close(larger.sigma, 1000 * found.sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(larger.coordinates, found.coordinates, rtol=1e-4, atol=1e-5)


def test_diffusion_time_scales_the_coordinates():
    hidden = stream(2)
    still, later = diffusion_embedding(hidden), diffusion_embedding(hidden, time=2.0)
    torch.testing.assert_close(later.coordinates, still.coordinates * still.spectrum[:, None, 1:] ** 2)


def test_operator_is_symmetric_and_markov_like():
    distance = pairwise_distances(stream(1)[0])
    operator = diffusion_operator(distance, 5.0)
    assert torch.equal(operator, operator.T)
    kernel = torch.exp(-((distance / 5.0) ** 0.5))
    density = kernel.sum(0)
    kernel = kernel / (density[:, None] * density) ** 0.5
    root = kernel.sum(0).sqrt()
    torch.testing.assert_close(operator, kernel / torch.outer(root, root), rtol=1e-10, atol=1e-14)


def far_apart():
    hidden = stream(3)
    hidden[1, :80] += 1e6
    return hidden


def copies_of_two():
    hidden = stream(2)
    hidden[1, :120], hidden[1, 120:] = hidden[1, 0].clone(), hidden[1, 1].clone()
    return hidden


@pytest.mark.parametrize(
    ("hidden", "options", "says"),
    [
        (one_entry(torch.nan), {}, "layer 2: .*not finite"),
        (one_entry(torch.inf), {}, "layer 2: .*not finite"),
        (broken(1, 0.25), {}, "layer 1: .*all the same; a constant layer"),
        (far_apart(), {"sigma": 8.0}, r"layer 1: .*spectral gap .* more than 1e-08"),
        (copies_of_two(), {"sigma": 8.0}, "layer 1: .*fewer than 2 dimensions"),
        (copies_of_two(), {}, "layer 1: the median distance .* is 0"),
        (stream(2), {"floor": 0.1}, "layer 0: .*must be 1"),
    ],
)
def test_unsafe_kernels_are_refused(hidden, options, says):
    with pytest.raises(InputError, match=says) as found:
        diffusion_embedding(hidden, **options)
    assert "\n" not in str(found.value)


def test_copies_count_once():
    hidden = stream(3)
    twice = torch.cat([hidden, hidden[:, 20:60]], dim=1)
    one_layer = torch.cat([hidden, stream(3, 1, seed=5)], dim=1)
    one_layer[1, -1] = one_layer[1, 7]
    assert np.array_equal(distinct_rows(twice), np.arange(160)) and np.array_equal(distinct_rows(one_layer), range(160))
    assert torch.equal(npib.npib(twice), npib.npib(hidden))
    assert len(distinct_rows(hidden.bfloat16())) == 160


# -- estimators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [57, 200])  # dense, and by k-d trees
def test_mutual_information_is_scikit_learns(tokens):
    feature_selection = pytest.importorskip("sklearn.feature_selection")
    x, y = noise(1, tokens, 1)[0], noise(1, tokens, 2)[0]
    columns = torch.stack([x[:, 0], x[:, 0] * 30 + y[:, 0], (x[:, 1] ** 3) + 4, y[:, 1] + 0.1 * x[:, 0]]).numpy()
    mine = ksg.ksg_information(columns, neighbours=5)
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (2, 3)):
        (theirs,) = feature_selection.mutual_info_regression(
            columns[i][:, None], columns[j], discrete_features=False, n_neighbors=5, random_state=3
        )
        assert mine[i, j] == pytest.approx(theirs, abs=1e-12) and (i == j or mine[j, i] == 0)
    assert mine[0, 1] > 1
    paired = ksg.ksg_information(columns, group=2)
    assert np.all(paired[:2] == ksg.ksg_information(columns, group=4)[:2]) and np.all(paired[2:, :2] == 0)


def test_trees_and_dense_agree_on_the_rank_lattice(monkeypatch):
    """Ties everywhere: only the jitter decides, and both forms must let it decide alike."""
    coordinates = noise(3, 90) + noise(1, 90, 1)
    dense = npib.ksg(coordinates)
    monkeypatch.setattr(ksg, "_DENSE", 0)
    torch.testing.assert_close(npib.ksg(coordinates), dense, rtol=0, atol=1e-12)


def test_ranks_in_fixed_point_are_the_same_estimate():
    """Of equal ranks only the order of distances matters, so the jitter's size does not."""
    ranks = npib.rank_columns(noise(4, 120) + noise(1, 120, 1)).numpy().transpose(0, 2, 1).reshape(8, 120)
    np.testing.assert_allclose(ksg.ksg_information(ranks), ksg.ksg_information(ranks / 120), atol=2e-3)


@pytest.mark.parametrize("neighbours", [1, 50])
def test_entropies_are_the_released_formula(neighbours):
    neighbors = pytest.importorskip("sklearn.neighbors")
    points = noise(2, 57).numpy()
    for layer, mine in zip(points, ksg.neighbour_entropies(points, neighbours), strict=True):
        found = neighbors.NearestNeighbors(n_neighbors=neighbours + 1).fit(layer).kneighbors(layer)[0][:, -1]
        assert float(mine) == pytest.approx(-np.mean(np.log(neighbours / (57 * found**2))), abs=1e-12)


def test_released_pipeline_against_loops():
    """First 57 tokens, σ = 8, ranks, scikit-learn's estimates averaged over its own jitter, entropies a layer."""
    feature_selection = pytest.importorskip("sklearn.feature_selection")
    neighbors = pytest.importorskip("sklearn.neighbors")
    hidden = stream(3, 128)
    found = npib.released(hidden).numpy()
    ranks = []
    for layer, mine in zip(
        hidden.double().numpy(), diffusion_embedding(hidden[:, :57], sigma=8.0).coordinates, strict=True
    ):
        y = embedded_by_svd(layer[:57], 8.0)
        y = y * np.sign((y * mine.numpy()).sum(axis=0))
        ranks.append(np.argsort(np.argsort(y, axis=0), axis=0) / 57)
    embedded = diffusion_embedding(hidden[:, :57], sigma=8.0).coordinates
    assert np.array_equal(np.stack(ranks), npib.rank_columns(embedded).numpy() / 57)
    entropy = []
    for layer in ranks:
        radius = neighbors.NearestNeighbors(n_neighbors=51).fit(layer).kneighbors(layer)[0][:, -1]
        entropy.append(-np.mean(np.log(50 / (57 * radius**2))))
    for i in range(3):
        for j in range(i, 3):
            scores = [
                feature_selection.mutual_info_regression(
                    ranks[i], ranks[j][:, c], discrete_features=False, n_neighbors=5, random_state=seed
                )
                for c in range(2)
                for seed in range(8)
            ]
            expected = np.mean(scores) / np.sqrt(entropy[i] * entropy[j])
            assert found[i, j] == pytest.approx(expected, abs=0.15) and found[i, j] == found[j, i]
    assert found[0, 0] > 1.5  # neither normalised nor bounded, as the code has it
    other = hidden.clone()
    other[:, 57:] = 1e3 * torch.randn_like(other[:, 57:])
    assert np.array_equal(npib.released(other).numpy(), found)  # nothing else was looked at


def binned_by_loops(a: np.ndarray, b: np.ndarray, bins: int) -> float:
    n = len(a)

    def states(x):
        ranks = np.argsort(np.argsort(x, axis=0, kind="stable"), axis=0)
        return [tuple(int(r) * bins // n for r in row) for row in ranks]

    def entropy(items):
        counts = np.array([items.count(s) for s in set(items)])
        return -np.sum(counts / n * np.log(counts / n)) + (len(counts) - 1) / (2 * n)

    x, y = states(a), states(b)
    information = entropy(x) + entropy(y) - entropy(list(zip(x, y, strict=True)))
    return min(max(information, 0) / math.sqrt(entropy(x) * entropy(y)), 1)


@pytest.mark.parametrize(("tokens", "bins"), [(33, 2), (170, 3), (520, 4)])
def test_binned_is_its_definition(tokens, bins):
    coordinates = noise(3, tokens) + 2 * noise(1, tokens, 1)
    found = npib.binned(coordinates).numpy()
    for i in range(3):
        for j in range(3):
            expected = 1.0 if i == j else binned_by_loops(coordinates[i].numpy(), coordinates[j].numpy(), bins)
            assert found[i, j] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("estimator", ["binned", "gaussian-copula"])
def test_independent_layers_score_zero_equal_ones_one(estimator):
    coordinates = noise(6, 2048)
    found = npib.similarity_of(coordinates, estimator)
    apart = found[~torch.eye(6, dtype=torch.bool)]
    assert apart.max() < (0.01 if estimator == "binned" else 0.08) and torch.all(found.diagonal() == 1)
    same = npib.similarity_of(coordinates[[0, 0, 1]], estimator)
    assert same[0, 1] > 0.99


@pytest.mark.parametrize("estimator", ["binned", "ksg", "gaussian-copula"])
def test_more_dependence_more_similarity(estimator):
    shared, own = noise(1, 400, 7), noise(2, 400, 8)
    scores = []
    for weight in (0.0, 1.0, 3.0, 10.0):
        found = npib.similarity_of(own + weight * shared, estimator)
        assert torch.equal(found, found.T) and bool(torch.isfinite(found).all())
        if estimator != "ksg":
            assert found.min() >= 0 and found.max() <= 1
        scores.append(float(found[0, 1]))
    assert scores == sorted(scores) and scores[-1] > scores[0] + 0.3


def test_ksg_is_near_zero_for_independent_ranks():
    found = npib.ksg(noise(4, 400))
    assert found[~torch.eye(4, dtype=torch.bool)].max() < 0.1


@pytest.mark.parametrize("estimator", ["binned", "gaussian-copula"])
def test_invariances(estimator):
    """Order of tokens; rotation, shift and scale of any layer; diffusion time, since ranks do not see it."""
    hidden = stream(3).double()
    found = npib.npib(hidden, estimator)
    order = torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(npib.npib(hidden[:, order], estimator), found, rtol=0, atol=1e-9)
    moved = hidden.clone()
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    moved[1] = 7.5 * hidden[1] @ rotation + 3
    torch.testing.assert_close(npib.npib(moved, estimator), found, rtol=0, atol=1e-9)
    assert torch.equal(npib.npib(hidden, estimator, time=3.0), found)


def test_all_estimators_are_deterministic():
    hidden = stream(3)
    for estimator in ("binned", "ksg", "gaussian-copula"):
        assert torch.equal(npib.npib(hidden, estimator), npib.npib(hidden.clone(), estimator))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: npib.binned(noise(2, 31)), r"n = 31 distinct tokens are too few for B = 4 .* n ≥ 2 B² = 32: use more"),
        (lambda: npib.binned(noise(2, 200), bins=4), r"n = 200 .*B = 16 .* 512: use at most 3 bins, or more"),
        (lambda: npib.binned(noise(2, 200), bins=1), "at least 2"),
        (lambda: npib.ksg(noise(2, 50)), "need at least 51"),
        (lambda: npib.released(stream(2, 50)), "sequence 0 has 50 tokens"),
        (lambda: npib.npib(stream(2), "kernel"), "allowed: binned, ksg, gaussian-copula"),  # type: ignore[arg-type]
    ],
)
def test_too_little_data_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_bins_follow_the_tokens():
    assert [npib.bins_for(n) for n in (32, 161, 162, 511, 512, 4096)] == [2, 2, 3, 3, 4, 4]


@pytest.mark.gpu
def test_devices_agree():
    hidden = stream(3, 300)
    for estimator in ("binned", "ksg", "gaussian-copula"):
        cpu, gpu = npib.npib(hidden, estimator), npib.npib(hidden, estimator, device="cuda")
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=1e-8)
    torch.testing.assert_close(cka.cka(hidden, "cuda"), cka.cka(hidden), rtol=0, atol=1e-10)


# -- CKA --------------------------------------------------------------------------------------------------------


def cka_by_centring(a: np.ndarray, b: np.ndarray) -> float:
    """HSIC₁ as the inner product of U-centred Gram matrices (Székely & Rizzo 2014)."""

    def centred(x):
        n = len(x)
        k = x @ x.T
        np.fill_diagonal(k, 0)
        rows = k.sum(axis=0)
        u = k - rows[:, None] / (n - 2) - rows[None, :] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(u, 0)
        return u

    u, v = centred(a), centred(b)
    return np.sum(u * v) / math.sqrt(np.sum(u * u) * np.sum(v * v))


def test_cka_is_its_definition():
    hidden = stream(4, 60)
    found = cka.cka(hidden).numpy()
    for i in range(4):
        for j in range(4):
            expected = cka_by_centring(hidden[i].double().numpy(), hidden[j].double().numpy())
            assert found[i, j] == pytest.approx(expected, abs=1e-10)
    assert np.array_equal(found, found.T) and np.all(np.diagonal(found) == 1) and found.max() <= 1


def test_cka_is_debiased_and_invariant():
    wide = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    gram = [x.double() @ x.double().T for x in wide]
    plain = float((gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm()))
    assert plain > 0.7 and abs(float(cka.cka(wide)[0, 1])) < 0.1
    hidden = stream(2, 60).double()
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    moved = torch.stack([hidden[0], 50 * hidden[1] @ rotation - 9])
    torch.testing.assert_close(cka.cka(moved), cka.cka(hidden), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        (broken(1, 0.5), "layer 1: .*constant"),
        (one_entry(torch.nan), "layer 2: .*not finite"),
        (stream(2, 3), "at least 4"),
    ],
)
def test_cka_refuses(hidden, says):
    with pytest.raises(InputError, match=says):
        cka.cka(hidden)


# -- intervals --------------------------------------------------------------------------------------------------


def test_half_samples_are_of_whole_sequences():
    sequences = np.repeat([3, 8, 9, 20, 21], [4, 1, 7, 2, 5])
    drawn = half_samples(sequences, 30, 0)
    for rows in drawn:
        chosen = set(sequences[rows])
        assert len(chosen) == 2 and np.array_equal(rows, np.isin(sequences, list(chosen)))
    assert np.array_equal(drawn, half_samples(sequences, 30, 0))
    assert not np.array_equal(drawn, half_samples(sequences, 30, 1))


def test_one_sequence_claims_nothing():
    low, high = npib.bootstrap(noise(3, 64), np.zeros(64, dtype=int))
    assert np.all(low == 0) and np.all(high == 1)
    _, low, high = cka.bootstrap(stream(3, 64), np.zeros(64, dtype=int))
    assert np.all(low == -1) and np.all(high == 1)


def test_intervals_hold_their_value_and_are_seeded():
    hidden, sequences = stream(4, 200), np.repeat(np.arange(20), 10)
    points = diffusion_embedding(hidden).coordinates
    value = npib.binned(points).numpy()
    low, high = npib.bootstrap(points, sequences)
    assert np.all(low <= value) and np.all(value <= high) and low.min() >= 0 and high.max() <= 1
    again = npib.bootstrap(points, sequences)
    assert np.array_equal(low, again[0]) and np.array_equal(high, again[1])
    assert not np.array_equal(low, npib.bootstrap(points, sequences, seed=1)[0])
    kernel, low, high = cka.bootstrap(hidden, sequences)
    assert torch.equal(kernel, cka.cka(hidden))
    assert np.all(low <= kernel.numpy()) and np.all(kernel.numpy() <= high) and high[0, 1] > low[0, 1]


def test_half_samples_have_the_spread_of_the_mean():
    """For a mean, where theory knows it: s / √S."""
    values = np.random.default_rng(0).normal(size=400)
    means = np.array([[[values[rows].mean()]] for rows in half_samples(np.arange(400), 2000, 1)])
    low, high = interval(np.array([[values.mean()]]), means, 400, -9, 9)
    expected = 2 * 1.645 * values.std() / 20
    assert float((high - low)[0, 0]) == pytest.approx(expected, rel=0.06)


def test_intervals_cover_what_more_prompts_would_give():
    """Tokens of a sequence share a part, so rows are not independent; nominal coverage is 90 %."""

    def draw(rng, sequences):
        shared = rng.normal(size=(sequences, 1, 2)) * 0.7 + rng.normal(size=(sequences, 8, 2))
        pair = [shared + 0.5 * rng.normal(size=shared.shape) for _ in range(2)]
        return torch.from_numpy(np.stack(pair).reshape(2, -1, 2)), np.repeat(np.arange(sequences), 8)

    truth = float(npib.binned(draw(np.random.default_rng(99), 20_000)[0], bins=3)[0, 1])
    covered = 0
    for trial in range(40):
        points, sequences = draw(np.random.default_rng(trial), 64)
        low, high = npib.bootstrap(points, sequences, bins=3, resamples=20, seed=trial)
        assert high[0, 1] - low[0, 1] < 0.3
        covered += low[0, 1] <= truth <= high[0, 1]
    assert covered >= 30
