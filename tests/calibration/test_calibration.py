"""Corpora and the streamed pass: exact counts, independence of batching and padding, streamed = whole = stock."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from test_sweep import DEVICE
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression_dags.calibration.activations import angular_distances, profile_activations, sample_tokens
from compression_dags.calibration.corpora import Calibration, TokenBlocks, make_blocks, read_documents
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError, IntegrityError
from compression_dags.kernels import rotary
from compression_dags.kernels.fused_layer import fuse
from compression_dags.provenance.resume import ResumePoint
from models import FAMILIES


@pytest.fixture(scope="module")
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


def random_blocks(rows=6, length=32, vocab=512, seed=0, lengths=None):
    ids = np.random.default_rng(seed).integers(3, vocab, (rows, length)).astype(np.int32)
    return TokenBlocks(ids, np.asarray(lengths or [length] * rows, dtype=np.int32), rows)


def test_blocks_are_exact_and_seeded(tokenizer):
    documents = read_documents("c4-sample")
    request = Calibration(sequences=3, length=64, seed=1)
    blocks = make_blocks(documents, tokenizer, request, 512)
    assert blocks.ids.shape == (3, 64) and blocks.tokens == 192
    again = make_blocks(documents, tokenizer, request, 512)
    other = make_blocks(documents, tokenizer, Calibration(sequences=3, length=64, seed=2), 512)
    assert np.array_equal(blocks.ids, again.ids) and not np.array_equal(blocks.ids, other.ids)
    assert make_blocks(documents, tokenizer, request, 16).ids.shape == (3, 16)  # clipped to the context


def test_document_packing_pads(tokenizer):
    documents = ["one short story about a cat and a dog", "once upon a time " * 40]
    blocks = make_blocks(documents, tokenizer, Calibration(sequences=2, length=48, packing="document"), 512)
    assert sorted(blocks.lengths.tolist())[1] == 48 and blocks.lengths.min() < 48
    assert blocks.tokens == int(blocks.lengths.sum())


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("empty.txt", "", "is empty"),
        ("few.txt", "too little", "gives"),
        ("odd.csv", "a", "must be"),
        (None, "", "unknown"),
    ],
)
def test_bad_corpora(tmp_path, tokenizer, name, text, says):
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_text(text)
    request = Calibration(corpus=str(path), sequences=2, length=64)
    with pytest.raises(InputError, match=says):
        make_blocks(read_documents(request.corpus), tokenizer, request, 512)


def test_corpus_without_text_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(InputError, match="`text` column"):
        read_documents(str(path))


def test_slugs_tell_settings_apart():
    slugs = {
        Calibration(**o).slug for o in ({}, {"seed": 1}, {"length": 64}, {"packing": "document"}, {"corpus": "a.txt"})
    }
    assert len(slugs) == 5 and all(s.replace("_", "").isalnum() for s in slugs)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_pass_equals_the_stock_model(tiny_model, family):
    """Hidden states before the final norm, block influence and logits of every family, layer by layer from disk."""
    checkpoint = Checkpoint(tiny_model(family))
    blocks = random_blocks()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    layers: Any = model.get_submodule(checkpoint.architecture.layers)
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last = []
    layers[-1].register_forward_hook(lambda _, args, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        logits = model(torch.from_numpy(blocks.ids).long()).logits
    states = torch.stack([*seen, last[0]])

    stream = DecoderStream(checkpoint, resident=False, batch_size=len(blocks.ids))
    found = profile_activations(stream, blocks, samples=10_000)
    assert torch.equal(found.hidden.reshape(states.shape), states)
    cosine = torch.nn.functional.cosine_similarity(states[:-1], states[1:], dim=-1).double().mean((1, 2))
    torch.testing.assert_close(found.block_influence, 1 - cosine, rtol=0, atol=1e-7)
    (batch,) = stream.batches(blocks)
    assert torch.equal(stream.logits(batch, states[-1]), logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_independent_of_batch_size_and_residency(tiny_model, family):
    checkpoint, blocks = Checkpoint(tiny_model(family)), random_blocks()
    whole = profile_activations(DecoderStream(checkpoint, resident=True, batch_size=6), blocks)
    streamed = profile_activations(DecoderStream(checkpoint, resident=False, batch_size=2), blocks)
    for name in ("block_influence", "angular", "angular_last"):
        torch.testing.assert_close(getattr(whole, name), getattr(streamed, name), rtol=1e-5, atol=1e-6)
    assert whole.norms.keys() == streamed.norms.keys()
    for key, value in whole.norms.items():
        torch.testing.assert_close(value, streamed.norms[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_modules_are_the_models_own(tiny_model, family):
    """GPUs run them; here by hand. Gemma's 1 + γ and OPT stay; a copy of a layer keeps its own weights."""
    checkpoint, blocks = Checkpoint(tiny_model(family)), random_blocks(vocab=96)
    plain, fused = DecoderStream(checkpoint), DecoderStream(checkpoint)
    norms = [m for m in fused.shell.modules() if type(m).__name__.endswith("RMSNorm")]
    kept = {"gemma3_text", "opt"}
    found = fuse(fused.shell)
    assert found["norms"] == (0 if family in kept else len(norms))
    assert found["attentions"] == (0 if family == "opt" else checkpoint.num_layers)
    assert fuse(fused.shell) == {"norms": 0, "attentions": 0}
    states = [profile_activations(stream, blocks).hidden for stream in (plain, fused)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    if family not in kept:
        with fused.layer(0) as layer:
            copied, name = copy.deepcopy(layer), checkpoint.architecture.input_norms[0][1]
            norm, other = layer.get_submodule(name), copied.get_submodule(name)
            norm.weight.data.mul_(2)
            x = torch.randn(2, 3, norm.weight.numel())
            torch.testing.assert_close(2 * other(x), norm(x))


@pytest.mark.gpu(interpreted=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize(("heads", "width", "shared"), [(4, 16, True), (3, 24, False)])
def test_the_rotary_kernel_is_the_models_own(dtype, heads, width, shared):
    """Bit for bit in half precision, where both products are rounded; queries lie as a projection leaves them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, heads, width, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    k = torch.randn(2, 7, 1, width, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1 if shared else 2, 7, width, generator=generator).to(DEVICE, dtype)
    wanted = apply_rotary_pos_emb(q, k, cos, sin)
    for x, right in zip((q, k), wanted, strict=True):
        found = rotary._by_kernel(x, cos, sin)
        assert found.transpose(1, 2).is_contiguous()
        slack = 1e-6 if dtype == torch.float32 else 0
        torch.testing.assert_close(found, right, rtol=slack, atol=slack)


def test_independent_of_padding(tiny_model):
    """The same real tokens, with and without padding behind them."""
    checkpoint, lengths = Checkpoint(tiny_model("llama")), [20, 11, 16]
    padded = random_blocks(3, 32, lengths=lengths)
    other = TokenBlocks(padded.ids.copy(), padded.lengths, 3)
    for row, length in enumerate(lengths):
        other.ids[row, length:] = 7  # other padding content
    a = profile_activations(DecoderStream(checkpoint), padded)
    b = profile_activations(DecoderStream(checkpoint), other)
    assert torch.equal(a.block_influence, b.block_influence) and a.tokens == sum(lengths)
    alone = [
        profile_activations(
            DecoderStream(checkpoint), TokenBlocks(padded.ids[r : r + 1, :n], padded.lengths[r : r + 1], 1)
        )
        for r, n in enumerate(lengths)
    ]
    mean = sum(n * x.block_influence for n, x in zip(lengths, alone, strict=True)) / sum(lengths)
    torch.testing.assert_close(a.block_influence, mean, rtol=1e-5, atol=1e-7)
    key = "layers.1.mlp_output.mean_square"
    norm = sum(n * x.norms[key] for n, x in zip(lengths, alone, strict=True)) / sum(lengths)
    torch.testing.assert_close(a.norms[key], norm, rtol=1e-4, atol=1e-9)


def test_norms_are_of_the_projection_inputs(tiny_model):
    checkpoint, blocks = Checkpoint(tiny_model("llama")), random_blocks(2)
    found = profile_activations(DecoderStream(checkpoint), blocks)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    seen = []
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(torch.from_numpy(blocks.ids).long())
    expected = seen[0].flatten(0, 1).double().square().mean(0)
    torch.testing.assert_close(found.norms["layers.1.mlp_output.mean_square"], expected, rtol=1e-5, atol=1e-9)


def test_angular_distance_is_the_angle():
    hidden = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[-3.0, 0.0]]])
    distance = angular_distances(hidden)
    torch.testing.assert_close(distance, torch.tensor([[0, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 0]], dtype=torch.float64))


def test_sampled_tokens_are_real_and_distinct():
    chosen = sample_tokens(np.array([5, 0, 3]), 100, 0)
    assert len(chosen) == 8 == len({tuple(c) for c in chosen})
    assert all(p < {0: 5, 2: 3}[s] for s, p in chosen)


def test_nonfinite_activations_stop_the_pass(tiny_model):
    stream = DecoderStream(Checkpoint(tiny_model("llama")), resident=True)
    with stream.layer(1) as layer:
        layer.mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(IntegrityError, match="layer 1"):
        profile_activations(stream, random_blocks(2))


def test_killed_pass_resumes_at_the_layer_it_lost(tiny_model, tmp_path):
    checkpoint, blocks = Checkpoint(tiny_model("llama")), random_blocks()
    whole = profile_activations(DecoderStream(checkpoint), blocks)

    class Killed(Exception):
        pass

    stream = DecoderStream(checkpoint)
    original = stream.apply

    def dies(module, index, batch, hidden=None):
        if index == 2:
            raise Killed
        return original(module, index, batch, hidden)

    stream.apply = dies
    resume = ResumePoint(tmp_path, {"seed": 0}, every_seconds=0)
    with pytest.raises(Killed):
        profile_activations(stream, blocks, resume=resume)

    resumed, applied = DecoderStream(checkpoint), []
    original_resumed = resumed.apply
    resumed.apply = lambda m, i, b, h=None: (applied.append(i), original_resumed(m, i, b, h))[1]
    found = profile_activations(resumed, blocks, resume=ResumePoint(tmp_path, {"seed": 0}))
    assert min(applied) == 2
    assert torch.equal(found.block_influence, whole.block_influence) and torch.equal(found.hidden, whole.hidden)
    assert all(torch.equal(found.norms[k], whole.norms[k]) for k in whole.norms)
    with pytest.raises(InputError, match="settings"):
        ResumePoint(tmp_path, {"seed": 1}).load()
