"""What a config says after a drop: pure dicts, no model."""

from __future__ import annotations

import copy
import math
import sys

import pytest

from compression_dags.architectures.config_rules import (
    LayerFields,
    candidates,
    layer_count,
    merged,
    plain_fields,
    remapped,
)
from compression_dags.errors import InputError

KEPT = [0, 2, 3, 5]


def _config(**more):
    return {"num_hidden_layers": 6, "hidden_size": 64, **more}


def _dropped(config, count="num_hidden_layers", kept=KEPT, path=()):
    before = copy.deepcopy(config)
    new = remapped(config, kept, plain_fields(config, count, path))
    assert config == before
    return new


def test_what_the_class_derives_wins_over_the_file():
    full = {"a": {"list": [1, 0], "kept": 1}, "per_layer_config": {"02": {}}, "none": None}
    stated = {"a": {"list": [], "more": 2}, "per_layer_config": {"2": {}}, "none": 3, "own": 4}
    assert merged(full, stated) == {
        "a": {"list": [1, 0], "kept": 1, "more": 2},
        "per_layer_config": {"02": {}},
        "none": None,
        "own": 4,
    }


def test_only_the_count_changes_in_a_uniform_stack():
    assert _dropped(_config()) == {"num_hidden_layers": 4, "hidden_size": 64}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("layer_types", list("abcdef"), list("acdf")),
        ("no_rope_layers", [1, 1, 0, 1, 1, 0], [1, 0, 1, 0]),
        ("num_attention_heads_per_layer", [4, 8, 4, 8, 4, 8], [4, 4, 8, 8]),
        ("hybrid_override_pattern", "M-M*-M", "MM*M"),
        ("mlp_only_layers", [1, 2, 5], [1, 3]),
        ("mlp_only_layers", [], []),
        ("moe_layers", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
        ("per_layer_config", {"02": {"head_dim": 8}, "04": {"head_dim": 9}}, {"01": {"head_dim": 8}}),
        ("per_layer_config", {"2": {"head_dim": 8}}, {"1": {"head_dim": 8}}),
        ("per_layer_config", {5: {"head_dim": 8}}, {3: {"head_dim": 8}}),
        ("first_k_dense_replace", 2, 1),
        ("first_k_dense_replace", 0, 0),
        ("max_window_layers", 28, 4),
        ("moe_layer_end_index", 4, 2),
        ("moe_layer_end_index", -1, -1),
        ("num_kv_shared_layers", 3, 2),
        ("num_kv_shared_layers", 0, 0),
        ("kv_source_layers", [0, 0, 2, 2, 2, 0], [0, 1, 1, 0]),
        ("kv_source_layers", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
        ("scale_depth", 3.0, 3.0 * math.sqrt(4 / 6)),
        ("block_types", ["r", "r", "a"], ["r", "a", "r", "a"]),
        ("attention_types", [[["global", "local"], 3]], [[["global", "global", "local", "local"], 1]]),
    ],
)
def test_a_field_of_layers_follows_them(name, before, after):
    assert _dropped(_config(**{name: before}))[name] == after


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", [1, 2, 3, 4, 5, 6]),
        ("suppress_tokens", [1, 2, 3]),
        ("architectures", ["A"] * 6),
        ("ssm_multipliers", [1.0] * 6),
        ("time_step_limit", [0.0] * 6),
        ("rope_parameters", {"mrope_section": [1, 2, 3, 4, 5, 6]}),
        ("hidden_act", "silu66"),
        ("num_experts", 6),
        ("num_attention_heads", 6),
        ("layer_types", None),
        ("first_k_dense_replace", None),
    ],
)
def test_a_field_of_no_layers_stays(name, value):
    assert _dropped(_config(**{name: value}))[name] == value


def test_explicit_lists_replace_cadences():
    config = _config(layer_types=list("abcdef"), full_attention_interval=4, _sliding_window_pattern=6)
    assert _dropped(config) == {"num_hidden_layers": 4, "hidden_size": 64, "layer_types": list("acdf")}


def test_a_cadence_without_a_list_stays():
    assert _dropped(_config(sliding_window_pattern=4))["sliding_window_pattern"] == 4


