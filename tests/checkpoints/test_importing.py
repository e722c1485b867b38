"""What the door lets in, what it refuses and how it says so."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from compression_dags.checkpoints import stock_check
from compression_dags.checkpoints.gate import load_stock
from compression_dags.checkpoints.headers import read_header
from compression_dags.checkpoints.importing import import_checkpoint
from compression_dags.checkpoints.layout import tied
from compression_dags.checkpoints.licence import stated_licence
from compression_dags.checkpoints.reader import INDEX, SINGLE, Checkpoint
from models import FAMILIES, admit, edit_config, edit_weights, refuse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- what comes in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_imported(family, tiny_model, tmp_path):
    metadata = admit(tiny_model(family), tmp_path / "in").metadata
    assert (metadata["architecture"], metadata["layers"], metadata["hidden"], metadata["vocab"]) == (family, 4, 64, 512)
    assert metadata["parameters"] == sum(p.numel() for p in load_stock(tmp_path / "in").parameters())


def test_facts_and_files(novella, tmp_path):
    imported = import_checkpoint(novella, tmp_path / "in", revision=COMMIT, origin="novella-13m")
    metadata = imported.metadata
    assert (
        metadata["files"].keys() == {p.name for p in (tmp_path / "in").iterdir()} == {p.name for p in novella.iterdir()}
    )
    for name, digest in metadata["files"].items():
        assert hashlib.sha256((novella / name).read_bytes()).hexdigest() == digest
    assert {k: v for k, v in metadata.items() if k != "files"} == {
        "architecture": "llama", "layers": 16, "parameters": 12_853_504, "bytes": 25_722_832, "hidden": 256,
        "vocab": 4096, "context": 512, "dtype": "float16", "tied_embeddings": True, "revision": COMMIT,
        "origin": "novella-13m", "licence": "apache-2.0",
        "notes": [],
    }  # fmt: skip


def test_code_and_pickles_stay_outside(model, tmp_path):
    for name in ("modeling_evil.py", "pytorch_model.bin", ".hidden", "notes.pdf"):
        (model / name).write_bytes(b"x")
    (model / "LICENSE").write_text("MIT")
    metadata = admit(model, tmp_path / "in").metadata
    assert set(metadata["files"]) == {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_sharded_models_keep_their_shards(model, tmp_path):
    load_stock(model).save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, tmp_path / "sharded" / name)
    metadata = admit(tmp_path / "sharded", tmp_path / "in").metadata
    assert sum(name.endswith(".safetensors") for name in metadata["files"]) > 1
    assert INDEX in metadata["files"]


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: [\n---\n", None),
        ("# no front matter\nlicense: mit\n", None),
    ],
)
def test_licence_of_the_card(card, stated, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert stated_licence(tmp_path) == stated


def test_licence_file_is_named(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("…")
    assert stated_licence(tmp_path) == "LICENSE.txt"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_truncated_file(model):
    data = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(data[:-1000])
    refuse(model, rf"{SINGLE} is truncated or padded: {len(data) - 1000} bytes on disk, {len(data)} by its header")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"a":{}}'], ids=repr
)
def test_not_safetensors(content, model):
    (model / SINGLE).write_bytes(content)
    refuse(model, rf"{SINGLE} (is not a whole|has an unreadable) safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight(value, model):
    name = "model.layers.3.mlp.up_proj.weight"
    edit_weights(model, lambda tensors: tensors[name][5].fill_(value))
    refuse(model, rf"model\.safetensors: tensor {name} holds 64 non-finite")


def test_tokenizer_of_a_smaller_model(novella, stories, tmp_path):
    mixed = Path(shutil.copytree(novella, tmp_path / "mixed"))
    shutil.copyfile(stories / "tokenizer.json", mixed / "tokenizer.json")
    refuse(mixed, r"51\d tokens for 4096 embedding rows")


def test_tokenizer_of_a_larger_model(model, novella):
    shutil.copyfile(novella / "tokenizer.json", model / "tokenizer.json")
    refuse(model, r"highest id is 4095, the embedding has 512 rows")


def test_missing_tokenizer(model):
    (model / "tokenizer.json").unlink()
    refuse(model, r"has no tokenizer: one of tokenizer\.json")


def test_damaged_tokenizer(model):
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    refuse(model, "the tokenizer in .* does not load")


def test_pickles_only(model):
    (model / SINGLE).rename(model / "pytorch_model.bin")
    refuse(model, r"no safetensors weights .*found pytorch_model\.bin")


def test_two_sets_of_weights(model):
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(Checkpoint(model).tensors, SINGLE)}))
    refuse(model, "holds both")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "must lie beside the index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is missing"),
    ],
)
def test_damaged_index(index, message, model):
    (model / SINGLE).rename(model / "weights.safetensors")
    (model / INDEX).write_text(index)
    refuse(model, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, "'t5' is no decoder that this version of transformers has"),
        ({"model_type": "gpt2"}, "gpt2: the tensors of its layers are not numbered on disk as in memory"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, r"remote code \(auto_map\)"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        ({"num_hidden_layers": 4}, "config.json counts 4 layers, the weights hold 5, numbered up to 4"),
        ({"num_hidden_layers": 6}, "config.json counts 6 layers, the weights hold 5"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, not a count"),
        ({"hidden_size": "large"}, "hidden_size is 'large', not a count"),
        ({"hidden_act": 7}, "is refused by transformers"),
        ({"vocab_size": 500}, "the embedding has 512 rows, config.json says vocab_size 500"),
        (
            {"intermediate_size": 100},
            r"layer 0: mlp\.gate_proj\.weight is \(172, 64\), config\.json makes it \(100, 64\)",
        ),
        ({"hidden_act": "softest"}, "does not load in stock transformers"),
        ({"model_type": "qwen3"}, r"layer 0 lacks self_attn\.q_norm\.weight, which qwen3 needs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_config(fields, message, model):
    edit_config(model, **fields)
    refuse(model, message)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_config_that_is_no_object(text, model):
    (model / "config.json").write_text(text)
    refuse(model, "config.json (is not JSON|holds a JSON list)")


def test_remote_tokenizer_code(model):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    refuse(model, r"tokenizer_config\.json asks for remote code")


def test_layer_without_a_tensor(model):
    edit_weights(model, lambda tensors: tensors.pop("model.layers.2.mlp.down_proj.weight"))
    refuse(model, r"layer 2 lacks mlp\.down_proj\.weight")


def test_unexpected_tensor(model):
    edit_weights(model, lambda tensors: tensors.update(extra=tensors["model.norm.weight"].clone()))
    refuse(model, "does not load cleanly in stock transformers: unexpected_keys: extra")


def test_no_config(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "has no config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_large_models_are_loaded_in_part(family, tiny_model, tmp_path, monkeypatch):
    loaded = []
    load = stock_check.load_stock
    monkeypatch.setattr(stock_check, "STOCK_LOAD_LIMIT", 1000)

    def note(path, **options):
        loaded.append(Checkpoint(path).num_layers)
        return load(path, **options)

    monkeypatch.setattr(stock_check, "load_stock", note)
    admit(tiny_model(family), tmp_path / "in")
    assert loaded in ([2], [3])  # qwen2 starts its sliding windows at layer 2
    assert not list(tmp_path.glob(".probe-*"))


def test_layers_of_a_large_model_that_differ(model):
    edit_weights(model, lambda t: t.update({"model.layers.3.mlp.up_proj.bias": t["model.norm.weight"].clone()}))
    refuse(model, r"layers 0 and 3 are of one kind and differ in mlp\.up_proj\.bias")


def test_an_index_loses_what_is_left_out(model, tmp_path):
    import torch

    head = {"lm_head.weight": load_stock(model).get_input_embeddings().weight.detach().clone()}
    edit_weights(model, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    (model / SINGLE).rename(model / "a.safetensors")
    save_file(head, model / "b.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(read_header(model / "a.safetensors"), "a.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": names | {"lm_head.weight": "b.safetensors"}}))
    metadata = admit(model, tmp_path / "in").metadata
    assert len(metadata["notes"]) == 2 and "b.safetensors" not in metadata["files"]
    assert set(Checkpoint(tmp_path / "in").tensors) == names.keys() - {"model.layers.1.self_attn.rotary_emb.inv_freq"}
    assert load_stock(tmp_path / "in").num_parameters() == metadata["parameters"] == 260_032


def test_defaults_of_the_tied_flag_are_those_of_transformers(tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for family in FAMILIES:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        fields = CONFIG_MAPPING[family].__dataclass_fields__
        assert tied(Checkpoint(tmp_path)) == fields["tie_word_embeddings"].default
