"""AWQ and SmoothQuant: factors move between tensors without a trace, and the searches never lose to rounding."""

import pytest
import torch
from concat_cases import random_blocks
from pydantic import ValidationError
from slow import by_default
from test_gptq import tokens
from test_quantization import tiny_llama

from compression_dags.checkpoints.gate import check_reload, load_stock, probe_ids
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError, IntegrityError
from compression_dags.passes.input_sums import InputSums
from compression_dags.quantization.awq import AWQ
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.migration import migration
from compression_dags.quantization.rounding_pass import RoundingPass
from compression_dags.quantization.rtn import RTN
from compression_dags.quantization.smoothing import fold_of
from compression_dags.quantization.smoothquant import SmoothQuant
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.registry import METHODS
from compression_dags.solvers.hessian import energy
from models import edit_weights

DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "opt"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("smooth"), torch.float16)


@pytest.mark.parametrize("family", DENSE)
def test_folding_alone_changes_nothing(tiny_model, family, tmp_path):
    """Every input of layer 1 divided by its factors and every reader multiplied: the logits stay."""
    source = Checkpoint(tiny_model(family))
    model, ids = load_stock(source.path), probe_ids(90, 32)
    wanted = model(ids).logits
    generator = torch.Generator().manual_seed(0)
    prefix, folded = source.architecture.layer_prefix(1), 0
    with torch.no_grad():
        for group in source.architecture.groups:
            fold = fold_of(source, 1, group)
            assert fold is not None
            width = model.get_submodule(prefix + group.projections[0]).weight.shape[1]
            columns = fold.exact(fold.even(torch.rand(width, generator=generator) * 4 + 0.25))
            for name, tensor in (fold.divided_norm(columns) if fold.norm else fold.divided_bias(columns)).items():
                model.get_parameter(name).copy_(tensor)
            if fold.rows:
                model.get_submodule(prefix + fold.rows).weight.div_(fold.to_rows(columns)[:, None])
            for name in group.projections:
                model.get_submodule(prefix + name).weight.mul_(columns)
            folded += 1
    assert folded == 4
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["awq", "smoothquant", "smoothquant gptq"])
@pytest.mark.parametrize("family", by_default("llama", "gemma3_text", of=DENSE))
def test_reloads_exactly(tiny_model, family, method, tmp_path):
    source = Checkpoint(tiny_model(family))
    scheme = {"awq": {"scheme": "W8A16", "group_size": 8, "least_error": 0}, "smoothquant": {"scheme": "W8A8"}}
    scheme["smoothquant gptq"] = {"scheme": "W8A8", "rounding": "gptq"}
    name = method.split()[0]
    stage = METHODS["quantize"][name].model_validate({"method": name, **scheme[method]})
    assert isinstance(stage, QuantizeStage)
    made = stage.quantize(source, tmp_path, blocks=random_blocks(padded=True))
    logits = stage.reference_logits(source, rounding=made.rounding)
    assert check_reload(tmp_path, logits)["relative_logit_error"] == 0.0
    assert made.rounding.changed, "nothing was folded"
    with torch.inference_mode():
        plain = load_stock(source.path)(probe_ids(source.config["vocab_size"], 64)).logits
    assert (logits - plain).norm() < 0.15 * plain.norm()


@pytest.mark.parametrize(
    "scheme",
    ["W4A16", "W4A8", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("W3A16", "NVFP4A16"))],
)
def test_awq_never_loses_to_nearest_where_both_see_the_same_inputs(dense, tmp_path, scheme):
    """The first group of the first layer: equal inputs. Its error is over all three matrices together."""
    group = {"group_size": 32} if scheme.startswith("W") else {}
    blocks = tokens()
    errors = {}
    for stage in (AWQ(scheme=scheme, **group), AWQ(scheme=scheme, **group, clip=False)):
        made = stage.quantize(dense, tmp_path / str(stage.clip), blocks=blocks)
        assert (
            check_reload(tmp_path / str(stage.clip), stage.reference_logits(dense, rounding=made.rounding))[
                "relative_logit_error"
            ]
            == 0.0
        )
        errors[stage.clip] = [d.evidence for d in made.decisions if d.action == "quantize"]
    assert errors[True][2]["output_error"] <= errors[False][2]["output_error"] * 1.0001  # v: clipped or as it was
    assert errors[True][0]["alpha"] == errors[False][0]["alpha"] and "mean_clip" not in errors[True][0]
    assert any(e["alpha"] > 0 for e in errors[True])