@pytest.mark.parametrize("dense", [[], [5]])
def test_a_sparse_step_becomes_the_list_of_dense_layers(dense):
    new = _dropped(_config(decoder_sparse_step=2, mlp_only_layers=dense))
    assert "decoder_sparse_step" not in new
    assert new["mlp_only_layers"] == ([0, 1, 3] if dense else [0, 1])


@pytest.mark.parametrize(
    ("kept", "period", "offset"), [([0, 1, 3, 4], 2, 1), ([0, 2], 3, 2), ([1, 4], 1, 0), ([0, 1], 2, 1)]
)
def test_a_period_is_solved_for_the_kept_layers(kept, period, offset):
    new = _dropped(_config(attn_layer_period=3, attn_layer_offset=1), kept=kept)
    assert (new["attn_layer_period"], new["attn_layer_offset"]) == (period, offset)


def test_layers_without_a_period_are_refused():
    with pytest.raises(InputError, match="attn_layer_period"):
        _dropped(_config(attn_layer_period=3, attn_layer_offset=1), kept=[1, 4, 0, 2])


def test_a_wrapper_changes_only_its_text_config():
    config = {"vision_config": {"num_hidden_layers": 6}, "text_config": _config(layer_types=list("abcdef"))}
    new = _dropped(config, path=("text_config",))
    assert new["vision_config"] == {"num_hidden_layers": 6}
    assert new["text_config"] == {"num_hidden_layers": 4, "hidden_size": 64, "layer_types": list("acdf")}


def test_two_names_of_the_count_change_together():
    assert _dropped({"n_layer": 6, "num_hidden_layers": 6}, "n_layer") == {"n_layer": 4, "num_hidden_layers": 4}


def test_a_derived_count_follows_the_list():
    config = {"layers_block_type": list("mamoma"), "time_step_limit": [0.0, 1.0]}
    fields = plain_fields(config, "")
    assert layer_count(config, fields) == 6
    new = remapped(config, KEPT, fields)
    assert new == {"layers_block_type": list("mmoa"), "time_step_limit": [0.0, 1.0]}
    assert layer_count(new, fields) == 4


def test_what_no_model_reads_is_left_out():
    config = {"_name_or_path": "x", "text_config": _config(id2label={"0": "a"}, label2id={"a": 0})}
    assert _dropped(config, path=("text_config",)) == {"text_config": _config(num_hidden_layers=4)}


def test_an_order_that_mixes_a_boundary_is_refused():
    with pytest.raises(InputError, match="first_k_dense_replace"):
        _dropped(_config(first_k_dense_replace=2), kept=[3, 0, 1])


def test_a_layer_that_others_read_cannot_go():
    with pytest.raises(InputError, match=r"kv_source_layers.*\[1\]"):
        _dropped(_config(kv_source_layers=[0, 1, 1, 3, 4, 5]))


@pytest.mark.parametrize("kept", [[], [6], [-1]])
def test_layers_that_are_not_there_are_refused(kept):
    with pytest.raises(InputError, match="layers to keep"):
        _dropped(_config(), kept=kept)


def test_a_config_without_layers_is_refused():
    with pytest.raises(InputError, match="num_hidden_layers"):
        plain_fields({}, "num_hidden_layers")
    with pytest.raises(InputError, match="no number of layers"):
        plain_fields({}, "")


def test_candidates_start_plain_and_add_up_to_two_roles():
    config = _config(dense_until=2, shared_start=3, num_experts=4, head_dim=6, hidden_dropout=0.5)
    plain = plain_fields(config, "num_hidden_layers")
    tries = list(candidates(config, plain))
    assert tries[0] == plain == LayerFields("num_hidden_layers")
    assert {n for f in tries for n in (*f.boundaries, *f.tails, *f.lasts)} == {"dense_until", "shared_start"}
    assert max(len(f.names()) for f in tries) == 3
    assert len(set(tries)) == len(tries) == 1 + 6 + 9


def test_candidates_flip_a_list_that_fits_two_roles():
    config = _config(num_hidden_layers=2, no_rope_layers=[0, 1])
    plain, flipped, *_ = candidates(config, plain_fields(config, "num_hidden_layers"))
    assert remapped(config, [1], plain)["no_rope_layers"] == [0]
    assert remapped(config, [1], flipped)["no_rope_layers"] == [1]


def test_the_rules_import_no_model_library():
    assert "transformers" not in vars(sys.modules["compression_dags.architectures.config_rules"])
