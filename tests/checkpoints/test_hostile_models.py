"""Model directories made by an enemy, or by a broken download: one line each, and nothing is read or kept."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from compression_dags.checkpoints import stock_check
from compression_dags.checkpoints.headers import read_header, read_object
from compression_dags.checkpoints.importing import check_headers
from compression_dags.checkpoints.licence import read_licence
from compression_dags.checkpoints.reader import INDEX, SINGLE, Checkpoint
from compression_dags.errors import InputError
from models import admit, edit_config, edit_weights, refuse

# --- headers of a safetensors file ----------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors({"a": entry()}, bytes(16), length=2**63), "is not a whole safetensors file"),
        (safetensors({"a": entry(shape=(2, 3))}, bytes(16)), r"is F32 of shape \[2, 3\], which is not 16 bytes"),
        (safetensors({"a": entry(shape=(2**40, 2**40))}, bytes(16)), "which is not 16 bytes"),
        (safetensors({"a": entry(shape=(-2, -2))}, bytes(16)), r"has shape \[-2, -2\]"),
        (safetensors({"a": entry(shape=(2.0, 2))}, bytes(16)), r"has shape \[2\.0, 2\]"),
        (safetensors({"a": entry(shape=(True, 4))}, bytes(16)), r"has shape \[True, 4\]"),
        (safetensors({"a": entry(shape=[1] * 1000)}, bytes(16)), "has shape"),
        (safetensors({"a": entry(dtype="F99")}, bytes(16)), "is of type 'F99'"),
        (safetensors({"a": entry(dtype=["F32"])}, bytes(16)), "is of type"),
        (safetensors({"a": entry(offsets=(16, 0))}, bytes(16)), "which is not -16 bytes"),
        (safetensors({"a": entry(offsets=(-16, 0))}, bytes(16)), "has data_offsets"),
        (safetensors({"a": entry(offsets=(0, 16, 32))}, bytes(16)), "has data_offsets"),
        (safetensors({"a": entry(), "b": entry()}, bytes(32)), "'b' overlaps another one"),
        (safetensors({"a": entry(), "b": entry(offsets=(24, 40))}, bytes(40)), "'b' leaves a gap"),
        (safetensors({"a": entry(offsets=(8, 24))}, bytes(24)), "'a' leaves a gap"),
        (safetensors({"a": entry()}, bytes(17)), "is truncated or padded"),
        (safetensors(b'{"a": 1, "a": 2}'), "key 'a' stands twice"),
        (safetensors(b'{"a": ' + b"[" * 100_000 + b"}"), "unreadable safetensors header"),
        (safetensors('{"é": 1}'.encode("latin-1")), "unreadable safetensors header"),
        (safetensors({"a": None}), "unreadable safetensors header"),
        (safetensors({"a": {"dtype": "F32"}}), "unreadable safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is not a whole safetensors file"),
    ],
    ids=range(22),
)
def test_header(content, message, tmp_path):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_header(tmp_path / SINGLE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_absurd_header_is_not_read(tmp_path):
    with (tmp_path / SINGLE).open("wb") as handle:
        handle.write(struct.pack("<Q", 40 * 10**9))
        handle.truncate(8 + 41 * 10**9)  # sparse: takes no space
    with pytest.raises(InputError, match="40000000000 bytes, allowed are 100000000"):
        read_header(tmp_path / SINGLE)


# --- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is beyond float64"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        ('{"é": 1}'.encode("latin-1"), "is not UTF-8"),
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
def test_json(name, content, message, model):
    (model / name).write_bytes(content)
    if name == INDEX:
        (model / SINGLE).unlink()
    with pytest.raises(InputError, match=message) as caught:
        check_headers(model)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_file_that_may_not_be_read(model, monkeypatch):
    def deny(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(InputError, match=r"config\.json cannot be read: Permission denied"):
        read_object(model / "config.json")


# --- config ---------------------------------------------------------------------------------------------------------

SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size",
         "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip


ABSURD = (0, -1, 10**9, 10**30, True, 5.0, "5", [5])


@pytest.mark.parametrize(
    ("name", "value"),
    # a context of 10⁹ is no fault: it costs nothing
    [(n, v) for n in SIZES for v in ABSURD if (n, v) != ("max_position_embeddings", 10**9)],
    ids=repr,
)
def test_absurd_sizes(name, value, model):
    edit_config(model, **{name: value})
    with pytest.raises(InputError) as caught:
        check_headers(model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, a count from 2"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, a number above 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', allowed are true and false"),
        ({"tie_word_embeddings": False}, r"there is no lm_head\.weight, but tie_word_embeddings is false"),
        ({"dtype": "load"}, "dtype is 'load', allowed are float32"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"dtype": {"": "float16"}}, "dtype is"),
        ({"model_type": ["llama"]}, "model_type is .*not a name"),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Evil"}}}, r"remote code \(auto_map\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"quantized already \(compressed-tensors\)"),
        ({"per_layer_config": [{}]}, "refused by transformers|per_layer_config is set"),
        ({"num_hidden_layers": 1_000_000_000}, "config.json counts 1000000000 layers, the weights hold 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config(fields, message, model):
    edit_config(model, **fields)
    with pytest.raises(InputError, match=message) as caught:
        check_headers(model)
    assert "\n" not in str(caught.value)


STEERING = {
    "_name_or_path": "/home/somebody/models/base",
    "attn_implementation": "org/kernel",
    "_attn_implementation": "org/kernel@main:attend",
    "experts_implementation": "grouped_mm",
    "use_kernels": True,
    "kernel_config": {"a": "org/kernel"},
    "fusion_config": {"a": 1},
    "transformers_weights": "other.safetensors",
    "trust_remote_code": True,
    "num_labels": 10**9,
    "return_dict": False,
    "output_attentions": True,
    "attribute_map": {"hidden_size": "evil"},
    "base_model_tp_plan": {"layers.*": "colwise"},
    "to_dict": "gone",
    "get_text_config": 1,
    "_commit_hash": "0" * 40,
}


def test_fields_that_steer_loading_are_left_out(model, tmp_path):
    edit_config(model, **STEERING, rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "cache_dir": "/x"})
    options = json.loads((model / "tokenizer_config.json").read_text())
    away = {"name_or_path": "/home/x", "tokenizer_file": "/etc/tokenizer.json", "fast_tokenizer_files": ["../t.json"]}
    (model / "tokenizer_config.json").write_text(json.dumps(options | away))
    metadata = admit(model, tmp_path / "in").metadata
    kept = json.loads((tmp_path / "in" / "config.json").read_text())
    assert not kept.keys() & STEERING.keys() and "cache_dir" not in kept["rope_parameters"]
    assert json.loads((tmp_path / "in" / "tokenizer_config.json").read_text()) == options
    notes = "\n".join(metadata["notes"])
    assert all(name in notes for name in (*STEERING, "fast_tokenizer_files"))
    assert (tmp_path / "in" / SINGLE).read_bytes() == (model / SINGLE).read_bytes()


def test_an_adapter_is_refused(model):
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    refuse(model, r"adapter \(adapter_config\.json\)")


# --- entries of the directory ---------------------------------------------------------------------------------------


def link(where: str, target: str):
    return lambda model: os.symlink(target, model / where)


def swap(name: str, make):
    def change(model: Path) -> None:
        (model / name).rename(model.parent / name)
        make(model / name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link("notes.txt", "/etc/passwd"), r"notes\.txt is a link to /etc/passwd, outside"),
        (link("LICENSE", "../secret"), "LICENSE is a link to .*secret, outside"),
        (link("README.md", "../secret"), r"README\.md is a link"),
        (link("more", "/etc"), "more is a link to /etc, outside"),
        (link("x.json", "/nowhere/at/all"), r"x\.json is a link that leads nowhere"),
        (link("loop.txt", "loop.txt"), r"loop\.txt is a link that leads nowhere"),
        (link("null", "/dev/null"), "null is a link to /dev/null"),
        (swap("tokenizer.json", lambda p: p.symlink_to(p.parent.parent / p.name)), r"tokenizer\.json is a link"),
        (swap(SINGLE, lambda p: p.symlink_to(p.parent.parent / p.name)), r"model\.safetensors is a link"),
        (swap("tokenizer.json", os.mkfifo), r"tokenizer\.json is a pipe, socket or device"),
        (lambda model: os.mkfifo(model / "README.md"), r"README\.md is a pipe"),
        (lambda model: os.mkfifo(model / INDEX), "is a pipe"),
        (swap("generation_config.json", os.mkdir), r"generation_config\.json is a directory"),
        (lambda model: (model / INDEX).mkdir(), r"index\.json is a directory"),
        (swap("config.json", os.mkdir), "is a directory"),
        (swap("config.json", os.mkfifo), "is a pipe"),
    ],
    ids=range(16),
)
def test_entries(change, message, model):
    (model.parent / "secret").write_text("secret")
    change(model)
    refuse(model, message)


def test_links_inside_the_directory_and_hidden_ones(model, tmp_path):
    (model / "weights").mkdir()
    (model / SINGLE).rename(model / "weights" / "a")
    (model / SINGLE).symlink_to("weights/a")
    (model / ".cache").symlink_to("/etc")
    admit(model, tmp_path / "in")
    assert not (tmp_path / "in" / SINGLE).is_symlink()


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_a_hub_cache(shared, stories, tmp_path):
    cache = tmp_path / "hub"
    snapshot, blobs = cache / "models--org--name" / "snapshots" / "main", cache / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(stories.iterdir())):
        name = f"{number:064x}"
        if shared:
            (cache / "blobs" / name[:2]).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, cache / "blobs" / name[:2] / name)
            (blobs / name).symlink_to(f"../../blobs/{name[:2]}/{name}")
        else:
            shutil.copyfile(path, blobs / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    check_headers(snapshot)
    (cache / "models--org--name" / "secret").write_text("x")
    (snapshot / "x.txt").symlink_to("../../secret")
    with pytest.raises(InputError, match=r"x\.txt is a link"):
        check_headers(snapshot)


# --- cards ----------------------------------------------------------------------------------------------------------


def bomb() -> str:
    rows = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    return "---\na0: &a0 [x, x]\n" + "\n".join(rows) + "\nlicense: mit\n---\n"


@pytest.mark.parametrize(
    ("card", "licence", "note"),
    [
        (bomb(), None, "anchors or aliases"),
        ("---" + "\n" * 200_000, None, "above 100000 bytes"),
        ("---\n" + "a: " * 50_000, None, "above 100000 bytes"),
        ("---\nlicense: " + "[" * 40_000 + "\n---\n", None, "is ignored"),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---\n", None, "is ignored"),
        ("---\nlicense: {a: b}\n---\n", None, None),
        ("---\nlicense: 7\n---\n", None, None),
        ("---\nlicense: |\n  a\n  b\n---\n", "a b", None),
        (f"---\nlicense: {'x' * 5000}\n---\n", "x" * 100, None),
        ("---\r\nlicense: mit\r\n---\r\n", "mit", None),
    ],
    ids=range(10),
)
def test_cards(card, licence, note, tmp_path):
    (tmp_path / "README.md").write_text(card, newline="")
    found, why = read_licence(tmp_path)
    assert found == licence and (note in why if note else why is None)


# --- weights and tokenizers -----------------------------------------------------------------------------------------


def test_whole_numbers_for_weights(model):
    import torch

    edit_weights(model, lambda t: t.update({k: torch.ones(v.shape, dtype=torch.int32) for k, v in t.items()}))
    refuse(model, "is stored as I32; float32, float16 and bfloat16 are allowed")


@pytest.mark.parametrize("text", ['{"eos_token_id": "two"', "[]", '{"max_new_tokens": -5}', "\0"])
def test_damaged_generation_config(text, model):
    (model / "generation_config.json").write_text(text)
    refuse(model, r"generation_config\.json")


def test_weights_that_do_not_compute(model):
    edit_weights(model, lambda t: t["model.norm.weight"].fill_(3e38))
    refuse(model, "computes logits that are not finite")


def test_a_float16_model_is_not_refused_for_its_range(model, tmp_path, monkeypatch):
    """Its last norm leaves float16's range; in bfloat16, as in float32, it computes."""
    monkeypatch.setattr(stock_check, "_TINY", 0)
    edit_config(model, dtype="float16")
    edit_weights(model, lambda t: t.update({k: v.half() for k, v in t.items()}))
    edit_weights(model, lambda t: t["model.norm.weight"].fill_(60000))
    assert admit(model, tmp_path / "in").metadata["dtype"] == "float16"


