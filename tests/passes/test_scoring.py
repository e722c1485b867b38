"""The shared loss bench: every shortcut gives what the stock model gives, and leaves the base model as it was."""

import copy

import numpy as np
import pytest
import torch
from slow import by_default

from compression_dags.architectures import KNOWN
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, layer_tensors
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.errors import InputError
from compression_dags.passes import scored_rows
from compression_dags.passes.scored_rows import chosen_rows, even_rows
from compression_dags.passes.variant_scoring import (
    Edit,
    Piece,
    VariantScorer,
    apply_edit,
    as_is,
    placed,
)
from compression_dags.provenance.resume import as_note, from_note

LAYERS = 6


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_blocks(rows=7, length=40, padded=False, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows) if padded else np.full(rows, length)
    ids = rng.integers(3, 512, (rows, length)).astype(np.int32)
    ids[np.arange(length)[None, :] >= lengths[:, None]] = 0
    return TokenBlocks(ids, lengths.astype(np.int32), rows)


def stock_model(path, pieces):
    """The loaded model with its layer objects rearranged and replaced; independent of the streamed decoder."""
    model = load_stock(path)
    stack = model.get_submodule(KNOWN[model.config.model_type].stack)
    layers = []
    for index, piece in enumerate(pieces):
        layer = copy.deepcopy(stack.layers[piece.slot])
        assert not layer.load_state_dict(dict(piece.tensors), strict=False).unexpected_keys
        layer.self_attn.layer_idx = index
        layers.append(layer)
    stack.layers = torch.nn.ModuleList(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[p.slot] for p in pieces]
    model.config.num_hidden_layers = len(layers)
    return model


