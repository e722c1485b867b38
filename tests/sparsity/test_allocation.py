"""Allocators: the exact program, targets met, released formulas, redundancy from the calibration pass."""

import json
import math

import numpy as np
import pytest
import torch
from concat_cases import random_blocks
from scipy.optimize import linprog

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.grams import MODES, alignment, alignment_from_features, packed_gram
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.registry import METHODS
from compression_dags.similarity.redundancy import read_redundancy
from compression_dags.similarity.redundancy_tables import write_redundancy
from compression_dags.sparsity.allocation import SparsityPlan, make_plan, mean_sparsity
from compression_dags.sparsity.allocators import ALLOCATORS
from compression_dags.sparsity.allocators.als import ALS, suffix_mean
from compression_dags.sparsity.allocators.ramp import Ramp, search
from compression_dags.sparsity.evidence import PruneProbe, fresh_evidence, stored_evidence
from compression_dags.sparsity.knapsack import fill_greedy, fill_smooth
from compression_dags.sparsity.stage import all_matrices


def allocator(method, **options):
    return ALLOCATORS[method].model_validate({"method": method, **options})


every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    """A GQA Llama, its calibration pass, and a pruner with a bench on it."""
    source = Checkpoint(tiny_model("llama"))
    blocks = random_blocks(rows=8, length=40)
    folder = tmp_path_factory.mktemp("activations")
    profile_activations(DecoderStream(source), blocks, samples=200).save(folder)
    out = tmp_path_factory.mktemp("redundancy")
    metadata = write_redundancy(folder, out)
    stage = METHODS["sparsify"]["wanda"].model_validate({"method": "wanda", "sparsity": 0.5})
    probe = PruneProbe(stage, source, blocks, fit_rows=4, held_rows=2)
    return source, stored_evidence(source, folder, out), probe, metadata, out


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_the_linear_program(seed):
    rng = np.random.default_rng(seed)
    n = 12
    value, size = rng.uniform(0.5, 2, n), rng.uniform(1, 9, n)
    low, high = np.full(n, 0.3), np.full(n, 0.7)
    budget = 0.52 * size.sum()
    found = fill_greedy(np.log(value), size, low, high, budget)
    exact = linprog(-value, A_ub=size[None], b_ub=[budget], bounds=list(zip(low, high, strict=True)), method="highs")
    assert value @ found.density == pytest.approx(-exact.fun, rel=1e-9)
    assert size @ found.density == pytest.approx(budget)
    between = (found.density > low + 1e-9) & (found.density < high - 1e-9)
    assert between.sum() <= 1  # bang-bang
    tiny = fill_greedy(np.log(value) - 700, size, low, high, budget)  # e^−700: no float holds the values themselves
    assert np.allclose(tiny.density, found.density)


def test_smooth_is_between_uniform_and_greedy():
    value, size = np.array([1.0, 2.0, 3.0]), np.ones(3)
    low, high = np.zeros(3), np.ones(3)
    flat = fill_smooth(value * 1e-6, size, low, high, 1.5, curvature=size).density
    steep = fill_smooth(value * 1e6, size, low, high, 1.5, curvature=size).density
    assert np.allclose(flat, 0.5, atol=1e-5) and np.allclose(steep, [0, 0.5, 1], atol=1e-5)
    with pytest.raises(InputError):
        fill_greedy(np.zeros(3), size, np.full(3, 0.6), high, 1.5)


# -- every allocator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in ALLOCATORS if name != "given"])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_every_allocator_meets_the_target(case, method, target):
    source, evidence, probe, _, _ = case
    matrices = all_matrices(source)
    options = {"points": 2, "refine": 1, "least_rise": 0.05} if method == "ramp" else {}
    allocation = allocator(method, **options)
    allocated = allocation.allocate(matrices, target, evidence, probe)
    plan = make_plan(method, matrices, allocated, target)
    shares = {n: p.sparsity for n, p in plan.patterns.items()}
    unit = max(sum(m.numel for m in matrices if m.layer == i) for i in range(source.num_layers))
    step = getattr(allocation, "granularity", 0) * unit / sum(m.numel for m in matrices)
    assert abs(mean_sparsity(matrices, shares) - target) <= step + 1e-9
    assert all(0 <= s < 1 for s in shares.values())
    assert (len(set(shares.values())) == 1) == (method == "uniform")
    again = make_plan(method, matrices, allocation.allocate(matrices, target, evidence, probe), target)
    assert again.digest == plan.digest


def test_groups_mix_their_n(case, tmp_path):
    source, evidence, probe, _, _ = case
    matrices = all_matrices(source)
    allocated = ALS(level="layer").allocate(matrices, 0.5, evidence, probe)
    plan = make_plan("als", matrices, allocated, 0.5, "4:8")
    assert {p.m for p in plan.patterns.values()} == {8} and len({p.zeros for p in plan.patterns.values()}) > 1
    assert mean_sparsity(matrices, {n: p.sparsity for n, p in plan.patterns.items()}) == pytest.approx(
        0.5, abs=1 / 8 / 4
    )
    plan.save(tmp_path)
    loaded = SparsityPlan.load(tmp_path)
    assert loaded.digest == plan.digest and loaded.patterns == dict(plan.patterns) and loaded.method == "als"


