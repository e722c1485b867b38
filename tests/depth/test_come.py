"""CoMe: what a walk measures, what the methods choose and write down, what they refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from concat_cases import checkpoint, every, evidence_of, members_of, one_thread, random_blocks  # noqa: F401 (a fixture)
from slow import by_default

from compression_dags.calibration import streaming
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, layer_tensors, reference_logits
from compression_dags.depth.concat import search
from compression_dags.depth.concat.come import Come, ComeP
from compression_dags.depth.concat.come_released import ComeReleased
from compression_dags.depth.concat.concat import Concat
from compression_dags.depth.concat.layers import concatenated, plan_of, whole
from compression_dags.depth.concat.sensitivity import (
    Sensitivity,
    layer_sensitivity,
)
from compression_dags.depth.concat.student_pass import AllTokens, AsReleased, StudentPass
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import InputError, IntegrityError
from compression_dags.passes.variant_scoring import Edit, Piece, VariantScorer, as_is
from compression_dags.provenance.resume import ResumePoint
from compression_dags.recovery.least_squares import LeastSquares


def measured(found):
    rows = [[m.influence, -1.0 if m.distance is None else m.distance] for _, m in sorted(found.items())]
    units = torch.cat([torch.cat([m.sensitivity.channels, m.sensitivity.heads]) for _, m in sorted(found.items())])
    return np.array(rows), units.numpy()


@pytest.mark.parametrize("rule", [AllTokens, AsReleased])
@pytest.mark.parametrize("family", by_default("gemma3_text", of=["llama", "opt", "gemma3_text"]))
def test_the_walk_depends_on_neither_batch_size_nor_padding(tiny_model, family, rule):
    source = checkpoint(tiny_model, family)
    blocks = random_blocks(padded=True)
    ids = np.pad(blocks.ids, ((0, 0), (0, 9)), constant_values=7)  # more padding, other ids
    other = TokenBlocks(ids, blocks.lengths, blocks.documents)
    results = [
        measured(StudentPass(ProbeContext(source, b), score, rule(), size).measure(as_is(6), 0, []))
        for score in ("l1", "l2")
        for b, size in ((blocks, 1), (blocks, 4), (other, 5))
    ]
    for first, *rest in (results[:3], results[3:]):
        for found in rest:
            np.testing.assert_allclose(found[0], first[0], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(found[1], first[1], rtol=1e-5)


def test_the_walk_agrees_with_the_calibration_pass(tiny_model):
    source, blocks = checkpoint(tiny_model, "qwen3"), random_blocks(padded=True)
    evidence = evidence_of(source, blocks)
    found = StudentPass(ProbeContext(source, blocks), "l2", AllTokens(), 2).measure(as_is(6), 0, [])
    np.testing.assert_allclose([found[i].influence for i in range(6)], evidence.block_influence, atol=1e-7)
    distances = [found[i + 1].distance for i in range(5)]
    np.testing.assert_allclose(distances, [evidence.angular[i, i + 2] for i in range(5)], rtol=1e-5)
    for i in range(6):
        ours, theirs = found[i].sensitivity, layer_sensitivity(source, evidence.statistics, i, "l2")
        torch.testing.assert_close(ours.channels, theirs.channels, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.heads, theirs.heads, rtol=1e-5, atol=0)


@pytest.mark.parametrize("room", [1, 2, 99])
def test_a_pass_from_a_cached_state_is_a_whole_pass(tiny_model, monkeypatch, room):
    source, blocks = checkpoint(tiny_model, "llama"), random_blocks()
    monkeypatch.setattr(StudentPass, "_room", lambda self: room)
    walk = StudentPass(ProbeContext(source, blocks), "l1", AllTokens(), 2)
    walk.measure(as_is(6), 0, [2, 1, 4, 3])
    assert set(walk.cached) == {1: {1}, 2: {1, 2}, 99: {1, 2, 3, 4}}[room]
    pieces = [*as_is(6)[:3], Piece(5)]
    walk.changed(3, pieces)
    assert walk.stream._loaded == {0, 1, 2, 5} and set(walk.cached) <= {1, 2, 3}
    forwards = walk.layer_forwards
    found = walk.measure(pieces, 2, [2])
    fresh = StudentPass(ProbeContext(source, blocks), "l1", AllTokens(), 2).measure(pieces, 0, [])
    begin = 1 if room == 1 else 2
    assert sorted(found) == list(range(begin, 4)) and walk.layer_forwards - forwards == 4 - begin
    for position, values in found.items():
        assert values.influence == fresh[position].influence
        assert torch.equal(values.sensitivity.channels, fresh[position].sensitivity.channels)
        assert values.distance == (fresh[position].distance if position > begin else None)


def test_non_finite_states_stop_the_walk(tiny_model):
    source = checkpoint(tiny_model, "llama")
    broken = [*as_is(2), Piece(2, {"mlp.down_proj.weight": torch.full((64, 96), float("inf"))}), *as_is(6)[3:]]
    for rule in (AllTokens(), AsReleased()):
        with pytest.raises(IntegrityError, match="finite"):
            StudentPass(ProbeContext(source, random_blocks()), "l1", rule, 2).measure(broken, 0, [])


# -- the methods -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tiny_model):
    source = checkpoint(tiny_model, "llama", layers=8, num_key_value_heads=4)
    blocks = random_blocks()
    return source, evidence_of(source, blocks), ProbeContext(source, blocks)


METHODS = {
    "come": Come(layers=3),
    "come, free, l2": Come(layers=3, shares="free", score="l2"),
    "come one-shot": Come(layers=3, mode="one-shot"),
    "come greedy": Come(layers=3, mode="one-shot", windows="greedy", shares="equal"),
    "come-p loss": ComeP(layers=2, granularity=4, rows=3),
    "come-p window": ComeP(layers=2, granularity=4, rows=3, by="window"),
    "concat": Concat(layers=3),
    "concat bi": Concat(layers=3, shares="bi"),
    "come-released": ComeReleased(layers=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_stock_model_and_says_why(llama, tmp_path, name):
    source, evidence, probe = llama
    method = METHODS[name]
    plan, rows = method.plan(source.shape, evidence, probe)
    assert len(plan.layers) == 8 - method.layers
    written = apply_plan(source, plan, tmp_path / "out")
    check_reload(written.path, reference_logits(source, plan))
    assert [r.target for r in rows] == [f"layer {i}" for i in range(8)]
    home = {s: x for x in plan.layers for s in x.sources}
    for index, row in enumerate(rows):
        json.dumps(row.evidence)
        action = "drop" if index not in home else "keep" if home[index].kept else "concat"
        assert row.action == action and row.sources == (list(home[index].sources) if index in home else [])
        if action == "concat":
            position = plan.layers.index(home[index])
            kept = plan.of_layer(position)
            assert row.evidence["channels"][str(index)] == len(kept[f"channels.{index}"])
            assert row.evidence["kv_groups"][str(index)] == len(kept[f"heads.{index}"])
            assert sum(row.evidence["channels"].values()) == 96 and sum(row.evidence["kv_groups"].values()) == 4
            assert len(row.evidence["kept_sha256"]) == 64 and row.value == row.evidence["merges"][-1]["distance"]
    again, _ = method.plan(source.shape, evidence, probe)
    assert again.layers == plan.layers and all(torch.equal(again.tensors[k], t) for k, t in plan.tensors.items())
    if not isinstance(method, ComeReleased):
        assert {rows[0].action, rows[7].action} == {"keep"}  # the ends are protected


@pytest.mark.parametrize("name", ["come one-shot", "come greedy", "concat", "concat bi"])
def test_one_shot_runs_no_layer(llama, monkeypatch, name):
    source, evidence, probe = llama
    monkeypatch.setattr(DecoderStream, "__init__", lambda *a, **k: pytest.fail("the model was run"))
    _, rows = METHODS[name].plan(source.shape, evidence, probe)
    assert {r.evidence["layer_forwards"] for r in rows} == {0}


@pytest.mark.parametrize("name", ["come", "come-p loss", "come-p window", "come-released"])
def test_layer_forwards_are_as_stated(llama, monkeypatch, name):
    source, evidence, probe = llama
    calls = []
    apply = DecoderStream.apply

    def counting(self, module, index, batch, hidden=None):
        calls.append(len(batch.rows))
        return apply(self, module, index, batch, hidden)

    monkeypatch.setattr(DecoderStream, "apply", counting)
    _, rows = METHODS[name].plan(source.shape, evidence, probe)
    stated = rows[0].evidence["layer_forwards"]
    if name in ("come", "come-released"):  # every forward is over all rows
        assert sum(calls) == stated * len(probe.blocks.lengths)
    else:  # the trials are over three of the five
        assert sum(n == 5 for n in calls) + sum(n == 3 for n in calls) == len(calls) == stated
    if name == "come-released":  # the first pass is whole, the others begin at the layer before the merge
        steps = rows[0].evidence["layer_forwards"] - 8
        assert 0 < steps < 7 + 6


def test_come_measures_again_what_a_merge_changed(llama):
    """Step by step against searches written out with whole passes over the student as it then stands."""
    source, evidence, probe = llama
    _, rows = Come(layers=3).plan(source.shape, evidence, probe)
    steps = {s["step"]: s for r in rows if "merges" in r.evidence for s in r.evidence["merges"]}
    assert sorted(steps) == [0, 1, 2]
    for count in (1, 2):
        shorter, _ = Come(layers=count).plan(source.shape, evidence, probe)
        pieces = [Piece(x.slot, layer_tensors(source, shorter, p)) for p, x in enumerate(shorter.layers)]
        found = StudentPass(probe, "l1", AllTokens(), 1).measure(pieces, 0, [])
        inner = range(1, len(pieces) - 2)  # pairs of unprotected layers
        best = min(inner, key=lambda p: found[p + 1].distance)
        span = [*shorter.covered(best), *shorter.covered(best + 1)]
        assert steps[count]["span"] == span
        assert steps[count]["distance"] == pytest.approx(found[best + 1].distance, rel=1e-5)
        influence = np.array([found[p].influence for p in (best, best + 1)])
        assert steps[count]["shares"] == pytest.approx((influence / influence.sum()).tolist(), rel=1e-4)


def test_merged_again_is_built_from_the_original_layers(llama):
    """Three layers in one after two merges: rows of each, in order, folded once."""
    source, _, _ = llama
    shape = source.shape
    rng = np.random.default_rng(0)
    known = [Sensitivity(torch.from_numpy(rng.random(96)), torch.from_numpy(rng.random(4))) for _ in range(2)]
    from compression_dags.depth.concat.layers import chosen_by_shares

    first = concatenated([whole(2, shape), whole(3, shape)], chosen_by_shares(known, (0.5, 0.5), shape), (0.5, 0.5))
    chosen = chosen_by_shares(known, (0.75, 0.25), shape)
    layer = concatenated([first, whole(4, shape)], chosen, (0.75, 0.25))
    assert layer.tree == [[2, 3], 4] and [p.share for p in layer.parts] == [0.375, 0.375, 0.25]
    single = {i: whole(i, shape) for i in range(8)}
    student = [single[0], single[1], layer, single[5], single[6], single[7]]
    nested = layer_tensors(source, plan_of("test", "concat", student, shape), 2)
    student = [single[0], single[1], first, *(single[i] for i in range(4, 8))]
    inner = layer_tensors(source, plan_of("test", "concat", student, shape), 2)
    (last,) = members_of(source, 4)
    pairs = [(m, c["channels"].long()) for m, c in zip((inner, last), chosen, strict=True)]
    down, up, norm = "mlp.down_proj.weight", "mlp.up_proj.weight", "post_attention_layernorm.weight"
    assert torch.equal(nested[down], torch.cat([m[down][:, c] for m, c in pairs], dim=1))
    torch.testing.assert_close(nested[up] * nested[norm], torch.cat([m[up][c] * m[norm] for m, c in pairs]))


def test_come_p_contains_dropping(llama):
    """With G = 1 only the two drops are tried, and the better one's loss is that of the model without the layer."""
    source, evidence, probe = llama
    plan, rows = ComeP(layers=1, granularity=1, rows=5).plan(source.shape, evidence, probe)
    assert all(x.kept for x in plan.layers) and not plan.tensors
    (gone,) = plan.dropped
    (step,) = rows[gone].evidence["merges"]
    a, b = step["span"]
    losses = VariantScorer(DecoderStream(source), probe.blocks).losses(as_is(8), [Edit(a, a + 1), Edit(b, b + 1)])
    assert [step["trials"]["0"], step["trials"]["1"]] == pytest.approx(losses, rel=1e-6)
    assert rows[gone].action == "drop" and rows[gone].sources == [] and gone == (a if losses[0] <= losses[1] else b)


