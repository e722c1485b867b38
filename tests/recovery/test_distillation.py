"""Distillation: losses fall, only what should train trains, nothing worse is accepted, a killed run resumes."""

import lzma

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from compression_dags.calibration import corpora
from compression_dags.calibration.corpora import Calibration, TokenBlocks, read_documents
from compression_dags.calibration.training_windows import MAX_EPOCHS, training_windows
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.plan import MergePlan, PlannedLayer, keep_only
from compression_dags.errors import InputError
from compression_dags.provenance.resume import ResumePoint
from compression_dags.recovery.distillation.model import WholeModel, hidden_loss, logit_divergence, next_token_loss
from compression_dags.recovery.distillation.options import DistillMP, DistillSP

SMALL = {"tokens": 6144, "length": 64, "batch_tokens": 256, "held_windows": 4, "checks": 3}
NO_BLOCKS = TokenBlocks(np.zeros((1, 8), np.int32), np.full(1, 8, np.int32), 1)


@pytest.fixture(scope="module")
def cut(stories, tmp_path_factory):
    source = Checkpoint(stories)
    plan = MergePlan("t", 5, (PlannedLayer((0, 1), (0.5, 0.5)), PlannedLayer((2, 3), (0.5, 0.5)), PlannedLayer((4,))))
    return source, plan, apply_plan(source, plan, tmp_path_factory.mktemp("cut") / "merged")


def distilled(kind, cut, folder, resume=None, progress=None, **options):
    source, plan, merged = cut
    more = {"progress": progress} if progress else {}
    return kind(**{**SMALL, **options}).recover(source, merged, plan, NO_BLOCKS, folder, resume=resume, **more)


def changed(a, b):
    return {n for n in a.tensors if not torch.equal(a.tensor(n), b.tensor(n))}


def gate(found, merged):
    same = keep_only("none", merged.num_layers, list(range(merged.num_layers)))
    check_reload(found.checkpoint.path, reference_logits(merged, same, replaced=found.fitted))


@pytest.mark.parametrize("kind", [DistillSP, DistillMP])
def test_hidden_part_trains_merged_layers_alone_and_helps(cut, tmp_path, kind):
    found = distilled(kind, cut, tmp_path / "out", logit_share=0.0, hidden_lr=2e-3)
    names = changed(cut[2], found.checkpoint)
    assert names and {n.split(".")[2] for n in names} <= {"0", "1"}
    rows = found.decisions
    assert [r.target for r in rows] == ["model.layers.0", "model.layers.1"] and [r.sources for r in rows] == [
        [0, 1],
        [2, 3],
    ]
    assert all(r.action == ("recover" if r.value < 1 else "reject") for r in rows) and rows[0].action == "recover"
    before, after = rows[0].evidence["held_out_loss_before"], rows[-1].evidence["held_out_loss_after"]
    assert after < before - 0.03
    # optimizer state of the merged layers alone: two moments of four bytes a parameter
    one = sum(i.numel for n, i in cut[2].tensors.items() if n.startswith("model.layers.0."))
    assert found.metadata["trained_parameters"] == (one if kind is DistillSP else 2 * one)
    assert found.metadata["optimizer_state_bytes"] == 8 * found.metadata["trained_parameters"]
    gate(found, cut[2])


def test_recorded_loss_is_the_written_checkpoint_s(cut, tmp_path):
    found = distilled(DistillSP, cut, tmp_path / "out", hidden_lr=2e-3, logit_lr=2e-3)
    assert [r.target for r in found.decisions] == ["model.layers.0", "model.layers.1", "logits"]
    tokenizer = AutoTokenizer.from_pretrained(cut[0].path)
    windows = training_windows(["c4-sample"], tokenizer, length=64, tokens=6144, held_windows=4, seed=0)
    model = WholeModel(found.checkpoint, "cpu", "float32")
    total, count = next_token_loss(model, torch.from_numpy(windows.held).long())
    accepted = [r for r in found.decisions if r.action == "recover"]
    assert accepted and total / count == pytest.approx(accepted[-1].evidence["held_out_loss_after"], rel=1e-6)


