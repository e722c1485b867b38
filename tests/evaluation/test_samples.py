"""What models write: greedy whatever the checkpoint's generation config says, and shown side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from compression_dags.checkpoints.gate import load_stock
from compression_dags.evaluation.samples import NEW_TOKENS, NO_TOKENIZER, PROMPTS, continuations, has_tokenizer
from compression_dags.provenance.artifacts import Artifact
from compression_dags.reports.html import write_report
from compression_dags.reports.model_card import write_card
from compression_dags.reports.scorecard import Sample, make_scorecard, samples_note, samples_of

SIZE = {"layers": 2, "parameters": 10, "bytes": 20}
NASTY = "a | b\n<script>*_`x`_* [y](z)"


@pytest.fixture(scope="module")
def loaded(stories: Path):
    from transformers import AutoTokenizer

    return load_stock(stories), AutoTokenizer.from_pretrained(stories)


def greedy(model, tokenizer, prompt: str, tokens: int) -> str:
    """The whole model at every step, no cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = tokenizer.decode(ids[0], skip_special_tokens=True)
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0], skip_special_tokens=True)[len(start) :]


def test_the_likeliest_token_each_time(loaded):
    found = continuations(*loaded)
    assert found == [greedy(*loaded, prompt, NEW_TOKENS) for prompt in PROMPTS] == continuations(*loaded)
    assert found[0].startswith(",") and all(len(text) > 20 for text in found)


def test_the_checkpoint_s_sampling_does_not_count(loaded):
    from transformers import GenerationConfig

    model, tokenizer = loaded
    plain = continuations(model, tokenizer)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=1.8, min_new_tokens=3, eos_token_id=2)
    before, model.generation_config = model.generation_config, own
    try:
        assert continuations(model, tokenizer) == plain
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_it_ends_where_the_context_or_the_text_ends(loaded):
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    fill = "and " * context
    ids = tokenizer(fill)["input_ids"]
    almost = tokenizer.decode(ids[: context - 4], skip_special_tokens=True)
    (found,) = continuations(model, tokenizer, [almost])
    assert 0 < len(tokenizer(found, add_special_tokens=False)["input_ids"]) <= 6
    assert continuations(model, tokenizer, [fill]) == [""]
    assert continuations(model, tokenizer, [PROMPTS[0]], new_tokens=1) == [","]


def test_tokenizers_are_found_by_their_files(stories: Path, tmp_path: Path):
    assert has_tokenizer(stories) and not has_tokenizer(tmp_path)


# -- on the way to the reader ------------------------------------------------------------------------------------------


def cards(texts: list[str] | None) -> list[dict]:
    prompts = ["once", "twice"]
    base = {"prompts": prompts, "texts": None if texts is None else [" upon a time", NASTY]}
    dense = make_scorecard("baseline", SIZE, SIZE, {}, None, base)
    return [dense, make_scorecard("cut", SIZE, SIZE, {}, dense, {"prompts": prompts, "texts": texts})]


def test_a_scorecard_holds_both_texts():
    dense, card = cards([" upon a hill", "x"])
    assert samples_of(card) == [Sample("once", " upon a time", " upon a hill"), Sample("twice", NASTY, "x")]
    assert [s.base == s.this for s in samples_of(dense)] == [True, True]
    assert samples_note(card) is None


def test_without_a_tokenizer_the_cards_say_so(tmp_path):
    dense, card = cards(None)
    assert samples_of(card) == [] and samples_note(card) == samples_note(dense) == NO_TOKENIZER
    assert NO_TOKENIZER in report(tmp_path, [dense, card])
    assert f"Samples: {NO_TOKENIZER}." in model_card(tmp_path, card)


def test_cards_of_before_are_readable(tmp_path):
    old = make_scorecard("cut", SIZE, SIZE, {}, None)
    assert samples_of(old) == [] and samples_note(old) == "nothing was generated"
    assert "nothing was generated" in report(tmp_path, [old])


def report(directory: Path, found: list[dict]) -> str:
    write_report(directory, "a model", {**SIZE, "architecture": "llama"}, found, {})
    return (directory / "report.html").read_text()


def model_card(directory: Path, card: dict) -> str:
    base = Artifact("base_model", "f", "d", directory, {**SIZE, "origin": "a/model"})
    recipe = {
        "name": "cut",
        "description": "Cut",
        "calibration": {"sequences": 1, "length": 8},
        "stages": [{"merge": {"method": "reverse"}}],
    }
    nothing = pd.DataFrame({"stage": [], "method": [], "action": []})
    write_card(directory, recipe, "a", base, replace(base, kind="merged_weights"), {}, card, nothing)
    assert json.loads((directory / "compression.json").read_text())["samples"] == card["samples"]
    return (directory / "README.md").read_text()


def test_the_report_shows_them_side_by_side(tmp_path):
    html = report(tmp_path, cards([" upon a hill", "x"]))
    assert html.count("<summary>") == 1 and "<summary>cut</summary>" in html
    base, this = "<span class=soft> upon a </span>time</td>", "<span class=soft> upon a </span>hill</td>"
    assert html.index(base) < html.index(this)
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_the_model_card_shows_them_side_by_side(tmp_path):
    text = model_card(tmp_path, cards([" upon a hill", "x"])[1])
    assert "| once | upon a time | upon a hill |" in text
    assert r"| twice | a \| b &lt;script&gt;\*\_\`x\`\_\* \[y\](z) | x |" in text