def test_come_p_trials_are_the_models_that_would_be_written(llama, tmp_path):
    source, evidence, probe = llama
    plan, rows = ComeP(layers=1, granularity=4, rows=5).plan(source.shape, evidence, probe)
    step = next(r for r in rows if "merges" in r.evidence).evidence["merges"][0]
    model = load_stock(apply_plan(source, plan, tmp_path / "out").path)
    ids = torch.from_numpy(probe.blocks.ids).long()
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert min(step["trials"].values()) == pytest.approx(float(loss), rel=1e-5)
    assert step["trials"][f"{step['shares'][0]:g}"] == min(step["trials"].values())


def test_concat_is_refitted_by_least_squares(tiny_model, tmp_path):
    """The start that `concat` is meant to be: every merged layer is a gap that the recovery refits."""
    source = checkpoint(tiny_model, "llama", layers=8, num_key_value_heads=4)
    blocks = random_blocks(60, 32)
    plan, _ = Concat(layers=3).plan(source.shape, evidence_of(source, blocks), ProbeContext(source, blocks))
    merged = apply_plan(source, plan, tmp_path / "merged")
    found = LeastSquares(accept="error").recover(source, merged, plan, blocks, tmp_path / "out")
    gaps = [p for p, x in enumerate(plan.layers) if len(x.sources) > 1]
    assert {int(r.target.split(".")[2]) for r in found.decisions} == set(plan.gaps()) >= set(gaps)
    assert any(r.action == "recover" for r in found.decisions)


