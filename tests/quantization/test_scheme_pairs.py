"""All pairs of schemes that a recipe can combine: transformers reloads them, or they are refused before compute."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.planning.options import CandidateOptions
from compression_dags.quantization.formats import Choice, Scheme
from compression_dags.quantization.rtn import RTN
from compression_dags.quantization.schemes import rebuilds_while_loading

FORMS: dict[str, dict[str, Any]] = {
    **{name: {"scheme": name} for name in get_args(Scheme)},
    "W8A16/64": {"scheme": "W8A16", "group_size": 64},
    "W4A16/32": {"scheme": "W4A16", "group_size": 32},
    "W8A16 asymmetric": {"scheme": "W8A16", "symmetric": False},
    "W4A16 asymmetric": {"scheme": "W4A16", "symmetric": False},
}
#: Forms that stock transformers reads only while it rebuilds the whole model by one scheme.
ALONE = {"NVFP4A16", "MXFP4A16", "W8A16 asymmetric", "W4A16 asymmetric"}
PAIRS = list(itertools.combinations(FORMS, 2))
SHARING = [form for form in FORMS if form not in ALONE]
SCHEME_PAIRS = list(itertools.combinations(get_args(Scheme), 2))
needs_rebuilding = pytest.mark.skipif(not rebuilds_while_loading(), reason="loads FP4 in bfloat16 only")


def rtn(form: str, **more: Any) -> RTN:
    return RTN.model_validate(FORMS[form] | more)


def tiny_llama(directory: Path, width: int, layers: int = 1) -> Checkpoint:
    """128 wide, its MLP `width` wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 128, "intermediate_size": width, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=64, max_position_embeddings=64)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return Checkpoint(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made: dict[int, Checkpoint] = {}

    def make(width: int) -> Checkpoint:
        if width not in made:
            made[width] = tiny_llama(tmp_path_factory.mktemp(f"wide{width}"), width)
        return made[width]

    return make


def reload(stage: RTN, source: Checkpoint, directory: Path):
    stage.check(source.shape)
    made = stage.quantize(source, directory)
    gate = check_reload(directory, stage.reference_logits(source, rounding=made.rounding))
    assert gate["relative_logit_error"] == 0.0
    return made


def pair(first: str, second: str) -> RTN:
    return rtn(first, overrides={"model.layers.0.mlp.down_proj": FORMS[second]})


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=map(" + ".join, PAIRS))
def test_a_pair_is_refused_by_name_if_one_must_be_alone(first: str, second: str, model):
    shape = model(128).shape
    if not {first, second} & ALONE:
        pair(first, second).check(shape)
        return
    with pytest.raises(InputError, match="must be rebuilt while loading") as refused:
        pair(first, second).check(shape)
    assert {"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"} <= set(
        re.split("[: ]", str(refused.value))
    )


@pytest.mark.parametrize(("first", "second"), [("W8A16/64", "W4A16/32"), ("FP8_DYNAMIC", "FP8_BLOCK")])
def test_two_schemes_of_one_format_reload(first: str, second: str, model, tmp_path):
    assert len(set(reload(pair(first, second), model(128), tmp_path).rounding.choices.values())) == 2


def test_all_that_may_share_a_checkpoint_reload_from_one(tmp_path):
    source = tiny_llama(tmp_path / "dense", 128, layers=len(SHARING) // 2)
    own = {f"re:model.layers.{i // 2}[.]{'ms'[i % 2]}": FORMS[form] for i, form in enumerate(SHARING)}
    made = reload(rtn("W8A16", overrides=own), source, tmp_path / "made")
    assert len(set(made.rounding.choices.values())) == len(SHARING)


@needs_rebuilding
@pytest.mark.parametrize(
    ("form", "width"),
    [("W4A16", 172), ("W4A16", 96), ("W4A8", 172), ("FP8_BLOCK", 172), ("NVFP4A16", 172), ("MXFP4A16", 172)],
)
def test_a_form_and_its_fallback_reload(form: str, width: int, model, tmp_path):
    """172 is no multiple of 8, 96 one of 32 but not of 128."""
    made = reload(rtn(form), model(width), tmp_path)
    down = next(d for d in made.decisions if d.target.endswith("down_proj"))
    assert down.evidence["asked"].endswith("which does not divide")
    assert (down.action == "keep") == (form in ALONE)
    with pytest.raises(InputError, match=f"down_proj: group size .* does not divide its {width} inputs"):
        rtn(form, fallback="refuse", ignore=("lm_head", "re:.*(attn|gate|up)")).check(model(width).shape)


def test_zero_points_get_one_group_size_for_all_matrices(model, tmp_path):
    made = reload(rtn("W4A16 asymmetric"), model(96), tmp_path)
    assert set(made.rounding.choices.values()) == {Choice("W4A16", 32, False)} and len(made.rounding.choices) == 7
    query = next(d for d in made.decisions if d.target.endswith("q_proj"))
    assert query.evidence["asked"] == "W4A16, group size 128, which does not divide other matrices' inputs"


def test_zero_points_where_no_group_fits(model, tmp_path):
    """No group of 16 or more divides 172, and 8 bits a row would be a second scheme: the matrix stays as it is."""
    made = reload(rtn("W4A16 asymmetric", group_size=64), model(172), tmp_path)
    assert {c.group_size for c in made.rounding.choices.values()} == {64} and len(made.rounding.choices) == 6


def test_part_of_a_group_may_be_ignored(model, tmp_path):
    ignore = ("lm_head", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj")
    made = reload(rtn("W4A16 asymmetric", ignore=ignore), model(172), tmp_path)
    assert not set(ignore) & set(made.rounding.choices)


def test_a_scheme_that_fits_nothing(model):
    shape = model(172).shape
    with pytest.raises(InputError, match=r"FP4A16 fits no matrix of the model, whose inputs are: .*mlp_output 172"):
        rtn("NVFP4A16", ignore=("lm_head", "re:.*(attn|gate|up)")).check(shape)
    with pytest.raises(InputError, match="the head is never quantized"):
        rtn("W8A16", overrides={"lm_head": {"scheme": "W4A16"}}).check(shape)


@pytest.mark.parametrize(("first", "second"), SCHEME_PAIRS, ids=map(" + ".join, SCHEME_PAIRS))
def test_pairs_of_candidates(first: str, second: str):
    """A plan of mixed schemes is refused where it is written, not after the measuring."""
    mixed = {"scheme": first, "bits": 6, "candidates": (second,)}
    planned = {"schemes": (first, second), "quantizer": {"method": "rtn"}}
    if {first, second} & ALONE:
        for refuse, options in ((RTN, mixed), (CandidateOptions, planned)):
            with pytest.raises(ValidationError, match="must be rebuilt while loading"):
                refuse.model_validate(options)
    else:
        assert RTN.model_validate(mixed) and CandidateOptions.model_validate(planned)
