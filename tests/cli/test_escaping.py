"""Text of strangers, everywhere it is shown: it shows, and does nothing."""

from __future__ import annotations

import html.parser
import io
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from compression_dags.cli.lines import configure_logging
from compression_dags.cli.options import emit
from compression_dags.provenance.artifacts import Artifact
from compression_dags.provenance.escaping import (
    html_text,
    line,
    markdown_block,
    markdown_code,
    markdown_line,
    markdown_text,
    visible,
)
from compression_dags.provenance.plots import bars_png, heatmap_png, merge_tree_png, scatter_png
from compression_dags.reports.html import write_report
from compression_dags.reports.model_card import write_card
from compression_dags.reports.scorecard import (
    change_text,
    frame_text,
    leaderboard_frame,
    make_scorecard,
    number_text,
    scoreboard,
)

HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": "'\" onmouseover='alert(1)",
    "entity": "&lt;b&gt; &amp;",
    "markdown": "# h\n- [x](javascript:alert(1)) ![i](http://evil.example/i.png) **b** _c_ ~~d~~ `e` | f",
    "link": "see http://evil.example and WWW.evil.example and mail@evil.example",
    "fence": "```\n# out\n````",
    "front matter": "a\n---\nlicense: mit\n---\n",
    "formula": "$x^{$ and $\\frac{$ and \\$",
    "escapes": "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\x7f",
    "bidi": "\u202egnp.exe\u2066\u2069",
    "separators": "a\u2028b\u2029c\x85d\x00",
    "surrogate": "\ud800",
    "tag": "\U000e0041",
}
every_text = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
DANGEROUS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")
SIZE = {"layers": 4, "parameters": 100, "bytes": 400}

CALIBRATION = {"sequences": 1, "length": 8}


def cards(text: str) -> list[dict]:
    """Of a recipe and a task of that name; pandas and files in UTF-8 hold no lone surrogates, texts in JSON can."""
    prompts, name = [text, "plain"], text.encode(errors="replace").decode()
    scores = {name: {"perplexity@512": 4.0, "acc": 0.2}}
    dense = make_scorecard("baseline", SIZE, SIZE, scores, None, {"prompts": prompts, "texts": [text, text]})
    cut = make_scorecard(name, SIZE, SIZE, scores, dense, {"prompts": prompts, "texts": [text, "x" + text]})
    return [dense, cut]


