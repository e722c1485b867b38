"""Names, registry, identity, watching, the hub offline, the GGUF path and the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compression_dags.assets.base_models import import_base_model
from compression_dags.checkpoints import gguf_import, importing
from compression_dags.checkpoints.gate import load_stock, probe_ids
from compression_dags.checkpoints.reader import SINGLE, Checkpoint
from compression_dags.errors import InputError
from compression_dags.provenance.artifacts import file_digest
from compression_dags.provenance.contents import computed_digest
from compression_dags.resources import model_hub, model_imports
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.model_hub import SMOLLM2, ModelHub, ModelSource
from compression_dags.resources.model_imports import check, identity
from models import admit, edit_weights, tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- names -----------------------------------------------------------------------------------------------------------


def test_embedded_models_by_name_and_by_path(hub, stories):
    by_name = hub.resolve("stories260k")
    assert by_name == ModelSource("stories260k", "embedded", str(stories)) == hub.resolve(str(stories))
    assert hub.fetch(by_name, Path("unused")) == stories
    assert by_name.origin == "stories260k"


def test_directories(hub, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("model") == ModelSource("model", "directory", str(model)) == hub.resolve(f"{model}/")
    assert hub.resolve("model", "other.Name_1-b").slug == "other.Name_1-b"


@pytest.mark.parametrize("name", ["a,b", "a b", "-a", ".a", "é", "a/b", "a\n"])
def test_names_that_cannot_be_slugs(name, hub, model):
    with pytest.raises(InputError, match=r"model name .* is not possible; allowed are letters.*--name"):
        hub.resolve(str(model), name)
    if "/" not in name:
        renamed = model.rename(model.parent / name)
        with pytest.raises(InputError, match="--name"):
            hub.resolve(str(renamed))
        assert hub.resolve(str(renamed), "fine").slug == "fine"


def test_hub_ids_become_slugs(hub):
    assert hub.resolve(f"org/name@{COMMIT}") == ModelSource(f"org--name--{COMMIT}", "hub", "org/name", COMMIT)
    assert hub.resolve(f"org/name@{COMMIT}", "mine").slug == "mine"
    with pytest.raises(InputError, match="--name"):
        hub.resolve("org/name@refs/pr/1")


@pytest.mark.parametrize("model", ["no-such-model", "./missing", "/missing/model", "a/b/c", "org/name@", ""])
def test_unknown_models(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"embedded are: novella-13m, stories260k|has no config\.json"):
        hub.resolve(model)


def test_smollm2_is_a_wheel(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SMOLLM2).mkdir()  # a folder of results must not shadow the model
    source = hub.resolve(SMOLLM2)
    assert (source.slug, source.kind) == (SMOLLM2, "wheel")
    assert source.origin == "SmolLM2-135M-Instruct, Q4_1 de-quantized"
    assert identity(hub, source) == {"wheel": model_hub.WHEEL_SHA256, "conversion": gguf_import.CONVERSION}


# --- registry --------------------------------------------------------------------------------------------------------


def test_registry_survives_and_answers(hub, model):
    source = hub.resolve(str(model), "mine")
    hub.register(source)
    hub.register(source)
    again = ModelHub(home=hub.home)
    assert again.registered() == {"mine": source}
    assert again.source("mine") == source == again.resolve("mine")
    assert again.source("novella-13m").kind == "embedded"
    with pytest.raises(InputError, match=r"'other' is not registered; known: mine, novella-13m, smollm2-135m"):
        again.source("other")


def test_a_slug_belongs_to_one_location(hub, model, stories):
    hub.register(ModelSource("mine", "directory", str(model)))
    with pytest.raises(InputError, match=r"'mine' is taken by .*--name"):
        hub.register(ModelSource("mine", "embedded", str(stories)))


def test_an_embedded_model_may_move_with_the_project(hub):
    hub.register(ModelSource("stories260k", "embedded", "/elsewhere/models/stories260k"))
    hub.register(hub.resolve("stories260k"))
    assert hub.source("stories260k") == hub.resolve("stories260k")


def test_a_hub_model_may_move_to_a_newer_commit(hub):
    source = ModelSource("org--name", "hub", "org/name", COMMIT)
    hub.register(source)
    newer = replace(source, revision="f" * 40)
    hub.register(newer)
    assert hub.source("org--name") == newer
    assert identity(hub, newer) != identity(hub, source)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"slug": "a"}}', "\ufeff\x00"])
def test_a_damaged_registry_is_left_out_and_kept(text, hub, stories, caplog):
    registry = Path(hub.home) / "models" / "registry.json"
    registry.parent.mkdir(parents=True)
    registry.write_text(text)
    assert hub.registered() == {} and "registry.json" in caplog.text
    hub.register(hub.resolve("stories260k"))
    assert set(hub.registered()) == {"stories260k"}
    kept = registry.with_name("registry.json.damaged")
    assert kept.exists() or "a" in json.loads(registry.read_text())


def test_an_entry_of_another_version_costs_itself_only(hub, model, caplog):
    hub.register(ModelSource("mine", "directory", str(model)))
    registry = Path(hub.home) / "models" / "registry.json"
    entries = json.loads(registry.read_text())
    later = {"slug": "later", "kind": "s3", "location": "s3://bucket", "revision": None, "region": "x"}
    registry.write_text(json.dumps(entries | {"later": later}))
    assert set(hub.registered()) == {"mine"} and "'later' is left out" in caplog.text
    hub.register(ModelSource("other", "hub", "org/name", COMMIT))
    assert json.loads(registry.read_text())["later"] == later


def test_unwritable_home(tmp_path, stories):
    (tmp_path / "file").write_text("not a folder")
    hub = ModelHub(home=str(tmp_path / "file" / "home"))
    with pytest.raises(InputError, match=r"cannot write below .*--home"):
        hub.register(hub.resolve("stories260k"))


def test_a_directory_that_went_away(hub, model):
    source = hub.resolve(str(model))
    shutil.rmtree(model)
    with pytest.raises(InputError, match="which is gone"):
        hub.fetch(source, model)


# --- identity --------------------------------------------------------------------------------------------------------


def test_identity_reads_unchanged_files_once(hub, model, monkeypatch):
    copies = count_copies(monkeypatch)
    source = hub.resolve(str(model))
    first = identity(hub, source)
    assert first == {name: computed_digest(model / name, file_digest(model / name)) for name in first}
    assert SINGLE in first and "README.md" not in first
    assert identity(ModelHub(home=hub.home), source) == first and len(copies) == 1
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    changed = identity(hub, source)
    assert {name for name in first if changed[name] != first[name]} == {SINGLE} and len(copies) == 2


def count_copies(monkeypatch) -> list[Path]:
    """Weights that are read from now on, one entry an import."""
    copies, copy = [], importing.copy_weights

    def note(plans, directory, progress):
        copies.append(directory)
        return copy(plans, directory, progress)

    monkeypatch.setattr(importing, "copy_weights", note)
    return copies


@pytest.fixture
def store(hub):
    return ArtifactStore(home=hub.home)


def test_weights_are_read_once_for_identity_and_import(hub, store, model, monkeypatch):
    copies = count_copies(monkeypatch)
    produced = import_base_model(store, hub, hub.resolve(str(model)))
    assert not produced.hit and len(copies) == 1
    assert produced.artifact.metadata["files"][SINGLE] == file_digest(model / SINGLE)
    assert hub.registered().keys() == {"model"}
    assert not list((Path(hub.home) / "partial").rglob("*.safetensors"))
    assert import_base_model(store, hub, hub.resolve(str(model))).hit and len(copies) == 1


def test_cards_and_licences_change_nothing(hub, store, model):
    first = import_base_model(store, hub, hub.resolve(str(model)))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "LICENSE").write_text("MIT")
    assert import_base_model(store, hub, hub.resolve(str(model))).artifact == first.artifact


def test_an_edit_in_place_is_seen_whatever_the_clock_says(hub, model):
    source = hub.resolve(str(model))
    first = identity(hub, source)
    before = (model / SINGLE).stat()
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    os.utime(model / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert identity(hub, source) != first


@pytest.mark.parametrize("emptied", [False, True])
def test_a_stored_copy_outlives_its_folder(emptied, hub, store, model, caplog):
    source = hub.resolve(str(model))
    artifact = import_base_model(store, hub, source).artifact
    shutil.rmtree(model)
    if emptied:  # an unmounted disk leaves its mount point
        model.mkdir()
    model_imports._warn_gone.cache_clear()
    held = hub.resolve("model")
    assert import_base_model(store, hub, held).artifact == artifact
    assert import_base_model(store, hub, held).hit
    assert caplog.text.count("is gone; the copy imported from it is used") == 1
    if not emptied:
        assert hub.resolve(str(model)) == source


def test_a_folder_that_is_gone_without_a_stored_copy(hub, store, model):
    artifact = import_base_model(store, hub, hub.resolve(str(model))).artifact
    shutil.rmtree(model)
    shutil.rmtree(artifact.path)
    with pytest.raises(InputError, match="which is gone"):
        import_base_model(store, hub, hub.resolve("model"))


def test_a_wheel_that_was_imported_needs_no_download(wheel, hub, store, tmp_path, monkeypatch):
    artifact = import_base_model(store, hub, hub.resolve(SMOLLM2)).artifact
    shutil.rmtree(hub.folder / "converted")
    shutil.rmtree(hub.folder / "downloads")
    monkeypatch.setattr(model_hub, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert import_base_model(store, hub, hub.resolve(SMOLLM2)).artifact == artifact


@pytest.mark.parametrize("change", ["headers", "values"])
def test_a_refused_model_leaves_no_trace_and_may_come_back(change, hub, store, model, stories):
    if change == "headers":
        (model / SINGLE).write_bytes((model / SINGLE).read_bytes()[:-100])
    else:
        edit_weights(model, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    source = hub.resolve(str(model))
    for _ in range(2):
        with pytest.raises(InputError):
            import_base_model(store, hub, source)
        assert not hub.folder.exists() or not list(hub.folder.glob("*.json"))
        assert not [p for p in Path(hub.home).rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    shutil.copyfile(stories / SINGLE, model / SINGLE)
    assert not import_base_model(store, hub, source).hit
    assert hub.registered() == {"model": source}


def test_check_writes_nothing(hub, model):
    check(hub, hub.resolve(str(model)))
    assert not Path(hub.home).exists()
    hub.register(ModelSource("model", "directory", "/elsewhere"))
    with pytest.raises(InputError, match=r"'model' is taken by /elsewhere"):
        check(hub, hub.resolve(str(model)))


# --- watching --------------------------------------------------------------------------------------------------------


def test_watch_a_folder(hub, model, stories):
    for name in ("b", ".partial"):
        shutil.copytree(stories, model.parent / name)
    (model.parent / "not-a-model").mkdir()
    assert hub.watch(model.parent) == [str(model.parent / "b"), str(model)]


def test_watch_a_list(hub, model, tmp_path):
    listed = tmp_path / "models.txt"
    listed.write_text(f"# bases\n\nnovella-13m  # the small one\n  org/name@{COMMIT}\nmodel\n/a#b\n")
    assert hub.watch(listed) == ["novella-13m", f"org/name@{COMMIT}", str(model), "/a#b"]


def test_watch_nothing(hub, tmp_path):
    with pytest.raises(InputError, match="neither a folder of models nor a text file"):
        hub.watch(tmp_path / "missing")


# --- the hub, offline ------------------------------------------------------------------------------------------------


def test_hub_model_that_is_not_cached(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"org/name cannot be fetched and is not cached: HF_HUB_OFFLINE is set"):
        hub.resolve("org/name")


def test_hub_model_from_the_cache(hub, stories, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--org--name"
    shutil.copytree(stories, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    source = hub.resolve("org/name")
    assert source == ModelSource("org--name", "hub", "org/name", COMMIT)
    assert identity(hub, source) == {"repository": "org/name", "commit": COMMIT}
    assert admit(hub.fetch(source, tmp_path / "scratch"), tmp_path / "in").metadata["layers"] == 5


def test_registered_hub_model_keeps_its_pin_offline(hub):
    hub.register(ModelSource("org--name", "hub", "org/name", COMMIT))
    assert hub.resolve("org/name").revision == COMMIT


def test_hub_that_does_not_answer(hub, monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("unreachable")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    hub.register(ModelSource("org--name", "hub", "org/name", COMMIT))
    assert hub.resolve("org/name").revision == COMMIT
    with pytest.raises(InputError, match=r"does not answer \(ConnectionError\)"):
        hub.resolve("org/other")


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_pair(tmp_path_factory, novella) -> tuple[Path, Path]:
    """(a tiny float16 Llama with novella's tokenizer, the same model as llama.cpp would write it)."""
    folder = tmp_path_factory.mktemp("gguf")
    stock = tiny("llama", folder / "stock", layers=2, dtype="float16", vocab_size=4096, tie_word_embeddings=True)
    shutil.copyfile(novella / "tokenizer.json", stock / "tokenizer.json")
    write_gguf(stock, folder / "model.gguf")
    return stock, folder / "model.gguf"


def write_gguf(stock: Path, file: Path) -> None:
    import gguf

    checkpoint = Checkpoint(stock)
    config = checkpoint.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    bpe = json.loads((stock / "tokenizer.json").read_text())
    tokens = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    special = {token["content"] for token in bpe["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {**gguf_import._OUTER, **{f"blk.{i}.{k}": f"model.layers.{i}.{v}" for i in range(2) for k, v in _layer()}}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for theirs, ours in names.items():
        if f"{ours}.weight" in checkpoint.tensors:
            values = checkpoint.tensor(f"{ours}.weight").numpy()
            if count := heads.get(theirs.rpartition(".")[2]):
                values = permute(values, count)
            # llama.cpp keeps vectors in float32
            writer.add_tensor(f"{theirs}.weight", values.astype(np.float32) if values.ndim == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layer():
    return gguf_import._LAYER.items()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def test_unpermute_undoes_llama_cpp():
    weight = np.arange(12 * 5, dtype=np.float32).reshape(12, 5)
    for heads in (1, 2, 3):
        assert np.array_equal(gguf_import.unpermute(permute(weight, heads), heads), weight)
    assert not np.array_equal(permute(weight, 2), weight)


def test_gguf_round_trip(gguf_pair, novella, tmp_path):
    import torch
    from transformers import AutoTokenizer

    stock, file = gguf_pair
    gguf_import.convert_smollm2(file, tmp_path / "converted")
    metadata = admit(tmp_path / "converted", tmp_path / "in").metadata
    assert (metadata["layers"], metadata["dtype"], metadata["tied_embeddings"]) == (2, "float16", True)
    assert metadata["licence"] == "apache-2.0"
    before, after = load_stock(stock), load_stock(tmp_path / "in")
    ids = probe_ids(4096, 256)
    with torch.inference_mode():
        assert torch.equal(before(ids).logits, after(ids).logits)
    ours, original = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "in", novella))
    for text in ("Once upon a time", "In 1984, 12,345 items", "naïve café 日本語 🙂", "  a\n\n\tb "):
        assert ours(text).input_ids == original(text, add_special_tokens=False).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert json.loads((tmp_path / "in" / "config.json").read_text())["rms_norm_eps"] == before.config.rms_norm_eps


def test_quantized_gguf_tensors_are_dequantized():
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_1
    values = (np.arange(128, dtype=np.float32).reshape(2, 64) % 16) / 8 - 1  # on a 4-bit grid of step 1/8
    tensor = type("T", (), {"name": "blk.0.ffn_up.weight", "data": gguf.quantize(values, kind), "tensor_type": kind})
    reader = type("R", (), {"tensors": [tensor], "fields": {}})
    heads = type("M", (), {"heads": (2, 1)})
    ((name, read),) = gguf_import._tensors(reader, heads, gguf.dequantize)
    assert (name, read.dtype) == ("model.layers.0.mlp.up_proj.weight", np.float16)
    assert np.allclose(read, values, atol=1e-3)


def test_broken_gguf(tmp_path, gguf_pair):
    (tmp_path / "a.gguf").write_bytes(b"no gguf at all, but long enough to be read")
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        gguf_import.convert_smollm2(tmp_path / "a.gguf", tmp_path / "out")
    (tmp_path / "b.gguf").write_bytes(gguf_pair[1].read_bytes()[:-4096])
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        gguf_import.convert_smollm2(tmp_path / "b.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_tensor_without_counterpart():
    with pytest.raises(InputError, match=r"'blk\.0\.attn_q\.bias' has no counterpart"):
        gguf_import._rename("blk.0.attn_q.bias")
    assert gguf_import._rename("rope_freqs.weight") is None


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(gguf_pair, tmp_path, monkeypatch) -> Path:
    """A small wheel of the same layout, and a pip that downloads it."""
    built = tmp_path / "built.whl"
    with zipfile.ZipFile(built, "w") as archive:
        archive.write(gguf_pair[1], model_hub._GGUF_MEMBER)
    monkeypatch.setattr(model_hub, "WHEEL_SHA256", model_hub.file_digest(built))
    monkeypatch.setattr(
        model_hub, "_pip_download", lambda _, folder: shutil.copyfile(built, Path(folder) / model_hub._WHEEL_FILE)
    )
    return built


def test_wheel_is_downloaded_and_converted_once(wheel, hub, tmp_path, monkeypatch):
    source = hub.resolve(SMOLLM2)
    converted = hub.fetch(source, tmp_path / "scratch")
    assert admit(converted, tmp_path / "in").metadata["layers"] == 2
    assert [p.name for p in converted.parent.iterdir()] == [converted.name]
    assert not any(p.is_file() for p in (tmp_path / "scratch").rglob("*"))
    monkeypatch.setattr(model_hub, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert hub.fetch(source, tmp_path / "scratch") == converted
    shutil.rmtree(converted)
    assert hub.fetch(source, tmp_path / "scratch") == converted


def test_wheel_with_other_bytes(wheel, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(model_hub, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"has sha256 .*, expected 0000"):
        hub.fetch(hub.resolve(SMOLLM2), tmp_path / "scratch")
    assert not list((Path(hub.home) / "models").rglob("*.whl"))


def test_failing_download_says_why(hub, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"could not be downloaded with pip: ERROR: No matching distribution"):
        hub.fetch(hub.resolve(SMOLLM2), tmp_path / "scratch")