def test_als_follows_its_formulas(case):
    source, evidence, _, _, _ = case
    matrices = all_matrices(source)
    options = ALS(level="layer", rm="paper", feature_norm=False, mu="one", bounds=(0.3, 0.7), objective="printed")
    allocated = options.allocate(matrices, 0.5, evidence)
    _, table = evidence.redundancy.table("layer", "in", "paper", False)
    rho = table.sum(1) - 1
    omega = np.exp(-rho)
    suffix = np.array([omega[i:].mean() for i in range(len(omega))])
    assert np.allclose(np.exp(suffix_mean(-rho)), suffix)
    size = np.array([sum(m.numel for m in matrices if m.layer == i) for i in range(len(rho))], dtype=float)
    exact = linprog(-suffix / suffix.max(), A_ub=size[None], b_ub=[0.5 * size.sum()], bounds=[(0.3, 0.7)] * len(rho))
    ours = [1 - allocated.sparsity[f"model.layers.{i}.mlp.down_proj"] for i in range(len(rho))]
    assert suffix @ np.array(ours) == pytest.approx(suffix @ exact.x, rel=0.01)  # to one grid step


def test_forced_and_impossible_targets(case):
    source, evidence, _, _, _ = case
    matrices = all_matrices(source)
    forced = ALS(bounds=(0.3, 0.7), level="layer").allocate(matrices, 0.7, evidence)
    assert set(forced.sparsity.values()) == {0.7} and any("forced uniform" in n for n in forced.notes)
    with pytest.raises(InputError, match=r"0.8 is outside the bounds 0.3 to 0.7"):
        ALS(bounds=(0.3, 0.7)).check(0.8)
    with pytest.raises(InputError, match=r"sparsity 1\.0 is not possible"):
        allocator("uniform").check(1.0)


def test_dlp_is_the_released_rule(case):
    source, evidence, probe, _, _ = case
    matrices = all_matrices(source)
    found = (
        ALLOCATORS["dlp"]
        .model_validate({"method": "dlp", "granularity": 0.0001})
        .allocate(matrices, 0.5, evidence, probe)
    )
    score = []
    for layer in range(source.num_layers):
        own = [m for m in matrices if m.layer == layer]
        parts = [np.abs(probe.weights(m.name).double().numpy()) * evidence.channel_norms(m) for m in own]
        score.append(np.concatenate([p.ravel() for p in parts]).mean())
    importance = 1 - np.array(score) / sum(score)
    spread = 0.3 * (importance - importance.min()) / (importance.max() - importance.min())
    wanted = 1 - (spread - spread.mean() + 0.5)
    ours = [found.sparsity[f"model.layers.{i}.mlp.down_proj"] for i in range(len(score))]
    assert np.allclose(ours, wanted, atol=2e-4)


def test_ramp_searches_on_held_out_text(case):
    source, evidence, probe, _, _ = case
    tried = []
    assert search(lambda x: tried.append(x) or (x - 0.17) ** 2, 0.0, 0.3, 4, 6) == pytest.approx(0.17, abs=0.02)
    assert len(tried) <= 10
    found = Ramp(points=2, refine=0).allocate(all_matrices(source), 0.5, evidence, probe)
    losses = {t["rise"]: t["loss"] for t in found.summary["tried"]}
    assert len(losses) == 2 and found.summary["rise"] == min(losses, key=losses.get)
    assert all(math.isfinite(v) for v in losses.values())


# -- redundancy --------------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("token_norm", [False, True])
def test_grams_are_cross_products(mode, token_norm):
    rng = torch.Generator().manual_seed(0)
    xs = [torch.randn(40, d, generator=rng) + 0.2 for d in (6, 9, 30)]
    grams = torch.stack([packed_gram(x) for x in xs])
    found = alignment(grams, mode, token_norm=token_norm)
    assert torch.allclose(found, alignment_from_features(xs, mode, token_norm=token_norm), atol=1e-4)
    assert torch.allclose(found.diagonal(), torch.ones(3, dtype=torch.float64))
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=rng)).Q
    turned = torch.stack([grams[0], packed_gram(3 * xs[1] @ rotation), grams[2]])
    assert torch.allclose(alignment(turned, mode, token_norm=token_norm), found, atol=1e-4)


def test_unrelated_features_have_no_debiased_redundancy():
    rng = torch.Generator().manual_seed(0)
    xs = [torch.randn(512, 256, generator=rng) for _ in range(2)]
    for x in xs:
        x[3] *= 100  # an attention sink
    grams = torch.stack([packed_gram(x) for x in xs])
    assert alignment(grams, "paper", token_norm=False)[0, 1] > 0.2
    assert abs(float(alignment(grams, "cka-debiased", token_norm=True)[0, 1])) < 0.02


def test_the_calibration_pass_leaves_every_table(case):
    source, evidence, _, metadata, out = case
    stored = read_redundancy(out)
    assert metadata["modules"] == 4 * source.num_layers and metadata["tokens"] > 0
    for level, feature in (("layer", "in"), ("layer", "out"), ("layer", "gate"), ("module", "in"), ("module", "out")):
        for mode in MODES:
            labels, table = stored.table(level, feature, mode, True)
            assert table.shape == (len(labels),) * 2 and np.allclose(np.diagonal(table), 1)
    assert json.loads((out / "redundancy.json").read_text())["tokens"] == dict(evidence.redundancy.tokens)
    assert (out / "plot.png").stat().st_size > 1000 and (out / "modules.png").is_file()
    with pytest.raises(InputError, match=r"no table layer\.nose"):
        stored.table("layer", "nose", "cka", True)


def test_evidence_of_changed_weights_is_fresh(case):
    source, evidence, probe, _, _ = case
    fresh = fresh_evidence(source, ALS(), probe.blocks)
    assert fresh.statistics.keys() == evidence.statistics.keys()
    assert fresh_evidence(source, allocator("uniform"), probe.blocks).redundancy is None