class Tags(html.parser.HTMLParser):
    """Collects tags and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [tag, *(name for name, _ in attrs)]


@every_text
def test_the_report(text: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("compression_dags.reports.html.scatter_png", lambda *_, **__: b"png")

    def page(words: str) -> str:
        write_report(tmp_path, words, {**SIZE, "architecture": words, "licence": words}, cards(words), {words: b"png"})
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    assert Tags(page(text)).seen == Tags(page("plain")).seen
    assert not DANGEROUS.search(page(text)) and html_text(text) in page(text)


@every_text
def test_the_model_card(text: str, tmp_path: Path):
    base = Artifact("base_model", "f", "d", tmp_path, {**SIZE, "origin": text, "licence": text})
    stages = [{"quantize": {"method": text, "ignore": [text]}}]
    recipe = {"name": text, "description": text, "calibration": CALIBRATION, "stages": stages}
    name = cards(text)[1]["family"]
    rows = pd.DataFrame({"stage": [name], "method": [name], "action": [name]})
    write_card(tmp_path, recipe, text, base, replace(base, kind="w"), {}, cards(text)[1], rows)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert (
        not DANGEROUS.search(card) and "<script" not in body.split("```")[0] and "http://" not in body.split("```")[0]
    )
    assert card.splitlines().count("---") == 2
    front = yaml.safe_load(head)
    assert front["license"] == line(text) and "base_model" not in front
    fence = re.search("^(```+)yaml$", card, re.MULTILINE)
    assert fence
    block, after = card[fence.end() + 1 :].split(f"\n{fence[1]}\n", 1)
    assert yaml.safe_load(block) == {"calibration": CALIBRATION, "stages": stages}
    tables = [row for row in after.splitlines() if row.startswith("|")]
    assert {row.replace(r"\|", "").count("|") for row in tables} == {4, 5}  # no text opens or closes a cell


@pytest.mark.parametrize(
    ("origin", "stages", "named"),
    [
        ("org/name", ["merge"], ("org/name", "finetune")),
        ("org/name", ["merge", "sparsify"], ("org/name", "finetune")),
        ("org/name", ["merge", "quantize"], ("org/name", "quantized")),
        ("SmolLM2-135M-Instruct, Q4_1 de-quantized", [], ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune")),
        ("a-directory", ["quantize"], (None, None)),
        ("/home/me/model", ["quantize"], (None, None)),
        ("./model", [], (None, None)),
        ("org/name/more", [], (None, None)),
    ],
)
def test_the_base_model_is_a_hub_id_or_is_not_named(origin, stages, named, tmp_path: Path):
    base = Artifact("base_model", "f", "d", tmp_path, {**SIZE, "origin": origin})
    recipe = {
        "name": "r",
        "description": "R",
        "calibration": CALIBRATION,
        "stages": [{name: {"method": "m"}} for name in stages],
    }
    none = pd.DataFrame({"stage": [], "method": [], "action": []})
    write_card(tmp_path, recipe, "slug", base, replace(base, kind="w"), {}, cards("t")[1], none)
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("\n---\n")[0])
    assert (front.get("base_model"), front.get("base_model_relation")) == named


@every_text
def test_plots(text: str):
    import numpy as np

    square = np.eye(3)
    assert scatter_png({text: (1.0, 2.0), "b": (0.5, 20.0)}, text, text, baseline=text).startswith(b"\x89PNG")
    if "$" not in text:
        return
    for png in (
        heatmap_png(square, text, text),
        bars_png(np.ones(3), None, text, text),
        merge_tree_png(square, [(range(0, 1), range(1, 2), 0.5)], text, text),
    ):
        assert png.startswith(b"\x89PNG")


@every_text
def test_the_terminal(text: str, capsys):
    shown = [visible(text), line(text), frame_text(leaderboard_frame(cards(text)))]
    shown.append(scoreboard("slug", cards(text), {"baseline": "0/1", cards(text)[1]["family"]: "1/1"}))
    emit({}, False, f"{text} shown")
    shown.append(capsys.readouterr().out)
    assert not any(map(DANGEROUS.search, shown))
    assert "\n" not in line(text) and len(shown[2].splitlines()) == 4
    stream = io.StringIO()
    log = logging.getLogger("compression_dags")
    before, propagates, level = log.handlers[:], log.propagate, log.level
    try:
        configure_logging()
        (handler,) = log.handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(stream)
        log.warning("says %s", text)
    finally:
        log.handlers, log.propagate = before, propagates
        log.setLevel(level)
    assert not DANGEROUS.search(stream.getvalue()) and stream.getvalue().startswith("says ")


@every_text
def test_markdown_of_the_ui(text: str):
    for shown in (markdown_line(text), markdown_text(text), markdown_code(text)):
        assert not DANGEROUS.search(shown)
    assert "\n" not in markdown_line(text)
    escaped = re.sub(r"\\[^\n]", "x", markdown_text(text))
    assert not re.search(r"[<>`*_\[\]|#$~]|://|www\.|(^|\n)\s*[-+]", escaped.replace("&#", ""))
    fence = markdown_block(text, "text").splitlines()[0].removesuffix("text")
    assert markdown_block(text, "text").split("\n").count(fence) == 1


def test_samples_in_the_ui(tmp_path: Path):
    import json

    from compression_dags.evaluation.samples import WRITTEN, as_markdown

    texts = {"prompts": ["a*", "b"], "texts": ["<b>x</b>\n# y", "![i](http://evil.example)"]}
    (tmp_path / WRITTEN).write_text(json.dumps(texts))
    shown = as_markdown(tmp_path)
    assert shown == "**a\\*** &lt;b&gt;x&lt;/b&gt;  \n\\# y\n\n**b** \\!\\[i\\](http&#58;//evil.example)"


def test_what_languages_need_stays():
    for text in ("naïve – “x” 漢字 🙂", "می\u200cخواهم", "שלום\u200f!", "👩\u200d💻", "soft\u00adhyphen"):
        assert visible(text) == line(text) == text
    assert visible("a\tb\nc") == "a\tb\nc" and line("a\tb\nc") == "a b c"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.2, "0.2000"),
        (0.05, "0.0500"),
        (0.0, "0.0000"),
        (-0.0, "0.0000"),
        (1.0, "1.000"),
        (4.9837, "4.984"),
        (9.99961, "10.00"),
        (12.5, "12.50"),
        (104.2345, "104.2"),
        (999.96, "1,000"),
        (81234.4, "81,234"),
        (5e11, "5.000e+11"),
        (2e-5, "2.000e-05"),
        (-2.5, "-2.500"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "-"),
        (None, "-"),
    ],
)
def test_scores(value: float | None, shown: str):
    assert number_text(value) == shown


@pytest.mark.parametrize(
    ("value", "relative", "shown"),
    [
        (1.41, True, "+141 %"),
        (0.9996, True, "+100 %"),
        (0.094, True, "+9.4 %"),
        (812.3, True, "+81,230 %"),
        (-0.00001, True, "0.0 %"),
        (-0.031, True, "-3.1 %"),
        (math.inf, True, "+inf %"),
        (0.02, False, "+0.0200"),
        (-0.00001, False, "0.0000"),
        (math.nan, True, ""),
        (None, False, ""),
    ],
)
def test_changes(value: float | None, relative: bool, shown: str):
    assert change_text(value, relative) == shown


def test_a_number_that_is_none_is_said_in_the_card(tmp_path: Path):
    card = make_scorecard("c", SIZE, SIZE, {"t": {"acc": math.nan, "perplexity": math.inf}}, None)
    base = Artifact("base_model", "f", "d", tmp_path, dict(SIZE))
    none = pd.DataFrame({"stage": [], "method": [], "action": []})
    write_card(
        tmp_path,
        {"name": "r", "description": "R", "calibration": CALIBRATION, "stages": []},
        "s",
        base,
        base,
        {},
        card,
        none,
    )
    text = (tmp_path / "README.md").read_text()
    assert "| t | acc | nan |" in text and "| t | perplexity | inf |" in text
