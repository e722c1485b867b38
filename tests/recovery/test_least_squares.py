"""Closed-form recovery: it equals a plain solve, never worsens the held-out error, and what it writes is stock."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from compression_dags.calibration.corpora import Calibration, TokenBlocks, make_blocks, read_documents
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.plan import MergePlan, PlannedLayer, keep_only
from compression_dags.errors import InputError
from compression_dags.provenance.resume import ResumePoint
from compression_dags.recovery.least_squares import LeastSquares


@pytest.fixture(scope="module")
def story_blocks(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    return make_blocks(read_documents("c4-sample"), tokenizer, Calibration(sequences=40, length=128), 512)


@pytest.fixture(scope="module")
def cut(stories, tmp_path_factory):
    source = Checkpoint(stories)
    plan = keep_only("test", 5, [0, 1, 3, 4])
    return source, plan, apply_plan(source, plan, tmp_path_factory.mktemp("cut") / "merged")


def test_recovers_a_real_model(cut, story_blocks, tmp_path):
    source, plan, merged = cut
    found = LeastSquares().recover(source, merged, plan, story_blocks, tmp_path / "out")
    (row,) = found.decisions
    assert row.action == "recover" and row.target == "model.layers.1.mlp.down_proj"
    assert row.evidence["held_out_after"] < row.evidence["held_out_before"]
    changed = [n for n in merged.tensors if not torch.equal(merged.tensor(n), found.checkpoint.tensor(n))]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    same = keep_only("none", 4, list(range(4)))
    check_reload(found.checkpoint.path, reference_logits(merged, same, replaced=found.fitted))
    # and the model as a whole comes nearer to its teacher on tokens it was not fitted on
    ids = torch.from_numpy(story_blocks.ids[-5:]).long()
    with torch.inference_mode():
        teacher, plain, recovered = (load_stock(c.path)(ids).logits for c in (source, merged, found.checkpoint))
    assert (recovered - teacher).norm() < (plain - teacher).norm()


@pytest.mark.parametrize("form", ["fold", "refit"])
def test_equals_a_plain_weighted_ridge(cut, story_blocks, tmp_path, form):
    """The written matrix against numpy's least squares on explicitly stacked rows."""
    source, plan, merged = cut
    alpha, skip, held = 1e-2, 4, 5
    options = LeastSquares(form=form, alphas=(alpha,), holdout=held / 40, sink_positions=skip, sink_weight=0)
    found = options.recover(source, merged, plan, story_blocks, tmp_path / form)
    model, student = load_stock(source.path), load_stock(merged.path)
    store = {}
    student.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, a: store.update(z=a[0]))
    student.model.layers[1].register_forward_hook(lambda _, a, out: store.update(s=out))
    model.model.layers[2].register_forward_hook(lambda _, a, out: store.update(h=out))
    ids = torch.from_numpy(story_blocks.ids[:-held]).long()
    with torch.inference_mode():
        for each in (model, student):
            each(ids)
    z, s, h = (store[k][:, skip:].flatten(0, 1).double().numpy() for k in "zsh")
    old = merged.tensor("model.layers.1.mlp.down_proj.weight").double().numpy().T
    root = 1 / np.linalg.norm(h, axis=1, keepdims=True)
    x, e = (z @ old if form == "fold" else z) * root, (h - s) * root
    ridge = alpha * np.mean(np.sum(x**2, axis=0))
    stacked = np.vstack([x, np.sqrt(ridge) * np.eye(x.shape[1])])
    solution = np.linalg.lstsq(stacked, np.vstack([e, np.zeros((x.shape[1], e.shape[1]))]), rcond=None)[0]
    expected = old + (old @ solution if form == "fold" else solution)
    written = found.checkpoint.tensor("model.layers.1.mlp.down_proj.weight").double().numpy().T
    assert np.linalg.norm(written - expected) / np.linalg.norm(expected) < 1e-4