def mean_loss(model, blocks):
    """Mean next-token loss, one unpadded row at a time."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for row, length in zip(blocks.ids, blocks.lengths, strict=True):
            ids = torch.from_numpy(row[:length]).long()[None]
            logits = model(ids).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += int(length) - 1
    return total / count


def swapped(path, slot, other):
    """Layer `slot` with the MLP writer and a norm of layer `other`."""
    source = Checkpoint(path)
    writer = source.architecture.residual_writer or "mlp.down_proj"
    names = (f"{writer}.weight", f"{source.architecture.norms[0]}.weight")
    return Piece(slot, {name: source.tensor(source.layer(other)[name]) for name in names})


EDITS = {
    "nothing": Edit(LAYERS, LAYERS),
    "nothing, early": Edit(2, 2),
    "drop first": Edit(0, 1),
    "drop last": Edit(LAYERS - 1, LAYERS),
    "drop two": Edit(2, 4),
    "insert": Edit(3, 3, (Piece(1),)),
    "reorder": Edit(1, 5, (Piece(3), Piece(2))),
    "same start": Edit(2, 3),
}


@pytest.mark.parametrize(
    "family",
    by_default(
        "llama", "gemma3_text", "qwen3_moe", of=["llama", "mistral", "qwen3", "gemma3_text", "opt", "qwen3_moe"]
    ),
)
def test_losses_equal_the_stock_models(tiny_model, family):
    """Batches of 3, 3 and 1 rows, layer types that differ, edits of every shape: against full forwards."""
    path = tiny_model(family, layers=LAYERS)
    edits = dict(EDITS)
    if family != "qwen3_moe":
        edits["replace"] = Edit(4, 5, (swapped(path, 4, 2),))
    stock = [stock_model(path, apply_edit(as_is(LAYERS), e)) for e in edits.values()]
    for padded in (False, True):
        blocks = random_blocks(padded=padded)
        probe = VariantScorer(DecoderStream(Checkpoint(path), batch_size=3), blocks)
        found, expected = probe.losses(as_is(LAYERS), list(edits.values())), [mean_loss(m, blocks) for m in stock]
        assert found == pytest.approx(expected, rel=1e-5), padded
        assert len({round(x, 4) for x in expected}) >= len(edits) - 3  # the empty edits agree, nearly all others differ


def test_edits_of_a_student_that_is_already_edited(tiny_model):
    """Kinds and masks follow the slot, not the position."""
    path = tiny_model("gemma3_text", layers=LAYERS)
    blocks = random_blocks()
    probe = VariantScorer(DecoderStream(Checkpoint(path)), blocks)
    student = [Piece(0), swapped(path, 2, 4), Piece(3), Piece(5)]
    edits = [Edit(1, 2), Edit(2, 3), Edit(2, 2, (Piece(4),))]
    expected = [mean_loss(stock_model(path, apply_edit(student, e)), blocks) for e in edits]
    assert probe.losses(student, edits) == pytest.approx(expected, rel=1e-5)
    assert probe.loss(student) == pytest.approx(mean_loss(stock_model(path, student), blocks), rel=1e-5)


def test_experts_are_replaced_by_their_names_on_disk(tiny_model, tmp_path):
    path = tiny_model("mixtral", layers=4)
    source, blocks = Checkpoint(path), random_blocks(3)
    layers = (PlannedLayer((0,)), PlannedLayer((1, 2), (0.4, 0.6)), PlannedLayer((3,)))
    plan = MergePlan("test", 4, layers)
    merged = Piece(1, layer_tensors(source, plan, 1))
    probe = VariantScorer(DecoderStream(source), blocks)
    (found,) = probe.losses(as_is(4), [Edit(1, 3, (merged,))])
    written = load_stock(apply_plan(source, plan, tmp_path / "merged").path)
    assert found == pytest.approx(mean_loss(written, blocks), rel=1e-5)
    some = {k: t for k, t in merged.tensors.items() if "experts.0.w1" in k}
    with pytest.raises(ValueError, match="replaces some experts"):
        probe.losses(as_is(4), [Edit(1, 2, (Piece(1, some),))])


@pytest.mark.parametrize("resident", [True, False])
def test_several_walks_and_streamed_layers_give_the_same(tiny_model, monkeypatch, resident):
    path = tiny_model("qwen3", layers=LAYERS)
    blocks, edits = random_blocks(), [*EDITS.values(), Edit(4, 5, (swapped(path, 4, 2),))]
    whole = VariantScorer(DecoderStream(Checkpoint(path)), blocks).losses(as_is(LAYERS), edits)
    monkeypatch.setattr(VariantScorer, "_at_once", lambda self: 2)
    probe = VariantScorer(DecoderStream(Checkpoint(path), resident=resident), blocks)
    assert probe.losses(as_is(LAYERS), edits) == whole


def test_logits_in_parts(tiny_model, monkeypatch):
    probe = VariantScorer(DecoderStream(Checkpoint(tiny_model("llama"))), random_blocks(padded=True))
    whole = probe.loss(as_is(4))
    monkeypatch.setattr(scored_rows, "LOGITS_AT_ONCE", 2 * 40 * 512)
    assert probe.loss(as_is(4)) == pytest.approx(whole, rel=1e-6)


def test_layer_forwards(tiny_model, monkeypatch):
    """Removing layer j of L costs L − 1 − j, beside one walk of the shared prefix; a walk a candidate costs L − 1."""
    probe = VariantScorer(DecoderStream(Checkpoint(tiny_model("llama", layers=LAYERS))), random_blocks(2))
    drops = [Edit(j, j + 1) for j in range(1, LAYERS - 1)]
    probe.losses(as_is(LAYERS), drops)
    shared = LAYERS - 2  # up to the last candidate's entry
    assert probe.layer_forwards == shared + sum(LAYERS - 1 - j for j in range(1, LAYERS - 1))
    probe.layer_forwards = 0
    probe.losses(as_is(LAYERS), [*drops, Edit(LAYERS, LAYERS)])
    assert probe.layer_forwards == LAYERS + sum(LAYERS - 1 - j for j in range(1, LAYERS - 1))
    monkeypatch.setattr(VariantScorer, "_at_once", lambda self: 1)
    probe.layer_forwards = 0
    probe.losses(as_is(LAYERS), drops)
    assert probe.layer_forwards == len(drops) * (LAYERS - 1)


def test_states_and_other_measures(tiny_model):
    """`measured` hands out the states before the final norm; `last_states` those that transformers returns."""
    path = tiny_model("opt")
    blocks = random_blocks(padded=True)
    probe = VariantScorer(DecoderStream(Checkpoint(path), batch_size=4), blocks)
    pieces = [Piece(0), Piece(2), Piece(3)]
    states = probe.states(pieces)
    seen = []
    assert probe.measured(as_is(4), [Edit(1, 2)], lambda s: seen.append(s) or 7.0) == [7.0]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], states, strict=True))
    model = stock_model(path, pieces)
    for batch, hidden in zip(probe.batches, states, strict=True):
        with torch.inference_mode():
            stack = model.get_submodule("model.decoder")
            theirs = stack(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        torch.testing.assert_close(probe.stream.last_states(batch, hidden)[batch.mask], theirs[batch.mask])


def test_non_finite_losses_are_infinite(tiny_model):
    path = tiny_model("llama")
    probe = VariantScorer(DecoderStream(Checkpoint(path)), random_blocks(2))
    for bad in (float("nan"), float("inf")):
        broken = Piece(2, {"mlp.down_proj.weight": torch.full((64, 96), bad)})
        losses = probe.losses(as_is(4), [Edit(2, 3, (broken,)), Edit(1, 2)])
        assert losses[0] == float("inf") and np.isfinite(losses[1])


def test_the_streams_own_layers_stay(tiny_model):
    path = tiny_model("llama")
    source = Checkpoint(path)
    stream = DecoderStream(source)
    probe = VariantScorer(stream, random_blocks(2))
    before = probe.loss(as_is(4))
    with stream.layer(2) as layer:
        held = {k: (p, p.clone()) for k, p in layer.named_parameters()}
    probe.losses(as_is(4), [Edit(2, 3, (swapped(path, 2, 1),))])
    faults = {
        "no parameter mlp.sideways.weight": {
            "mlp.down_proj.weight": torch.ones(64, 96),
            "mlp.sideways.weight": torch.ones(1),
        },
        r"has shape \(64, 96\), the piece's \(2, 2\)": {"mlp.down_proj.weight": torch.ones(2, 2)},
    }
    for says, tensors in faults.items():
        with pytest.raises(ValueError, match=says):
            probe.losses(as_is(4), [Edit(2, 3, (Piece(2, tensors),))])
    with pytest.raises(KeyboardInterrupt), placed(stream, swapped(path, 2, 1)):
        raise KeyboardInterrupt
    with stream.layer(2) as layer:
        now = dict(layer.named_parameters())
        assert all(now[k] is p and torch.equal(now[k], value) for k, (p, value) in held.items())
    assert probe.loss(as_is(4)) == before


def test_refusals(tiny_model):
    stream = DecoderStream(Checkpoint(tiny_model("llama")))
    blocks = random_blocks(3)
    with pytest.raises(InputError, match="at least 2 tokens"):
        VariantScorer(stream, TokenBlocks(blocks.ids, np.ones(3, dtype=np.int32), 3))
    for edit in (Edit(3, 5), Edit(2, 1), Edit(-1, 0)):
        with pytest.raises(ValueError, match="does not fit a student of 4 layers"):
            VariantScorer(stream, blocks).losses(as_is(4), [edit])
    assert VariantScorer(stream, blocks).losses(as_is(4), []) == []


def test_rows_and_states_of_a_search():
    blocks = random_blocks(10)
    assert even_rows(blocks, 4) == [0, 2, 5, 7] and even_rows(blocks, 99) == list(range(10))
    assert np.array_equal(chosen_rows(blocks, [0, 5]).ids, blocks.ids[[0, 5]])
    note = {"losses": {"3": 0.1 + 0.2, "4": float("inf")}, "dropped": [3]}
    assert from_note(as_note(note)) == note