def test_stored_buffers_are_left_out(model, tmp_path):
    import torch

    from compression_dags.checkpoints.gate import load_stock

    before = (model / SINGLE).read_bytes()
    odd = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(5)}
    edit_weights(model, lambda t: t.update(odd, **{"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)}))
    metadata = admit(model, tmp_path / "in").metadata
    assert metadata["parameters"] == sum(p.numel() for p in load_stock(tmp_path / "in").parameters())
    assert "6 stored buffers are left out" in metadata["notes"][0]
    assert len((tmp_path / "in" / SINGLE).read_bytes()) <= len(before) + 8
    assert not Checkpoint(tmp_path / "in").tensors.keys() & odd.keys()


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored(equal, model, tmp_path):
    edit_weights(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + (0 if equal else 1)}))
    if not equal:
        refuse(model, r"lm_head\.weight differs from the embedding, but tie_word_embeddings is true")
        return
    metadata = admit(model, tmp_path / "in").metadata
    assert "lm_head.weight is left out" in metadata["notes"][0] and metadata["parameters"] == 260_032


def add_tokens(model: Path, special: bool, first: int = 512) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    tokenizer["added_tokens"].append({"id": first, "content": "<image_soft_token>", **shape})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_an_added_special_token_past_the_embedding(model, tmp_path):
    add_tokens(model, special=True)
    notes = admit(model, tmp_path / "in").metadata["notes"]
    assert notes == ["the tokenizer has 1 added special tokens past the embedding's 512 rows: <image_soft_token>"]


def test_an_ordinary_token_past_the_embedding(model):
    add_tokens(model, special=False)
    refuse(model, "highest id is 512, the embedding has 512 rows")


# --- the command line -----------------------------------------------------------------------------------------------


def missing_shard(model: Path) -> None:
    tensors = Checkpoint(model).tensors
    (model / SINGLE).rename(model / "model-00001-of-00002.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    placed = {name: files[name.startswith("model.layers.4")] for name in tensors}
    (model / INDEX).write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize("verb", [["models", "add"], ["run", "-r", "reverse-20", "-m"], ["plan", "--bits", "5", "-m"]])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing_shard, "names model-00002-of-00002.safetensors, which is missing"),
        (lambda model: edit_config(model, num_hidden_layers=10**9), "counts 1000000000 layers"),
        (link("notes.txt", "/etc/passwd"), "notes.txt is a link"),
    ],
    ids=["shard", "layers", "link"],
)
def test_one_line_and_no_trace(verb, change, message, model, tmp_path):
    from compression_dags.cli.main import main

    change(model)
    done = CliRunner().invoke(main, [*verb, str(model), "--home", str(tmp_path / "home")])
    assert done.exit_code == 2 and message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file()]