def test_rejects_what_does_not_help(cut, story_blocks, tmp_path):
    """Held-out rows of another distribution than the fitted ones: the fit does not carry over and is refused."""
    source, plan, merged = cut
    ids = story_blocks.ids.copy()
    ids[:-20] = 5  # one token over and over
    options = LeastSquares(holdout=0.5, alphas=(1e-9,), form="refit")
    found = options.recover(source, merged, plan, TokenBlocks(ids, story_blocks.lengths, 40), tmp_path / "out")
    (row,) = found.decisions
    assert row.action == "reject" and not found.fitted
    assert all(torch.equal(merged.tensor(n), found.checkpoint.tensor(n)) for n in merged.tensors)


def test_merged_groups_and_biases(tiny_model, tmp_path):
    """OPT's fc2 has a bias, which is refitted with the weight; a merged group counts as a gap."""
    source = Checkpoint(tiny_model("opt"))
    plan = MergePlan("test", 4, (PlannedLayer((0,)), PlannedLayer((1, 2), (0.5, 0.5)), PlannedLayer((3,))))
    merged = apply_plan(source, plan, tmp_path / "merged")
    ids = np.random.default_rng(0).integers(3, 512, (60, 64)).astype(np.int32)
    blocks = TokenBlocks(ids, np.full(60, 64, dtype=np.int32), 60)
    found = LeastSquares(accept="error").recover(source, merged, plan, blocks, tmp_path / "out")
    (row,) = found.decisions
    assert row.action == "recover" and row.sources == [1, 2]
    assert set(found.fitted) == {"model.decoder.layers.1.fc2.weight", "model.decoder.layers.1.fc2.bias"}
    same = keep_only("none", 3, list(range(3)))
    check_reload(found.checkpoint.path, reference_logits(merged, same, replaced=found.fitted))


def test_sweep_also_refits_later_layers(cut, story_blocks, tmp_path):
    source, plan, merged = cut
    found = LeastSquares(scope="sweep", accept="error").recover(source, merged, plan, story_blocks, tmp_path / "out")
    assert [d.target.split(".")[2] for d in found.decisions] == ["1", "2", "3"]


def test_resumes_with_the_same_result(cut, story_blocks, tmp_path, monkeypatch):
    source, plan, merged = cut
    options = LeastSquares(scope="sweep")
    whole = options.recover(source, merged, plan, story_blocks, tmp_path / "whole")
    from compression_dags.recovery import least_squares_run

    fit, calls = least_squares_run._Run._fit, []

    def dies(self, position, *args):
        calls.append(position)
        if position == 3 and len(calls) == 3:
            raise KeyboardInterrupt
        return fit(self, position, *args)

    monkeypatch.setattr(least_squares_run._Run, "_fit", dies)
    with pytest.raises(KeyboardInterrupt):
        resume = ResumePoint(tmp_path / "scratch", {}, every_seconds=0)
        options.recover(source, merged, plan, story_blocks, tmp_path / "out", resume=resume)
    calls[:] = [0] * 5
    resume = ResumePoint(tmp_path / "scratch", {})
    resumed = options.recover(source, merged, plan, story_blocks, tmp_path / "out", resume=resume)
    assert calls[5:] == [3]
    assert resumed.fitted.keys() == whole.fitted.keys()
    assert all(torch.equal(resumed.fitted[k], whole.fitted[k]) for k in whole.fitted)
    assert resumed.decisions == whole.decisions


def test_refusals_before_compute(cut, tiny_model):
    source, _, _ = cut
    with pytest.raises(InputError, match="fitting tokens and needs"):
        LeastSquares().check_tokens(source.shape, 4, 32)
    with pytest.raises(InputError, match="gemma3_text"):
        LeastSquares().check(Checkpoint(tiny_model("gemma3_text")).shape)
    with pytest.raises(InputError, match="qwen3_moe"):
        LeastSquares().check(Checkpoint(tiny_model("qwen3_moe")).shape)