@pytest.mark.parametrize("method", [Come(layers=4), ComeReleased(layers=4), ComeP(layers=3, granularity=2, rows=2)])
def test_resumes_with_the_same_plan(llama, tmp_path, monkeypatch, method):
    source, evidence, probe = llama
    whole_plan, whole_rows = method.plan(source.shape, evidence, probe)
    accept, calls = search.Search._accept, []

    def dies(self, *args):
        calls.append(len(self.steps))
        if len(calls) == 3:
            raise KeyboardInterrupt
        accept(self, *args)

    monkeypatch.setattr(search.Search, "_accept", dies)
    with pytest.raises(KeyboardInterrupt):
        resume = ResumePoint(tmp_path, {}, every_seconds=0)
        method.plan(source.shape, evidence, replace(probe, resume=resume))
    calls[:] = [0] * 5
    plan, rows = method.plan(source.shape, evidence, replace(probe, resume=ResumePoint(tmp_path, {})))
    assert calls[5:] == list(range(2, method.layers))
    assert plan.layers == whole_plan.layers
    assert all(torch.equal(plan.tensors[k], t) for k, t in whole_plan.tensors.items())
    merges = [[[s["tree"] for s in r.evidence.get("merges", [])] for r in x] for x in (rows, whole_rows)]
    assert merges[0] == merges[1]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Come, ComeP, Concat, ComeReleased])
