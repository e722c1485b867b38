"""The anchors: sleb is greedy by loss, laco's sums are sums, linear-patch is exactly a scaled residual stream."""

import itertools

import numpy as np
import pytest
import torch
from test_scoring import mean_loss, random_blocks, stock_model
from transformers import AutoTokenizer

from compression_dags.architectures import KNOWN
from compression_dags.calibration.corpora import Calibration, TokenBlocks, make_blocks, read_documents
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.methods.laco import LaCo
from compression_dags.depth.methods.laco_search import Group, collapse
from compression_dags.depth.methods.sleb import SLEB
from compression_dags.depth.plan import MergePlan, PlannedLayer, keep_only
from compression_dags.depth.stage import ProbeContext
from compression_dags.errors import InputError, IntegrityError
from compression_dags.passes.scored_rows import chosen_rows, even_rows
from compression_dags.passes.variant_scoring import Piece, VariantScorer
from compression_dags.provenance.resume import ResumePoint
from compression_dags.recovery import linear_patch_run
from compression_dags.recovery.linear_patch import LinearPatch
from compression_dags.recovery.linear_patch_run import divided, mean_norm
from compression_dags.similarity.evidence import Evidence
from models import edit_weights

NO_EVIDENCE = Evidence(np.empty(0), np.empty(0), np.empty(0))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_blocks(path, sequences=8, length=64):
    request = Calibration(sequences=sequences, length=length)
    return make_blocks(read_documents("c4-sample"), AutoTokenizer.from_pretrained(path), request, 512)


@pytest.fixture(scope="module")
def story_blocks(stories):
    return text_blocks(stories)


def planned(method, path, blocks, **probe):
    source = Checkpoint(path)
    method.check(source.shape)
    return method.plan(source.shape, NO_EVIDENCE, ProbeContext(source, blocks, **probe))


# -- sleb ------------------------------------------------------------------------------------------


def greedy(path, blocks, layers, count):
    """Every removal of every round by full forwards of the stock model: dropped layers, losses of each round."""
    kept, rounds = list(range(layers)), []
    for _ in range(count):
        tried = {}
        for layer in kept[1:-1]:
            pieces = [Piece(i) for i in kept if i != layer]
            tried[layer] = mean_loss(stock_model(path, pieces), blocks)
        rounds.append(tried)
        kept.remove(min(tried, key=tried.__getitem__))
    return sorted(set(range(layers)) - set(kept)), rounds


@pytest.mark.parametrize(("family", "layers", "count"), [("stories", 5, 2), ("qwen3", 7, 3)])
def test_sleb_is_greedy(stories, tiny_model, story_blocks, family, layers, count):
    path = stories if family == "stories" else tiny_model(family, layers=layers)
    blocks = story_blocks if family == "stories" else random_blocks(6, 32, padded=True)
    dropped, rounds = greedy(path, chosen_rows(blocks, even_rows(blocks, 4)), layers, count)
    plan, rows = planned(SLEB(layers=count, rows=4), path, blocks)
    assert plan.dropped == dropped and all(layer.kept for layer in plan.layers)
    for row in rows:
        number = row.evidence["round"]
        if row.action == "drop":
            given = {int(i): x for i, x in row.evidence["candidates"].items()}
            assert given == pytest.approx(rounds[number - 1], abs=2e-5)
            assert row.value == pytest.approx(min(rounds[number - 1].values()), rel=1e-5)
        elif 0 < row.step < layers - 1:
            assert number == count and row.value == pytest.approx(rounds[-1][row.step], rel=1e-5)
        else:
            assert row.value is None  # protected
    numbers = sorted(r.evidence["round"] for r in rows if r.action == "drop")
    assert numbers == list(range(1, count + 1)) and {r.evidence["rows"] for r in rows} == {4}
    cost = rows[0].evidence
    full = sum(len(tried) * (layers - number) for number, tried in enumerate(rounds, 1))
    assert cost["layer_forwards_of_full_evaluations"] == full and 0 < cost["layer_forwards"] < full


def test_sleb_takes_the_lower_of_equal_layers(model, story_blocks):
    """Two layers that write nothing: removing either leaves the loss as it is, to the last bit."""

    def silence(tensors):
        for layer, name in itertools.product((2, 3), ("self_attn.o_proj", "mlp.down_proj")):
            tensors[f"model.layers.{layer}.{name}.weight"].zero_()

    edit_weights(model, silence)
    plan, rows = planned(SLEB(layers=1), model, story_blocks)
    assert plan.dropped == [2] and rows[2].value == rows[3].value
    assert rows[2].evidence["loss_before"] == pytest.approx(rows[2].value, rel=1e-5)