def test_logit_part_scope(cut, tmp_path):
    every = distilled(DistillMP, cut, tmp_path / "a", logit_share=1.0, logit_lr=2e-3)
    merged = distilled(DistillMP, cut, tmp_path / "b", logit_share=1.0, logit_lr=2e-3, logit_train="merged")
    assert {n.split(".")[2] for n in changed(cut[2], every.checkpoint)} == {"0", "1", "2"}
    assert {n.split(".")[2] for n in changed(cut[2], merged.checkpoint)} == {"0", "1"}
    assert all(r.action == "recover" for f in (every, merged) for r in f.decisions)
    gate(every, cut[2])


def test_what_does_not_help_is_rejected_and_nothing_changes(cut, tmp_path):
    found = distilled(DistillMP, cut, tmp_path / "out", hidden_lr=1e3, logit_lr=1e3, patience=1)
    assert [r.action for r in found.decisions] == ["reject"] * 3
    assert not changed(cut[2], found.checkpoint) and not found.fitted


def test_schedules_differ_and_runs_repeat(cut, tmp_path):
    options = {"logit_share": 0.0, "hidden_lr": 2e-3}
    sp = distilled(DistillSP, cut, tmp_path / "sp", **options)
    mp = distilled(DistillMP, cut, tmp_path / "mp", **options)
    again = distilled(DistillMP, cut, tmp_path / "again", **options)
    assert changed(sp.checkpoint, mp.checkpoint)
    assert (tmp_path / "mp/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert mp.decisions == again.decisions


@pytest.mark.slow
def test_groups_in_two_processes_give_the_same_bytes(cut, tmp_path):
    options = {"logit_share": 0.0, "hidden_lr": 2e-3, "tokens": 2048}
    distilled(DistillMP, cut, tmp_path / "one", **options)
    distilled(DistillMP, cut, tmp_path / "two", workers=2, **options)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(cut, tmp_path_factory):
    return distilled(DistillSP, cut, tmp_path_factory.mktemp("whole") / "out", logit_lr=2e-3)


@pytest.mark.parametrize("part", [1, 2])
def test_a_killed_run_resumes_to_the_same_bytes(cut, whole, tmp_path, part):
    class Killed(Exception):
        pass

    started = []

    def progress(items, description, total=None):
        started.append(description)
        for done, item in enumerate(items):
            if len(started) == part + 1 and done == len(items) - 1:
                raise Killed
            yield item

    resume = ResumePoint(tmp_path / "p", {"x": 1})
    with pytest.raises(Killed):
        distilled(DistillSP, cut, tmp_path / "a", resume=resume, progress=progress, logit_lr=2e-3)
    resumed = distilled(DistillSP, cut, tmp_path / "b", resume=resume, logit_lr=2e-3)
    weights = resumed.checkpoint.path / "model.safetensors"
    assert weights.read_bytes() == (whole.checkpoint.path / "model.safetensors").read_bytes()
    assert resumed.decisions == whole.decisions


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "opt"])
def test_other_families(tiny_model, tmp_path, family):
    source = Checkpoint(tiny_model(family))
    plan = keep_only("t", 4, [0, 1, 3])
    merged = apply_plan(source, plan, tmp_path / "cut")
    found = distilled(
        DistillSP, (source, plan, merged), tmp_path / "out", tokens=2048, logit_train="merged", hidden_loss="kl"
    )
    assert [r.target for r in found.decisions] == [source.architecture.layer_prefix(1).rstrip("."), "logits"]
    assert {n.split(".layers.")[1].split(".")[0] for n in changed(merged, found.checkpoint)} <= {"1"}
    gate(found, merged)


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_divergence_in_pieces_equals_the_whole(stories, monkeypatch):
    model = WholeModel(Checkpoint(stories), "cpu", "float32")
    ids = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    goal = model.final(ids)
    ours = (goal + 0.1 * torch.randn(goal.shape, generator=torch.Generator().manual_seed(1))).requires_grad_(True)
    p, q = (model.logits(h).log_softmax(-1) for h in (goal, ours))
    whole = (p.exp() * (p - q)).sum(-1).mean()
    (expected,) = torch.autograd.grad(whole, ours)
    monkeypatch.setattr("compression_dags.recovery.distillation.model.LOGIT_TOKENS", 7)
    pieces = logit_divergence(model, ours, model, goal, 1.0)
    (gradient,) = torch.autograd.grad(pieces, ours)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_whole_model_layer_by_layer_is_the_model(tiny_model, family):
    model = WholeModel(Checkpoint(tiny_model(family)), "cpu", "float32")
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.model(input_ids=ids).logits
    assert torch.equal(model.logits(model.final(ids)), expected)
    assert torch.equal(model.logits(model.final(ids, grad_from=2)), expected)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_hidden_loss_is_zero_at_the_goal_and_scale_free(loss):
    options = DistillSP(hidden_loss=loss)
    goal = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    off = goal + 0.1 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    assert hidden_loss(goal, goal, options) == pytest.approx(0, abs=1e-6)
    once, scaled = hidden_loss(off, goal, options), hidden_loss(100 * off, 100 * goal, options)
    assert 0 < float(once) == pytest.approx(float(scaled), rel=1e-4)


