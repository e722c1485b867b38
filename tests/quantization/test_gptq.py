"""GPTQ: the sweep against a naive reference, its gain over RTN, the reload gate, sparse sources, resumption."""

import pytest
import torch
from concat_cases import random_blocks
from slow import by_default
from test_quantization import STAGES, tiny_llama
from test_sweep import DEVICE

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError, IntegrityError
from compression_dags.passes.sequential import SequentialPass
from compression_dags.provenance.resume import ResumePoint
from compression_dags.quantization.gptq import GPTQ
from compression_dags.quantization.rtn import RTN
from compression_dags.registry import METHODS
from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.grids import Grid
from compression_dags.solvers.round_sweep import round_sweep
from compression_dags.solvers.rounding import find_scales, round_to_nearest, snap


def problem(rows=20, d=256, tokens=600, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    x = torch.randn(tokens, d, generator=g, dtype=torch.float64) @ mix
    return torch.randn(rows, d, generator=g, dtype=torch.float64), x.T @ x, x


def reference(weight, hessian, grid, damping=0.01):
    """Column by column on the whole inverse: no blocks, no factor but the textbook's."""
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, size = weight.clone(), grid.group_size or weight.shape[1]
    codes, block = torch.empty_like(w, dtype=torch.float32), 128
    start_of_block = w.clone()
    for j in range(w.shape[1]):
        if j % block == 0:
            start_of_block = w.clone()  # GPTQ finds the scales of a block's groups before it enters the block
        if j % size == 0:
            source = weight if grid.group_size is None else start_of_block
            scales = find_scales(source[:, j : j + size], grid, stored=torch.float32)
            step, zero = scales.step()[:, 0], 0 if scales.zero_point is None else scales.zero_point[:, 0].float()
        codes[:, j] = snap((w[:, j].float() / step + zero).clamp(*grid.range), grid.kind)
        error = (w[:, j] - (codes[:, j] - zero) * step) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:][None]
    return codes


@pytest.mark.parametrize(
    "grid",
    [Grid("int", 4, 64), Grid("int", 4, 128, symmetric=False), Grid("int", 8, None), Grid("fp8", 8, None)],
    ids=["w4g64", "w4g128-asymmetric", "w8", "fp8"],
)
def test_the_sweep_is_gptq(grid):
    weight, hessian, _ = problem()
    found = round_sweep(weight, inverse_factor(hessian), grid, [(0, 20)], stored=torch.float32)
    assert (found.parts[0].codes == reference(weight, hessian, grid)).float().mean() > 0.999


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    "grid", [Grid("int", 4, 64), Grid("int", 4, 32, symmetric=False), Grid("int", 4, 96), Grid("fp4", 4, 16)], ids=str
)
def test_it_beats_rounding_to_nearest_on_the_outputs(grid, order):
    weight, hessian, x = problem(d=192)
    chosen = hessian.diagonal().argsort(descending=True) if order else None
    ordered = hessian if chosen is None else hessian[chosen][:, chosen]
    found = round_sweep(weight, inverse_factor(ordered), grid, [(0, 20)], stored=torch.float32, order=chosen)
    nearest = round_to_nearest(weight.float(), grid)

    def error(rounded):
        return float(((rounded.dequantize().double() - weight) @ x.T).norm() / (weight @ x.T).norm())

    assert error(found.parts[0]) < 0.8 * error(nearest)
    whole = float((weight @ x.T).norm())
    assert float(found.error.sum()) == pytest.approx((error(found.parts[0]) * whole) ** 2, rel=0.2)