def test_sleb_keeps_out_of_protected_layers(stories, story_blocks):
    assert planned(SLEB(layers=1, protect_first=3), stories, story_blocks)[0].dropped == [3]
    assert planned(SLEB(layers=1, protect_first=0, protect_last=4), stories, story_blocks)[0].dropped == [0]


@pytest.mark.parametrize("method", [SLEB(layers=3, rows=2), LaCo(layers=5, combined=3, rows=2)], ids=["sleb", "laco"])
def test_searches_resume_with_the_same_result(tiny_model, tmp_path, monkeypatch, method):
    path, blocks = tiny_model("llama", layers=8), random_blocks(4)
    whole = planned(method, path, blocks)
    measured, calls = VariantScorer.measured, []

    def dies(self, pieces, edits, measure):
        calls.append(len(pieces))
        if len(pieces) <= 6:
            raise KeyboardInterrupt
        return measured(self, pieces, edits, measure)

    monkeypatch.setattr(VariantScorer, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        planned(method, path, blocks, resume=ResumePoint(tmp_path, {}, every_seconds=0))
    assert calls[0] == 8 and calls[-1] <= 6
    calls.clear()
    monkeypatch.setattr(VariantScorer, "measured", lambda self, p, *a: calls.append(len(p)) or measured(self, p, *a))
    resumed = planned(method, path, blocks, resume=ResumePoint(tmp_path, {}))
    assert calls[0] <= 6, "began at the step it lost"
    assert resumed == whole


def test_searches_stop_at_non_finite_states(model, story_blocks):
    edit_weights(model, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].fill_(float("inf")))
    with pytest.raises(IntegrityError, match="sleb: the loss on the calibration tokens is not finite"):
        planned(SLEB(layers=1), model, story_blocks)
    with pytest.raises(IntegrityError, match="laco: no merge of these layers gives finite"):
        planned(LaCo(layers=1), model, story_blocks)


# -- laco ------------------------------------------------------------------------------------------


def stock_cosine(path, written, blocks):
    """Mean over rows of the cosine of two loaded models' last hidden states, flattened over the row's real tokens."""
    ours, theirs = (load_stock(p).model for p in (written, path))
    found = []
    with torch.inference_mode():
        for row, length in zip(blocks.ids, blocks.lengths, strict=True):
            ids = torch.from_numpy(row[:length]).long()[None]
            a, b = (m(ids).last_hidden_state.double().flatten() for m in (ours, theirs))
            found.append(float(a @ b / (a.norm() * b.norm())))
    return float(np.mean(found))


def laco_merge(source, first, m):
    """θ_l + Σ_k (θ_{l+k} − θ_l) by the formula, every tensor of layer l."""
    of = [{k: source.tensor(n).double() for k, n in source.layer(i).items()} for i in range(first, first + m + 1)]
    return {k: of[0][k] + sum(other[k] - of[0][k] for other in of[1:]) for k in of[0]}


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_laco_writes_the_papers_sum(tiny_model, tmp_path, family):
    path = tiny_model(family, layers=6)
    source = Checkpoint(path)
    plan, rows = planned(LaCo(layers=2, rows=2), path, random_blocks(3))
    (position,) = plan.gaps()
    (first, *_), merged = plan.layers[position].sources, plan.layers[position]
    assert merged.sources == (first, first + 1, first + 2) and merged.shares == (-1.0, 1.0, 1.0)
    written = apply_plan(source, plan, tmp_path / "out")
    check_reload(written.path, reference_logits(source, plan))
    expected = laco_merge(source, first, 2)
    for local, name in written.layer(position).items():
        value = written.tensor(name)
        torch.testing.assert_close(value.double(), expected[local], atol=1e-6, rtol=1e-5)
        parents = [source.tensor(source.layer(i)[local]) for i in merged.sources]
        assert not any(torch.equal(value, parent) for parent in parents), f"{local} is one of its parents'"
    assert [r.action for r in rows].count("merge") == 3
    (note,) = rows[first].evidence["merges"]
    assert (note["into"], note["collapsed"], note["m"]) == ((first,), (first + 1, first + 2), 2)


