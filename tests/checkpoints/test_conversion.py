"""Names on disk against the model's: what stock transformers loads, whole and layer by layer; slices read off it."""

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
)
from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

from compression_dags.checkpoints import conversion as conversion_module
from compression_dags.checkpoints.conversion import Conversion
from compression_dags.checkpoints.parameter_parts import numbered, parts_in, shrinking, spans
from models import _randomize, tiny

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
TEXT = {**SMALL, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
EYES = {**SMALL, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
MORE = {
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL, intermediate_size=48, num_hidden_layers=2),
    "bloom": lambda: BloomConfig(hidden_size=32, n_head=4, vocab_size=64, n_layer=2),
    "gpt2": lambda: GPT2Config(n_embd=32, n_head=4, vocab_size=64, n_layer=2, n_positions=64),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**TEXT, "num_hidden_layers": 3, "num_key_value_heads": 4}, **LATENT, **ROUTED, first_k_dense_replace=1
    ),
    "gemma3": lambda: Gemma3Config(
        text_config={**TEXT, "head_dim": 8}, vision_config=EYES, mm_tokens_per_image=4, image_token_index=60
    ),
}
KNOWN = ("llama", "qwen3_moe", "mixtral")
WITH_EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3")
LAYER = re.compile(r"(.*?\.)?(?:layers|h)\.\d+\.")


def kind_of(family):
    return Gemma3ForConditionalGeneration if family == "gemma3" else AutoModelForCausalLM


def saved(family, directory, dtype="float32"):
    if family in KNOWN:
        return tiny(family, directory, dtype=dtype)
    kind, config = kind_of(family), MORE[family]()
    model = kind._from_config(config) if family == "gemma3" else kind.from_config(config)
    _randomize(model, 0)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def on_meta(family, directory):
    """The model as it is before anything is loaded."""
    kind, config = kind_of(family), AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        return kind._from_config(config) if family == "gemma3" else kind.from_config(config)


def stock(family, directory, dtype="float32"):
    return kind_of(family).from_pretrained(directory, dtype=getattr(torch, dtype))


def parts_of(names):
    """Names by layer; everything outside the layers is one part."""
    key = lambda name: found[0] if (found := LAYER.match(name)) else ""  # noqa: E731
    return [list(group) for _, group in itertools.groupby(sorted(names, key=key), key)]


def same(found, model):
    """The model's parameters are those found, but for heads that are tied to the embedding."""
    state = model.state_dict()
    assert found.keys() <= state.keys()
    for name, tensor in found.items():
        # the model keeps some router biases in float32
        assert torch.equal(tensor.to(state[name].dtype), state[name]), name
    places = {state[name].data_ptr() for name in found}
    assert all(tensor.data_ptr() in places for tensor in state.values())


@pytest.mark.parametrize("family", [*KNOWN, *MORE])
def test_converted_is_what_stock_loads(family, tmp_path):
    path = saved(family, tmp_path, "bfloat16")
    disk, conversion = load_file(path / "model.safetensors"), Conversion(on_meta(family, path))
    model = stock(family, path, "bfloat16")
    whole = conversion.converted(disk)
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    same(whole, model)
    pieces = parts_of(disk)
    assert len(pieces) > 2
    fresh, by_part = Conversion(on_meta(family, path)), {}
    for names in reversed(pieces):
        by_part |= fresh.converted({name: disk[name] for name in reversed(names)})
    same(by_part, model)
    assert by_part.keys() == whole.keys()
    assert set(conversion.in_memory(disk).values()) == whole.keys()