def test_awq_leaves_alone_what_rounding_hardly_changes(dense, tmp_path):
    """Below `least_error` codes and scales are those of nearest, and nothing is folded; above it there is a search."""
    blocks = tokens()
    nearest = RTN(scheme="W8A16", group_size=32).quantize(dense, tmp_path / "rtn").rounding
    made = AWQ(scheme="W8A16", group_size=32, least_error=0.05).quantize(dense, tmp_path / "awq", blocks=blocks)
    assert not made.rounding.changed
    for name in nearest.choices:
        assert torch.equal(made.rounding.rounded(name).codes.float(), nearest.rounded(name).codes.float())
        assert torch.equal(made.rounding.rounded(name).scales.scale, nearest.rounded(name).scales.scale)
    said = [d.evidence for d in made.decisions if d.action == "quantize"]
    assert all(e["output_error"] <= 0.05 and "less than 0.05" in e["search"] for e in said)
    searched = AWQ(scheme="W8A16", group_size=32, least_error=0).quantize(dense, tmp_path / "all", blocks=blocks)
    assert searched.rounding.changed
    assert not any("search" in d.evidence for d in searched.decisions if d.action == "quantize")


def test_the_search_finds_a_channel_that_matters():
    """One input a hundred times the others: scaled up, or ranges clipped to suit it, its error all but goes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(1, 400, 64, generator=generator)
    x[..., 5] *= 100
    seen = InputSums("hessian", 64, torch.device("cpu"))
    seen.add(x, None)

    class Anywhere:
        even = exact = staticmethod(lambda columns: columns)

    choice, stage = Choice.of("W4A16", 32), AWQ(scheme="W4A16", group_size=32)
    group = stage.round_folded({"up_proj": weight}, seen, choice, "x", Anywhere())  # pyright: ignore[reportArgumentType]
    factors = 1 if group.columns is None else group.columns
    left = group.found["up_proj"][0].dequantize() / factors - weight
    nearest = AWQ(scheme="W4A16", group_size=32, clip=False).round_folded({"up_proj": weight}, seen, choice, "x", None)
    plain = nearest.found["up_proj"][0].dequantize() - weight
    assert seen.hessian is not None
    assert energy(left, seen.hessian.matrix) < 0.3 * energy(plain, seen.hessian.matrix)


def test_migration_is_the_papers():
    seen = InputSums("peak", 3, torch.device("cpu"))
    seen.add(torch.tensor([[[1.0, -16.0, 0.0], [4.0, 2.0, 0.0]]]), None)
    weights = [torch.tensor([[1.0, -4.0, 2.0]]), torch.tensor([[-9.0, 1.0, 1.0]])]
    peak = seen.peak("x")
    assert migration(peak, weights, 0.5).tolist() == pytest.approx([2 / 3, 2.0, 1.0])
    assert migration(peak, weights, 1.0).tolist() == pytest.approx([4.0, 16.0, 1.0])
    seen.add(torch.tensor([[[2.0, 0.0, 0.0], [torch.nan, 9.0, 9.0]]]), torch.tensor([[True, False]]))
    assert seen.peak("x").tolist() == [4, 16, 0] and seen.peak("x", "sequence").tolist() == [3, 8, 0]
    seen.add(torch.tensor([[[9.0, 9.0, 9.0]]]), torch.tensor([[False]]))  # no token: not a sequence
    assert seen.peak("x", "sequence").tolist() == [3, 8, 0]
    seen.add(torch.tensor([[[torch.nan, 0.0, 0.0]]]), None)
    for over in ("all", "sequence"):
        with pytest.raises(IntegrityError, match="x: activations are not finite"):
            seen.peak("x", over)


def test_smoothing_helps_where_inputs_have_outliers(dense, tmp_path):
    """γ of one channel is 60 times the rest: W8A8 rounds all other inputs to almost nothing unless it is moved."""

    def outlier(tensors):
        for layer in range(2):
            tensors[f"model.layers.{layer}.input_layernorm.weight"][7] *= 60
            tensors[f"model.layers.{layer}.post_attention_layernorm.weight"][9] *= 60

    import shutil

    shutil.copytree(dense.path, tmp_path / "odd")
    edit_weights(tmp_path / "odd", outlier)
    source, blocks, ids = Checkpoint(tmp_path / "odd"), tokens(), probe_ids(256, 64)
    with torch.inference_mode():
        wanted = load_stock(source.path)(ids).logits
    lost = {}
    for name, stage in {
        "rtn": RTN(scheme="W8A8"),
        "smooth": SmoothQuant(scheme="W8A8"),
        "smooth-gptq": SmoothQuant(scheme="W8A8", rounding="gptq"),
    }.items():
        made = stage.quantize(source, tmp_path / name, blocks=blocks)
        logits = stage.reference_logits(source, ids, rounding=made.rounding)
        lost[name] = float((logits - wanted).norm() / wanted.norm())
    assert lost["smooth"] < 0.7 * lost["rtn"] and lost["smooth-gptq"] < 0.7 * lost["rtn"], lost


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_inputs_without_a_norm_are_smoothed_too(dense, tmp_path, rounding):
    """One row of up is 600 times the rest, and the column that reads it a 600th: down's input has an outlier."""

    def outlier(tensors):
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"][3] *= 600
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, 3] /= 600

    import shutil

    shutil.copytree(dense.path, tmp_path / "odd")
    edit_weights(tmp_path / "odd", outlier)
    source, ids = Checkpoint(tmp_path / "odd"), probe_ids(256, 64)
    with torch.inference_mode():
        wanted = load_stock(source.path)(ids).logits
    lost = {}
    for where in ("norms", "all"):
        stage = SmoothQuant(scheme="W8A8", where=where, rounding=rounding)
        made = stage.quantize(source, tmp_path / where, blocks=tokens())
        logits = stage.reference_logits(source, ids, rounding=made.rounding)
        lost[where] = float((logits - wanted).norm() / wanted.norm())
    assert lost["all"] < 0.7 * lost["norms"], lost