def test_laco_accepts_the_topmost_window_above_the_threshold(tiny_model, tmp_path):
    """Every window by the stock models; the accepted one is the first from the top at the highest 𝒯 that any passes."""
    path, blocks = tiny_model("qwen3", layers=7, layer_types=["full_attention"] * 7), random_blocks(4, 32, padded=True)
    source = Checkpoint(path)
    cosines = {}
    for first in (3, 2, 1):  # three layers become one; the ends are protected
        middle = PlannedLayer((first, first + 1, first + 2), (-1.0, 1.0, 1.0))
        layers = (*map(PlannedLayer, zip(range(first))), middle, *map(PlannedLayer, zip(range(first + 3, 7))))
        written = apply_plan(source, MergePlan("test", 7, layers), tmp_path / str(first))
        cosines[first] = stock_cosine(path, written.path, blocks)
    for start, step in ((0.95, 0.05), (0.9, 0.01), (-0.5, 0.5)):
        plan, rows = planned(LaCo(layers=2, threshold=start, step=step, rows=4), path, blocks)
        threshold = start
        while not (passing := [first for first, cosine in cosines.items() if cosine > threshold]):
            threshold -= step
        chosen = plan.layers[plan.gaps()[0]].sources[0]
        assert chosen == passing[0]
        (note,) = rows[chosen].evidence["merges"]
        assert note["cosine"] == pytest.approx(cosines[chosen], abs=1e-5) == rows[chosen].value
        assert note["threshold"] == pytest.approx(threshold)


@pytest.mark.parametrize(
    ("count", "combined", "interval"), [(1, 3, 2), (2, 3, 1), (3, 3, 2), (4, 4, 1), (5, 3, 1), (6, 7, 3)]
)
def test_laco_removes_exactly_what_is_asked(tiny_model, count, combined, interval):
    plan, rows = planned(
        LaCo(layers=count, combined=combined, interval=interval, rows=1),
        tiny_model("llama", layers=9),
        random_blocks(2),
    )
    assert len(plan.layers) == 9 - count and plan.slots[0] == 0 and plan.slots[-1] == 8
    merges = {m["number"]: m for row in rows for m in row.evidence["merges"]}
    assert sum(m["m"] for m in merges.values()) == count
    assert all(m["cosine"] > m["threshold"] and m["m"] < combined for m in merges.values())
    thresholds = [m["threshold"] for _, m in sorted(merges.items())]
    assert thresholds == sorted(thresholds, reverse=True)


def test_laco_with_one_layer_collapsed_is_a_drop(tiny_model, tmp_path):
    """θ_l + (θ_{l+1} − θ_l) = θ_{l+1}: said as what it is, and bit for bit so."""
    path = tiny_model("llama", layers=6)
    plan, rows = planned(LaCo(layers=2, combined=2, rows=1), path, random_blocks(2))
    assert len(plan.dropped) == 2 and all(layer.kept for layer in plan.layers)
    assert [r.action for r in rows].count("drop") == 2
    assert all(len(rows[i].evidence["merges"]) >= 1 and rows[i].value is not None for i in plan.dropped)


def test_laco_collapses_what_was_collapsed():
    once = collapse([Group((1,)), Group((2,)), Group((3,))])
    assert once == Group((1, 2, 3), (-1.0, 1.0, 1.0))
    twice = collapse([Group((0,)), once, Group((4,)), Group((5,))])
    assert twice == Group((0, 1, 2, 3, 4, 5), (-2.0, -1.0, 1.0, 1.0, 1.0, 1.0)) and sum(twice.shares) == 1
    assert collapse([once, Group((4,))]) == Group((4,))


def test_laco_never_mixes_kinds(tiny_model):
    """Gemma 3's layers alternate here, so nothing can be collapsed; runs of one kind can."""
    with pytest.raises(InputError, match="collapse 1 of 4 layers, but the unprotected ones allow 0"):
        planned(LaCo(layers=1), tiny_model("gemma3_text"), random_blocks(2))
    types = [*["sliding_attention"] * 3, *["full_attention"] * 3, *["sliding_attention"] * 2]
    path = tiny_model("qwen3", layers=8, layer_types=types)
    shape = Checkpoint(path).shape
    with pytest.raises(InputError, match="collapse 4 of 8 layers, but the unprotected ones allow 3"):
        LaCo(layers=4).check(shape)
    plan, _ = planned(LaCo(layers=3, rows=1), path, random_blocks(2))
    assert len(plan.layers) == 5
    assert all(len({shape.kind(i) for i in layer.sources}) == 1 for layer in plan.layers)