@pytest.mark.gpu(interpreted=True)
@pytest.mark.parametrize(
    "grid",
    by_default(
        Grid("int", 4, 24, symmetric=False),
        of=[Grid("int", 4, 32), Grid("int", 4, 24, symmetric=False), Grid("int", 8, None)],
    ),
    ids=str,
)
def test_the_kernel_is_the_portable_form(grid):
    # two tiles of rows, parts that end within one; in the interpreter every element costs
    rows, groups = (37, 3) if DEVICE == "cuda" else (19, 2)
    weight, hessian, _ = problem(rows=rows, d=groups * (24 if grid.group_size == 24 else 32))
    weight, factor = weight.float().to(DEVICE), inverse_factor(hessian.float().to(DEVICE))
    kept = weight.abs() > 0.3
    for order in (None, hessian.diagonal().argsort().to(DEVICE)):
        options = {"stored": torch.float32, "order": order, "kept": kept}
        a, b = (
            round_sweep(weight, factor, grid, [(0, rows // 2), (rows // 2, rows)], backend=name, **options)
            for name in ("torch", "triton")
        )
        same = torch.cat([x.codes == y.codes for x, y in zip(a.parts, b.parts, strict=True)])
        assert same.float().mean() > 0.999 and torch.allclose(a.error, b.error, rtol=1e-2)


def test_a_stack_is_rounded_part_by_part():
    weight, hessian, _ = problem(rows=30)
    factor = inverse_factor(hessian)
    for grid in (Grid("int", 4, 64), Grid("fp4", 4, 16)):
        stacked = round_sweep(weight, factor, grid, [(0, 12), (12, 30)], stored=torch.float32)
        for part, (a, b) in zip(stacked.parts, [(0, 12), (12, 30)], strict=True):
            alone = round_sweep(weight[a:b], factor, grid, [(0, b - a)], stored=torch.float32).parts[0]
            assert torch.equal(part.codes, alone.codes) and torch.equal(part.scales.scale, alone.scales.scale)


def test_zeros_stay_and_dead_inputs_do_no_harm():
    weight, hessian, _ = problem()
    weight[:, ::3] = 0
    hessian[:, 5], hessian[5] = 0, 0
    grid = Grid("int", 4, 64, symmetric=False)
    kept = weight != 0
    found = round_sweep(weight, inverse_factor(hessian), grid, [(0, 20)], stored=torch.float32, kept=kept)
    dense = found.parts[0].dequantize()
    assert bool((dense[~kept] == 0).all()) and bool(torch.isfinite(dense).all())
    with pytest.raises(InputError, match="group size 96 does not divide 256"):
        round_sweep(weight, inverse_factor(hessian), Grid("int", 4, 96), [(0, 20)], stored=torch.float32)
    with pytest.raises(InputError, match="do not cover"):
        round_sweep(weight, inverse_factor(hessian), grid, [(0, 19)], stored=torch.float32)


def tokens():
    blocks = random_blocks(rows=8, length=48)
    return TokenBlocks(blocks.ids % 250 + 3, blocks.lengths, blocks.documents)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("gptq"), torch.float16)


@pytest.mark.parametrize("asked", STAGES.values(), ids=STAGES)
def test_every_scheme_reloads_exactly(asked, dense, tmp_path):
    options = asked.model_dump(exclude={"method"}, exclude_none=True)
    stage = GPTQ.model_validate(options)
    made = stage.quantize(dense, tmp_path, blocks=tokens())
    reference_logits = stage.reference_logits(dense, rounding=made.rounding)
    assert check_reload(tmp_path, reference_logits)["relative_logit_error"] == 0.0
    rows = [d for d in made.decisions if d.action == "quantize"]
    assert len(rows) == 14 and all(d.evidence["tokens"] > 0 and d.evidence["output_error"] < 0.5 for d in rows)
    worse = RTN.model_validate(options).quantize(dense, tmp_path / "rtn")
    assert sum(d.value for d in rows) > sum(d.value for d in worse.decisions if d.action == "quantize")


@pytest.mark.parametrize("family", by_default("gemma3_text", "opt", of=["qwen2", "qwen3", "gemma3_text", "opt"]))
@pytest.mark.parametrize("target", by_default("residual", of=["own", "residual"]))
def test_other_families(tiny_model, tmp_path, family, target):
    source = Checkpoint(tiny_model(family))
    stage = GPTQ.model_validate({"scheme": "W8A16", "group_size": 8, "target": target, "act_order": target == "own"})
    made = stage.quantize(source, tmp_path / "out", blocks=random_blocks(padded=True))
    logits = stage.reference_logits(source, rounding=made.rounding)
    assert check_reload(tmp_path / "out", logits)["gate"] == "passed"


def test_a_sparse_model_stays_sparse(dense, tmp_path):
    blocks = tokens()
    from test_sparsify import planned, stage

    pruner = stage("wanda", sparsity=0.5)
    sparse = pruner.sparsify(dense, planned(pruner, dense), blocks, tmp_path / "sparse").checkpoint
    made = GPTQ(scheme="W4A16", group_size=32).quantize(sparse, tmp_path / "out", blocks=blocks)
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        zero = sparse.tensor(f"{name}.weight") == 0
        assert zero.float().mean() >= 0.49 and bool((made.rounding.rounded(name).dequantize()[zero] == 0).all())


def test_refusals_and_resumption(dense, tmp_path, monkeypatch):
    stage, blocks = (
        METHODS["quantize"]["gptq"].model_validate({"method": "gptq", "scheme": "W4A16", "group_size": 32}),
        (tokens()),
    )
    with pytest.raises(InputError, match="gptq needs calibration tokens"):
        stage.quantize(dense, tmp_path / "none")
    whole = stage.quantize(dense, tmp_path / "whole", blocks=blocks)
    original = SequentialPass._layer

    def dies(self, index, layer):
        if index == 1:
            raise KeyboardInterrupt
        original(self, index, layer)

    resume = ResumePoint(tmp_path / "state", {"x": 1}, every_seconds=0.0)
    monkeypatch.setattr(SequentialPass, "_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.quantize(dense, tmp_path / "a", blocks=blocks, resume=resume)
    calls = []
    monkeypatch.setattr(SequentialPass, "_layer", lambda s, i, layer: (calls.append(i), original(s, i, layer)))
    again = stage.quantize(dense, tmp_path / "b", blocks=blocks, resume=resume)
    assert calls == [1]
    for file in whole.checkpoint.files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert [d.evidence for d in again.decisions] == [d.evidence for d in whole.decisions]
    broken = torch.full((4, 4), float("nan"))
    with pytest.raises(IntegrityError):
        inverse_factor(broken)