def test_a_killed_run_goes_on(dense, tmp_path, monkeypatch):
    from compression_dags.provenance.resume import ResumePoint

    stage, blocks = AWQ(scheme="W4A16", group_size=32), tokens()
    whole = stage.quantize(dense, tmp_path / "whole", blocks=blocks).checkpoint
    resume, original = ResumePoint(tmp_path / "state", {"x": 1}, every_seconds=0.0), RoundingPass.change

    def dies(self, index, *args):
        if index == 1:
            raise KeyboardInterrupt
        return original(self, index, *args)

    monkeypatch.setattr(RoundingPass, "change", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.quantize(dense, tmp_path / "killed", blocks=blocks, resume=resume)
    monkeypatch.setattr(RoundingPass, "change", original)
    again = stage.quantize(dense, tmp_path / "again", blocks=blocks, resume=resume).checkpoint
    assert (again.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_refusals(dense, tmp_path):
    with pytest.raises(InputError, match="awq needs calibration tokens"):
        AWQ(scheme="W4A16", group_size=32).quantize(dense, tmp_path)
    with pytest.raises(ValidationError, match="target 'residual' needs rounding: gptq"):
        SmoothQuant(scheme="W8A8", target="residual")
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        SmoothQuant(scheme="W8A8", alpha=2)


def test_ignored_readers_keep_their_input(dense, tmp_path):
    """A projection that is not quantized reads the norm as it was: nothing of that input is folded."""
    stage = AWQ(scheme="W4A16", group_size=32, ignore=("lm_head", "re:.*q_proj", "re:.*up_proj"))
    made = stage.quantize(dense, tmp_path, blocks=tokens())
    assert not any("layernorm" in name for name in made.rounding.changed)
    assert check_reload(tmp_path, stage.reference_logits(dense, rounding=made.rounding))["relative_logit_error"] == 0.0