# -- linear patch ----------------------------------------------------------------------------------


def cut(path, dropped, directory):
    source = Checkpoint(path)
    plan = keep_only("test", source.num_layers, [i for i in range(source.num_layers) if i not in dropped])
    return source, plan, apply_plan(source, plan, directory)


def hooked_logits(path, scales, ids):
    """Logits of a stock model whose layer p gives out α times its output, for every (p, α)."""
    model = load_stock(path)
    layers = model.get_submodule(KNOWN[model.config.model_type].layers)
    for position, alpha in scales.items():
        layers[position].register_forward_hook(
            lambda _, args, out, alpha=alpha: (out[0] * alpha, *out[1:]) if isinstance(out, tuple) else out * alpha
        )
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "opt"])
@pytest.mark.parametrize("alpha", [0.6, 1.7])
def test_the_fold_is_a_scaled_residual_stream(tiny_model, tmp_path, family, alpha):
    source = Checkpoint(tiny_model(family, layers=5))
    fitted = {}
    for position, factor in ((2, alpha), (3, alpha * 1.25), (4, alpha * 1.25)):  # cuts behind layers 1 and 2
        prefix = source.architecture.layer_prefix(position)
        fitted |= {prefix + local: t for local, t in divided(source, position, factor).items()}
    assert len(fitted) == 3 * (4 if family == "opt" else 2)  # two writers a layer, and OPT's biases
    folded = linear_patch_run.write_recovered(source, fitted, tmp_path / "folded")
    ids = torch.from_numpy(random_blocks(3).ids).long()
    with torch.inference_mode():
        ours = load_stock(folded.path)(ids).logits
    theirs = hooked_logits(source.path, {1: alpha, 2: 1.25}, ids)
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    plain = hooked_logits(source.path, {}, ids)
    assert (plain - theirs).norm() / theirs.norm() > 1e-2  # the scale matters


def test_linear_patch_repairs_two_gaps(stories, tmp_path):
    """On a real model: the ledger's α hooked in give the written model, whose held-out loss falls at every step."""
    blocks = text_blocks(stories, 24, 256)
    source, plan, student = cut(stories, [1, 3], tmp_path / "cut")
    found = LinearPatch().recover(source, student, plan, blocks, tmp_path / "out")
    first, second = found.decisions
    assert [d.action for d in found.decisions] == ["recover", "recover"]
    assert [d.target for d in found.decisions] == ["model.layers.0", "model.layers.1"]
    assert found.metadata["factor"] == pytest.approx(first.value * second.value)
    held = chosen_rows(blocks, [21, 22, 23])
    losses = [mean_loss(load_stock(c.path), held) for c in (student, found.checkpoint)]
    assert losses[0] == pytest.approx(first.evidence["held_out_loss_before"], rel=1e-4)
    assert losses[1] == pytest.approx(second.evidence["held_out_loss_after"], rel=1e-4)
    middle = first.evidence["held_out_loss_after"]
    assert losses[1] < middle < losses[0] and middle == second.evidence["held_out_loss_before"]
    ids = torch.from_numpy(held.ids).long()
    with torch.inference_mode():
        ours = load_stock(found.checkpoint.path)(ids).logits
    theirs = hooked_logits(student.path, {0: first.value, 1: second.value}, ids)
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    changed = {n for n in student.tensors if not torch.equal(student.tensor(n), found.checkpoint.tensor(n))}
    assert changed == set(found.fitted) and all(n.endswith(("o_proj.weight", "down_proj.weight")) for n in changed)
    same = keep_only("none", 3, [0, 1, 2])
    check_reload(found.checkpoint.path, reference_logits(student, same, replaced=found.fitted))