@pytest.mark.parametrize("family", by_default("gemma3_text", of=["qwen3", "gemma3_text"]))
def test_kinds_are_never_mixed(tiny_model, method, family):
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["full_attention"]
    source = checkpoint(tiny_model, family, layers=7, layer_types=kinds)
    probe = ProbeContext(source, random_blocks(3))
    evidence = evidence_of(source, probe.blocks)
    options = {"protect_first": 0, "protect_last": 0}
    plan, _ = method(layers=3, **options).plan(source.shape, evidence, probe)
    assert len(plan.layers) == 4
    assert all(len({kinds[i] for i in plan.covered(p)}) == 1 for p in range(4))
    with pytest.raises(InputError, match="remove 4 of 7 layers, but at most 3 can be merged away"):
        method(layers=4, **options).check(source.shape)
    alternating = Checkpoint(tiny_model(family))
    with pytest.raises(InputError, match="at most 0 can be merged away"):
        method(layers=1, **options).check(alternating.shape)


@pytest.mark.parametrize("method", [Come, ComeP, Concat, ComeReleased])
def test_refusals_before_compute(tiny_model, method):
    for family in ("qwen3_moe", "mixtral"):
        with pytest.raises(InputError, match=f"{method.model_fields['method'].default} needs dense layers: {family}"):
            method(layers=1).check(Checkpoint(tiny_model(family)).shape)
    single = checkpoint(tiny_model, "llama", layers=6, num_key_value_heads=1)
    with pytest.raises(InputError, match="has 1 KV head"):
        method(layers=1).check(single.shape)


def test_groups_larger_than_kv_heads(tiny_model):
    source = checkpoint(tiny_model, "llama", layers=8)  # two KV heads
    with pytest.raises(InputError, match="one of up to 3 layers, but a layer has 2 KV head"):
        Come(layers=2, largest_group=3).check(source.shape)
    assert Come(layers=2).largest(source.shape) == 2
    with pytest.raises(InputError, match="at most 3 can be merged away: groups of at most 2"):
        Come(layers=4).check(source.shape)
    with pytest.raises(InputError, match="protect_first 3, protect_last 3"):
        Concat(layers=2, protect_first=3, protect_last=3).check(source.shape)


def test_batch_size_does_not_change_a_plan(llama, monkeypatch):
    source, evidence, probe = llama
    plans = []
    for tokens in (24, 96):
        monkeypatch.setitem(streaming.TOKENS_PER_BATCH, "cpu", tokens)
        plans.append(Come(layers=3).plan(source.shape, evidence, probe)[0])
    assert [x.sources for x in plans[0].layers] == [x.sources for x in plans[1].layers]
    assert all(torch.equal(plans[1].tensors[k], t) for k, t in plans[0].tensors.items())


def test_definitions_load_without_torch():
    import subprocess
    import sys

    code = (
        "import sys; import compression_dags.depth.concat.come, compression_dags.depth.concat.concat, "
        "compression_dags.depth.concat.come_released, compression_dags.depth.windows; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
