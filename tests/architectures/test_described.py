"""Descriptions of discovered models: kept beside the weights, cut with the layers, never taken from a stranger."""

import json
import shutil

import pytest
from any_models import tiny_any

from compression_dags.architectures.described import from_json, to_json
from compression_dags.architectures.uniformity import unlike_llama
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint, description_file
from compression_dags.cli.inspect import inspect_model
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.methods.reverse import Reverse
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.errors import InputError
from models import admit, refuse


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """An imported model of two kinds of layers, with experts that are one tensor a matrix on disk."""
    folder = tmp_path_factory.mktemp("hybrid")
    admit(tiny_any("qwen3_next", folder / "source"), folder / "imported")
    return Checkpoint(folder / "imported")


def kept_layers(source: Checkpoint, *kept: int) -> MergePlan:
    return MergePlan("reverse", source.num_layers, tuple(PlannedLayer((index,)) for index in kept))


def test_the_description_is_read_as_it_was_written(hybrid):
    text = description_file(hybrid.path).read_text()
    assert from_json(text) == hybrid.architecture and to_json(from_json(text)) == text
    kinds = {hybrid.shape.kind(index) for index in range(4)}
    assert kinds == {("linear_attention", "experts"), ("full_attention", "experts")}
    assert hybrid.architecture.experts is not None
    assert unlike_llama(hybrid.shape) == "some layers are mixtures of experts"
    assert hybrid.architecture.residual_writer is None


def test_a_cut_model_has_the_description_of_its_layers(hybrid, tmp_path):
    plan = kept_layers(hybrid, 0, 2, 3)
    cut = apply_plan(hybrid, plan, tmp_path / "cut")
    assert check_reload(cut.path, reference_logits(hybrid, plan))["gate"] == "passed"
    whole = hybrid.architecture
    assert Checkpoint(cut.path).architecture.kind_of == tuple(whole.kind_of[index] for index in (0, 2, 3))
    description_file(cut.path).unlink()  # what tracing finds of the cut model is the same
    traced = Checkpoint(cut.path)
    assert [traced.shape.kind(index) for index in range(3)] == [hybrid.shape.kind(index) for index in (0, 2, 3)]


def test_without_a_layer_that_attends_no_text_could_be_generated(hybrid, tmp_path):
    mixing = [index for index in range(4) if hybrid.shape.kind(index)[0] == "linear_attention"]
    with pytest.raises(InputError, match="are the only ones of qwen3_next that attend"):
        apply_plan(hybrid, kept_layers(hybrid, *mixing), tmp_path / "cut")


def test_a_stranger_s_description_is_not_read(hybrid, tmp_path):
    source = shutil.copytree(hybrid.path, tmp_path / "model")
    description_file(source).write_text(json.dumps({"model_type": "other"}))
    (source / "architecture.json").write_text("{}")
    admit(source, tmp_path / "imported")
    assert Checkpoint(tmp_path / "imported").architecture == hybrid.architecture
    with pytest.raises(InputError, match="description of the architecture cannot be read"):
        from_json(description_file(source).read_text())
    # in a home it would be of another version of this project
    assert Checkpoint(source).architecture == hybrid.architecture


def test_blocks_by_layer_go_with_their_layers(tmp_path):
    admit(tiny_any("gemma4_text", tmp_path / "source"), tmp_path / "imported")
    source = Checkpoint(tmp_path / "imported")
    plan = kept_layers(source, 0, 2, 3)
    cut = apply_plan(source, plan, tmp_path / "cut")
    assert check_reload(cut.path, reference_logits(source, plan))["gate"] == "passed"
    name = next(n for n in source.tensors if "per_layer" in n and n in source.outside_layers())
    assert cut.tensors[name].numel * 4 == source.tensors[name].numel * 3


def test_a_model_that_reads_later_tokens_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=512
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_any("gpt2", tmp_path / "other") / name, tmp_path / "bert" / name)
    refuse(tmp_path / "bert", "reads later tokens too")


def test_layers_that_share_matrices_are_not_cut(tmp_path):
    admit(tiny_any("zamba2", tmp_path / "source"), tmp_path / "imported")
    with pytest.raises(InputError, match="merge: reverse does not fit zamba2: several layers use"):
        Reverse(layers=1).check(Checkpoint(tmp_path / "imported").shape)


@pytest.mark.parametrize(
    ("family", "path", "count"),
    [
        ("gpt2", (), "n_layer"),
        ("gemma3", ("vision_config",), "num_hidden_layers"),
        ("qwen2_5_vl", ("vision_config",), "depth"),
        ("qwen3_next", (), "num_experts"),
    ],
)
def test_counts_that_the_weights_have_no_room_for_are_refused(tmp_path, family, path, count):
    """Before a trace: it would make that many modules."""
    source = tiny_any(family, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    part = config
    for key in path:
        part = part[key]
    assert count in part
    part[count] = 10**7
    (source / "config.json").write_text(json.dumps(config))
    refuse(source, rf"config.json counts 10000000 \({count}\), the weights have room for")


def test_a_config_that_steers_loading_steers_no_trace(tmp_path):
    """Kernels of a hub repository are code: neither the import nor `models inspect` may ask for them."""
    source = tiny_any("gpt_neox", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attn_implementation": "org/kernel"}))
    found = inspect_model(tmp_path / "home", str(source))
    assert found.kinds[0].attends and not (tmp_path / "home").exists()
    admit(source, tmp_path / "imported")
    assert "attn_implementation" not in (tmp_path / "imported" / "config.json").read_text()