def test_alpha_is_the_ratio_of_mean_norms(stories, tmp_path):
    blocks = text_blocks(stories, 8, 64)
    source, plan, student = cut(stories, [2, 3], tmp_path / "cut")
    found = LinearPatch(sink_positions=6, holdout=0.25).recover(source, student, plan, blocks, tmp_path / "out")
    (row,) = found.decisions
    ids = torch.from_numpy(blocks.ids[:6]).long()
    with torch.inference_mode():
        behind = load_stock(stories)(ids, output_hidden_states=True).hidden_states[4]
        at = load_stock(student.path)(ids, output_hidden_states=True).hidden_states[2]
    expected = behind[:, 6:].norm(dim=-1).mean() / at[:, 6:].norm(dim=-1).mean()
    assert row.value == pytest.approx(float(expected), rel=1e-4)
    assert row.evidence["covers"] == [1, 2, 3] and row.sources == [1]


def test_linear_patch_is_undone_if_worse(novella, tmp_path):
    """novella's middle layers: the norm ratio overshoots, the loss rises, the bytes stay."""
    source, plan, student = cut(novella, [8, 9, 10], tmp_path / "cut")
    found = LinearPatch().recover(source, student, plan, text_blocks(novella, 6, 96), tmp_path / "out")
    (row,) = found.decisions
    assert row.action == "reject" and row.value > 1 and not found.fitted and found.metadata["factor"] == 1.0
    assert row.evidence["held_out_loss_after"] >= row.evidence["held_out_loss_before"]
    for file in student.files:
        assert (student.path / file).read_bytes() == (found.checkpoint.path / file).read_bytes()


def test_linear_patch_of_merged_layers_and_of_the_end(tiny_model, tmp_path):
    """A merged layer's cut is behind it; behind the last layer a scale means nothing, and that is said."""
    source = Checkpoint(tiny_model("gemma3_text", layers=6))
    plan = MergePlan("test", 6, (PlannedLayer((0,)), PlannedLayer((1, 3), (0.5, 0.5)), PlannedLayer((4,))))
    student = apply_plan(source, plan, tmp_path / "cut")
    found = LinearPatch().recover(source, student, plan, random_blocks(8), tmp_path / "out")
    merged, end = found.decisions
    assert merged.sources == [1, 3] and merged.evidence["covers"] == [1, 2, 3] and merged.value != 1.0
    assert end.action == "reject" and "no layer is left behind the cut" in end.evidence["why_not"]
    same = keep_only("none", 3, [0, 1, 2])
    check_reload(found.checkpoint.path, reference_logits(student, same, replaced=found.fitted))


def test_linear_patch_without_gaps(stories, tmp_path, story_blocks):
    source, plan, student = cut(stories, [], tmp_path / "cut")
    found = LinearPatch().recover(source, student, plan, story_blocks, tmp_path / "out")
    assert not found.decisions and not found.fitted


def test_linear_patch_never_overflows_silently(novella, tmp_path, monkeypatch):
    """A scale that float16 cannot take is rejected with its reason, and nothing is written."""
    source, plan, student = cut(novella, [8], tmp_path / "cut")
    blocks = text_blocks(novella, 2, 16)
    monkeypatch.setattr(linear_patch_run._Run, "exit_norms", lambda *_: {7: 1e-9})
    found = LinearPatch().recover(source, student, plan, blocks, tmp_path / "out")
    (row,) = found.decisions
    assert row.action == "reject" and not found.fitted
    assert row.evidence["why_not"] == "a rescaled weight is not finite in its stored dtype"
    assert row.evidence["held_out_loss_after"] is None


def test_linear_patch_refusals(stories, tiny_model):
    shape = Checkpoint(stories).shape
    for family in ("mixtral", "qwen3_moe"):
        with pytest.raises(InputError, match=f"does not fold into {family}"):
            LinearPatch().check(Checkpoint(tiny_model(family)).shape)
    LinearPatch().check(Checkpoint(tiny_model("gemma3_text")).shape)
    with pytest.raises(InputError, match="needs 2 calibration sequences"):
        LinearPatch().check_tokens(shape, 1, 128)
    with pytest.raises(InputError, match="first 8 positions, but the calibration sequences have 8 tokens"):
        LinearPatch(sink_positions=8).check_tokens(shape, 4, 8)
    assert [LinearPatch().held_out(n) for n in (2, 3, 8, 128)] == [1, 1, 1, 16]
    assert LinearPatch(holdout=0.99).held_out(4) == 3
    batches = DecoderStream(Checkpoint(stories)).batches(TokenBlocks(np.full((2, 8), 5, np.int32), np.full(2, 4), 2))
    assert mean_norm(batches, 3) > 0
    with pytest.raises(InputError, match="no calibration token lies behind the first 4"):
        mean_norm(batches, 4)