@pytest.mark.parametrize("family", [*KNOWN, *MORE])
def test_places_on_disk(family, tmp_path):
    path = saved(family, tmp_path)
    disk, model = load_file(path / "model.safetensors"), stock(family, path)
    state, seen = model.state_dict(), {}
    found = Conversion(on_meta(family, path)).on_disk({name: tensor.shape for name, tensor in disk.items()})
    for name, made in found.items():
        assert made.parts is not None
        assert bool(made.operations) == (len(made.parts) > 1)
        assert made.disk == tuple(part.disk for part in made.parts)
        for part in made.parts:
            assert torch.equal(part.read(state[name]), disk[part.disk][part.source])
            seen[part.disk] = seen.get(part.disk, 0) + 1
    assert seen == dict.fromkeys(disk, 1)
    fused = [made for name, made in found.items() if name.endswith("experts.gate_up_proj")]
    assert bool(fused) == (family in WITH_EXPERTS)
    for made in fused:
        places = [part.place for part in made.parts]
        assert [place[0] for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
        rows = disk[made.disk[0]].shape[0]
        assert [place[1] for place in places[:2]] == [slice(0, rows), slice(rows, 2 * rows)]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_neox", "llama"])
def test_names_without_and_with_the_prefix_of_the_base_model(family, tmp_path):
    """Files of the base model alone have no `transformer.`; those of a model with a head have."""
    path = saved(family, tmp_path)
    model, disk = on_meta(family, path), load_file(path / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    bare = {name.removeprefix(prefix): tensor for name, tensor in disk.items()}
    assert Conversion(model).converted(bare).keys() == Conversion(model).converted(disk).keys()
    base = Conversion(getattr(model, model.base_model_prefix))
    body = {name for name in bare if prefix + name in disk}
    assert set(base.in_memory(disk).values()) == set(base.in_memory(bare).values()) == body
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    same(Conversion(model).converted(bare), stock(family, path))


def test_older_names_of_a_wrapper(tmp_path):
    """Gemma 3 was published with `language_model.model.layers…`."""
    path = saved("gemma3", tmp_path)
    disk = load_file(path / "model.safetensors")
    old = {
        re.sub(r"^model\.language_model\.", "language_model.model.", n).removeprefix("model."): t
        for n, t in disk.items()
    }
    assert any(name.startswith("language_model.model.layers.0.") for name in old)
    conversion = Conversion(on_meta("gemma3", path))
    expected = conversion.converted(disk)
    found = conversion.converted(old)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_names_that_go_nowhere_are_left_out(tiny_model):
    path = tiny_model("llama")
    conversion = Conversion(on_meta("llama", path))
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.9.mlp.up_proj.weight", "model.norm.weight"]
    assert conversion.in_memory(names) == {"model.norm.weight": "model.norm.weight"}
    assert conversion.converted(dict.fromkeys(names, torch.ones(64))).keys() == {"model.norm.weight"}


def test_a_rename_shares_memory(tiny_model):
    path = tiny_model("llama")
    disk = load_file(path / "model.safetensors")
    found = Conversion(on_meta("llama", path)).converted(disk)
    assert all(found[name] is tensor for name, tensor in disk.items())


@pytest.mark.parametrize("left", ["experts.3.", ".w1.", ".w3.", "experts.0.w1."])
def test_a_part_of_a_parameter_is_refused(tiny_model, left):
    path = tiny_model("mixtral")
    disk = load_file(path / "model.safetensors")
    some = {name: t for name, t in disk.items() if name.startswith("model.layers.1.") and left not in name}
    conversion = Conversion(on_meta("mixtral", path))
    for ask in (conversion.converted, lambda x: conversion.on_disk({name: t.shape for name, t in x.items()})):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.\w+: \d+ tensors on disk"):
            ask(some)


def test_large_experts_are_probed_with_small_tensors(tiny_model):
    """Index tensors of real experts would take gigabytes a layer."""
    config = AutoConfig.from_pretrained(tiny_model("mixtral"))
    config.update({"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "head_dim": 128})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    prefix, wide, tall = "model.layers.0.block_sparse_moe.experts.", (14336, 4096), (4096, 14336)
    shapes = {f"{prefix}{e}.{w}.weight": tall if w == "w2" else wide for e in range(8) for w in ("w1", "w2", "w3")}
    found = Conversion(model).on_disk(shapes)
    up = {part.disk: part.place for part in found["model.layers.0.mlp.experts.gate_up_proj"].parts}
    assert up[f"{prefix}5.w3.weight"] == (5, slice(14336, 28672), slice(0, 4096))
    assert found["model.layers.0.mlp.experts.down_proj"].parts[7].place == (7, slice(0, 4096), slice(0, 14336))


def test_split_turned_and_mixed_tensors(tiny_model, monkeypatch):
    """Operations of families that are not here, each put onto a matrix of llama."""
    own = [
        WeightConverter("self_attn.kv.weight", ["self_attn.k_proj.weight", "self_attn.v_proj.weight"], [Chunk(dim=0)]),
        WeightConverter("mlp.turned.weight", "mlp.up_proj.weight", [Transpose(0, 1)]),
        WeightConverter("mlp.mixed.weight", "mlp.gate_proj.weight", [Interleave(dim=0)]),
        WeightConverter("self_attn.checked.weight", "self_attn.o_proj.weight", [Transpose(0, 1, check_dims=True)]),
    ]
    monkeypatch.setattr(conversion_module, "get_model_conversion_mapping", lambda model: own)
    conversion, prefix = Conversion(on_meta("llama", tiny_model("llama"))), "model.layers.1."
    shapes = {"self_attn.kv": (64, 64), "mlp.turned": (64, 96), "mlp.mixed": (96, 64), "self_attn.checked": (64, 64)}
    disk = {f"{prefix}{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    memory = conversion.converted(disk)
    found = {
        name.removeprefix(prefix).removesuffix(".weight"): made
        for name, made in conversion.on_disk({name: tensor.shape for name, tensor in disk.items()}).items()
    }
    for name, made in found.items():
        for part in made.parts or ():
            assert torch.equal(part.read(memory[f"{prefix}{name}.weight"]), disk[part.disk][part.source])
    assert found["self_attn.v_proj"].parts[0].source == (slice(32, 64), slice(0, 64))
    turned = {name: made.parts[0].transposed for name, made in found.items() if made.parts}
    assert turned == {
        "self_attn.k_proj": False, "self_attn.v_proj": False, "mlp.up_proj": True, "self_attn.o_proj": False
    }  # fmt: skip
    assert found["mlp.gate_proj"].parts is None and found["mlp.gate_proj"].operations == ("Interleave(dim=0)",)


def test_parts_of_arrays():
    numbers = numbered({"a": (2, 3), "b": (2, 3), "c": (4, 2)})
    a, b, c = (torch.from_numpy(own) for own in numbers.values())
    parts = parts_in(torch.cat([b.T, a.T], dim=1).numpy(), numbers)
    assert parts is not None and [(p.disk, p.transposed) for p in parts] == [("b", True), ("a", True)]
    assert torch.equal(parts[1].read(torch.cat([b.T, a.T], dim=1)), a)
    halves = parts_in(c[2:].numpy(), numbers)
    assert halves is not None and len(halves) == 1
    half = halves[0]
    assert (half.source, half.place) == ((slice(2, 4), slice(0, 2)), (slice(0, 2), slice(0, 2)))
    assert not spans([half], (4, 2)) and spans([half.scaled(3)], (6, 6))
    for mixed in (c[[0, 2, 1, 3]], c + 1, torch.cat([a, a]), c * 2, c.reshape(2, 4)):
        assert parts_in(mixed.numpy(), numbers) is None
    assert [shrinking(s) for s in ([(1536, 4096)], [(6, 9)], [(2880, 2880)], [(7, 5)])] == [128, 1, 720, 1]
