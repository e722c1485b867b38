"""Dropping layers by tensor names and config alone equals deleting the layer objects of the loaded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compression_dags.architectures import KNOWN, architecture_of
from compression_dags.checkpoints.gate import check_reload, load_stock, probe_ids
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.writer import unchanged, write_checkpoint
from compression_dags.errors import InputError
from models import FAMILIES

KEPT = [0, 2, 3]


def drop_by_name(source: Path, directory: Path, kept: list[int]) -> Path:
    """Write the checkpoint that keeps `kept` layers, touching only names and the config."""
    checkpoint = Checkpoint(source)
    architecture = checkpoint.architecture
    tensors = {name: unchanged(checkpoint, name) for name in checkpoint.outside_layers()}
    for new, old in enumerate(kept):
        for local, name in checkpoint.layer(old).items():
            renamed = architecture.layer_prefix(new) + local
            tensors[renamed] = unchanged(checkpoint, name, renamed)
    write_checkpoint(directory, checkpoint, architecture.remap_config(checkpoint.config, kept), tensors)
    return directory


def logits_after_deletion(source: Path, kept: list[int]):
    """Logits (2, 48, 512) float32 of the loaded model with its other layer objects deleted."""
    import torch

    model = load_stock(source)
    stack = model.get_submodule(KNOWN[model.config.model_type].stack)
    stack.layers = torch.nn.ModuleList(stack.layers[i] for i in kept)
    for index, layer in enumerate(stack.layers):
        layer.self_attn.layer_idx = index
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    with torch.inference_mode():
        return model(probe_ids(model.config.vocab_size, 256)).logits


def rewrite_config(source: Path, directory: Path, *, remove: tuple[str, ...] = (), **fields) -> Path:
    """A copy of a model whose config.json lacks some fields and sets others."""
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in remove} | fields
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("kept", [KEPT, [0, 1, 3], [3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_drop_by_name_equals_deleting_layers(family, kept, tiny_model, tmp_path):
    reference = logits_after_deletion(tiny_model(family), kept)
    report = check_reload(drop_by_name(tiny_model(family), tmp_path / "dropped", kept), reference)
    assert report["relative_logit_error"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kept_layers_matter(family, tiny_model, tmp_path):
    """The zero error above means something only if other layers give other logits."""
    from compression_dags.errors import IntegrityError

    reference = logits_after_deletion(tiny_model(family), [0, 1, 3])
    with pytest.raises(IntegrityError, match="differ"):
        dropped = drop_by_name(tiny_model(family), tmp_path / "dropped", [2, 1, 3] if family == "qwen3_moe" else KEPT)
        check_reload(dropped, reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_and_norm_exists(family, tiny_model):
    checkpoint = Checkpoint(tiny_model(family))
    architecture = checkpoint.architecture
    for index in range(checkpoint.num_layers):
        local = checkpoint.layer(index)
        sparse = architecture.is_sparse_layer(checkpoint.config, index)
        wanted = [p for p in architecture.projections() if not (sparse and p.startswith("mlp."))]
        assert {f"{name}.weight" for name in (*wanted, *architecture.norms)} <= set(local)
        if sparse:
            experts = architecture.experts
            assert {f"{experts.disk_block}.experts.3.{n}.weight" for n in (experts.gate, experts.up, experts.down)} <= {
                *local
            }


def test_moe_cadence_becomes_an_explicit_list(tiny_model, tmp_path):
    source = tiny_model("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)
    checkpoint = Checkpoint(source)
    assert [checkpoint.shape.kind(i)[1] for i in range(4)] == ["dense", "experts", "dense", "experts"]
    dropped = drop_by_name(source, tmp_path / "dropped", [0, 1, 3])
    config = json.loads((dropped / "config.json").read_text())
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [0])
    assert check_reload(dropped, logits_after_deletion(source, [0, 1, 3]))["relative_logit_error"] == 0.0


def test_moe_dense_layers_are_renumbered(tiny_model):
    checkpoint = Checkpoint(tiny_model("qwen3_moe"))
    remap = checkpoint.architecture.remap_config
    assert remap(checkpoint.config, [0, 1, 3])["mlp_only_layers"] == [1]
    assert remap(checkpoint.config, [1, 2, 3])["mlp_only_layers"] == [0]
    assert remap(checkpoint.config, KEPT)["mlp_only_layers"] == []


@pytest.mark.parametrize(
    ("family", "remove", "fields"),
    [
        ("llama", ("rope_parameters", "dtype", "head_dim"), {"rope_theta": 5000.0, "torch_dtype": "float32"}),
        ("qwen2", ("rope_parameters", "layer_types"), {"rope_theta": 5000.0}),
        ("gemma3_text", ("rope_parameters", "layer_types"),
         {"rope_theta": 1e6, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 2}),
    ],
)  # fmt: skip
def test_configs_of_older_transformers(family, remove, fields, tiny_model, tmp_path):
    """Fields that transformers now derives, or spells differently, survive a drop."""
    source = rewrite_config(tiny_model(family), tmp_path / "old", remove=remove, **fields)
    reference = logits_after_deletion(source, KEPT)
    dropped = drop_by_name(source, tmp_path / "dropped", KEPT)
    assert check_reload(dropped, reference)["relative_logit_error"] == 0.0


def test_a_second_drop_composes(tiny_model, tmp_path):
    once = drop_by_name(tiny_model("qwen3"), tmp_path / "once", KEPT)
    twice = drop_by_name(once, tmp_path / "twice", [0, 2])
    assert check_reload(twice, logits_after_deletion(tiny_model("qwen3"), [0, 3]))["relative_logit_error"] == 0.0


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'gpt2' is not known; known are: gemma3_text, llama, .*qwen3_moe"):
        architecture_of({"model_type": "gpt2"})


def test_post_norm_opt_is_refused():
    with pytest.raises(InputError, match="do_layer_norm_before"):
        architecture_of({"model_type": "opt", "do_layer_norm_before": False})


def test_unknown_per_layer_list_is_refused():
    config = {"model_type": "llama", "num_hidden_layers": 4, "layer_scales": [1.0, 2.0, 3.0, 4.0]}
    with pytest.raises(InputError, match="'layer_scales' has one entry a layer"):
        KNOWN["llama"].remap_config(config, KEPT)


def test_per_layer_config_is_refused():
    with pytest.raises(InputError, match="per_layer_config"):
        KNOWN["llama"].remap_config({"num_hidden_layers": 4, "per_layer_config": {"0": {}}}, KEPT)


def test_remap_leaves_its_input_alone(tiny_model):
    config = Checkpoint(tiny_model("gemma3_text")).config
    before = json.dumps(config, sort_keys=True, default=str)
    KNOWN["gemma3_text"].remap_config(config, KEPT)
    assert json.dumps(config, sort_keys=True, default=str) == before


def test_tensor_names_split_by_layer():
    split = KNOWN["opt"].split_name
    assert split("model.decoder.layers.11.fc1.weight") == (11, "fc1.weight")
    assert split("model.decoder.embed_tokens.weight") == (None, "model.decoder.embed_tokens.weight")