# -- data --------------------------------------------------------------------------------------------------------------


def test_training_windows_share_cycle_and_hold_out(stories, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    small = tmp_path / "small.txt"
    small.write_text("\n\n".join(read_documents("c4-sample")[:6]), encoding="utf-8")
    found = training_windows(["c4-sample", str(small)], tokenizer, length=64, tokens=64 * 400, held_windows=10, seed=3)
    assert found.held.shape == (10, 64) and found.tokens == 400 * 64
    held = {row.tobytes() for row in found.held}
    assert not held & {found.ids[i].tobytes() for i in found.order}
    seen = np.bincount(found.order, minlength=len(found.ids))
    assert seen.max() <= MAX_EPOCHS and sum(found.corpora.values()) == 400
    few = found.corpora[str(small)]
    assert few == 200 or (few % MAX_EPOCHS == 0 and seen.max() == MAX_EPOCHS)
    again = training_windows(["c4-sample", str(small)], tokenizer, length=64, tokens=64 * 400, held_windows=10, seed=3)
    assert np.array_equal(found.order, again.order) and np.array_equal(found.ids, again.ids)


def test_corpora_that_are_not_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PROJECT", tmp_path)
    monkeypatch.delenv("COMPRESSION_DAGS_DATA", raising=False)
    with pytest.raises(InputError, match=r"novels.*not shipped.*COMPRESSION_DAGS_DATA"):
        DistillSP(corpora=("novels",)).check(Checkpoint("models/stories260k").shape)
    (tmp_path / "there/novels").mkdir(parents=True)
    with lzma.open(tmp_path / "there/novels/novels.jsonl.xz", "wt", encoding="utf-8") as f:
        f.write('{"title": "a", "text": "once upon a time"}\n')
    monkeypatch.setenv("COMPRESSION_DAGS_DATA", str(tmp_path / "there"))
    assert read_documents("novels") == ["once upon a time"]


def test_refusals(cut, tmp_path, tiny_model):
    source = cut[0]
    with pytest.raises(ValueError, match="less than one step"):
        DistillSP(tokens=10, batch_tokens=1024)
    with pytest.raises(InputError, match="does not train experts"):
        DistillMP().check(Checkpoint(tiny_model("mixtral")).shape)
    with pytest.raises(InputError, match="less than one window"):
        DistillSP(tokens=64, batch_tokens=64, length=128).check(source.shape)
    with pytest.raises(InputError, match="unknown"):
        DistillSP(corpora=("nowhere.txt",)).check(source.shape)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match=r"has 9 bytes and cannot give .* lower `held_windows`"):
        distilled(DistillSP, cut, tmp_path / "out", corpora=(str(short),))
    short.write_text("word " * 60)  # bytes enough, tokens not
    with pytest.raises(InputError, match=r"gives [0-4] windows of 64 tokens.*held out"):
        distilled(DistillSP, cut, tmp_path / "out", corpora=(str(short),))
    with pytest.raises(InputError, match="too few tokens"):
        distilled(DistillSP, cut, tmp_path / "out", tokens=256, logit_share=0.5)
    assert Calibration().corpus == "c4-sample"


def test_nothing_merged_is_nothing_to_do(stories, tmp_path):
    source = Checkpoint(stories)
    plan = keep_only("t", 5, list(range(5)))
    found = distilled(DistillSP, (source, plan, source), tmp_path / "out")
    assert not found.decisions and not changed(source, found.checkpoint)
