"""The HTML report of one base model: one self-contained file with tables and plots."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from compression_dags.provenance.escaping import html_text
from compression_dags.provenance.plots import scatter_png
from compression_dags.recipes import BASELINE
from compression_dags.reports.scorecard import (
    Sample,
    change_text,
    is_headline,
    leaderboard_frame,
    number_text,
    samples_note,
    samples_of,
)

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:1100px;margin:2.5rem auto;padding:0 1.5rem}
h1{font-size:1.7rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;display:block;overflow-x:auto}
th,td{padding:.35rem .8rem;text-align:right;border-bottom:1px solid #e4e7eb;white-space:nowrap}
th:first-child,td:first-child,.samples th{text-align:left} th{background:#f5f7fa} tr.baseline td{background:#fff7e6}
.worse{color:#b91c1c} .better{color:#047857} .soft{color:#616e7c} img{max-width:100%}
td.text{white-space:pre-wrap;text-align:left;vertical-align:top;min-width:16rem} summary{cursor:pointer}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}
"""


def write_report(
    directory: Path,
    model: str,
    base: dict[str, Any],
    cards: list[dict[str, Any]],
    similarity_plots: dict[str, bytes],
) -> None:
    """Write `report.html`, and `scores.png` (score against ratio) when something was scored."""
    plots = score_plots(cards)
    for name, png in plots.items():
        if name == next(iter(plots)):
            (directory / "scores.png").write_bytes(png)
    facts = f"{html_text(base['architecture'])}, {base['layers']} layers, {base['parameters'] / 1e6:.2f} M parameters"
    licence = html_text(base.get("licence") or "not stated")
    parts = [
        f"<h1>{html_text(model)}</h1><p class=soft>{facts}; licence {licence}</p>",
        "<h2>Recipes against the uncompressed model</h2>",
        _table(cards),
        "<h2>Scores against size</h2><div class=plots>",
        *(_image(name, png) for name, png in plots.items()),
        "</div><h2>What they write</h2>",
        "<p class=soft>Greedy continuations of fixed prompts; grey as far as both models agree.</p>",
        *(_samples(card) for card in cards if card["family"] != BASELINE),
        "<h2>Similarity of layers</h2><div class=plots>",
        *(_image(name, png) for name, png in similarity_plots.items()),
        "</div>",
    ]
    page = f"<!doctype html><meta charset=utf-8><title>{html_text(model)}</title><style>{STYLE}</style>"
    (directory / "report.html").write_text(page + "\n".join(parts) + "\n", encoding="utf-8")


def score_plots(cards: list[dict[str, Any]]) -> dict[str, bytes]:
    """One plot a headline metric: score against the ratio of bytes, the baseline marked."""
    metrics = sorted({(t, m) for card in cards for t, ms in card["scores"].items() for m in ms if is_headline(m)})
    plots = {}
    for task, metric in metrics:
        points = {
            card["family"]: (card["bytes_ratio"], card["scores"][task][metric])
            for card in cards
            if metric in card["scores"].get(task, {})
        }
        plots[f"{task}: {metric}"] = scatter_png(
            points, "weights, ratio to the base model's bytes", f"{task} {metric}", baseline="baseline"
        )
    return plots


def _samples(card: dict[str, Any]) -> str:
    """One recipe's continuations beside the base model's."""
    title = f"<summary>{html_text(card['family'])}</summary>"
    if note := samples_note(card):
        return f"<details>{title}<p class=soft>{html_text(note)}</p></details>"
    head = "<tr><th>prompt</th><th>base model</th><th>this recipe</th></tr>"
    rows = "".join(_sample_row(sample) for sample in samples_of(card))
    return f"<details open>{title}<table class=samples>{head}{rows}</table></details>"


def _sample_row(sample: Sample) -> str:
    pairs = enumerate(zip(sample.base, sample.this, strict=False))
    agreed = next((i for i, (a, b) in pairs if a != b), min(len(sample.base), len(sample.this)))
    cells = "".join(
        f"<td class=text><span class=soft>{html_text(text[:agreed])}</span>{html_text(text[agreed:])}</td>"
        for text in (sample.base, sample.this)
    )
    return f"<tr><td class=text>{html_text(sample.prompt)}</td>{cells}</tr>"


def _table(cards: list[dict[str, Any]]) -> str:
    frame = leaderboard_frame(cards)
    shown = [c for c in frame.columns if not c.endswith((" change", " error"))]
    head = "".join(f"<th>{html_text(c)}</th>" for c in ("recipe", *shown[1:]))
    rows = []
    for record in frame.to_dict("records"):
        cells = "".join(f"<td>{_cell(record, c)}</td>" for c in shown)
        mark = " class=baseline" if record["family"] == "baseline" else ""
        rows.append(f"<tr{mark}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cell(record: dict[Any, Any], column: str) -> str:
    value = record[column]
    if isinstance(value, str):
        return html_text(value)
    if not isinstance(value, float) and value is not None:
        return f"{value:,}"
    text, change = number_text(value, missing="–"), record.get(f"{column} change")
    perplexity = "perplexity" in column
    if not (said := change_text(change, perplexity)):
        return text
    kind = "soft" if not change else "worse" if (change > 0) == perplexity else "better"
    return f"{text} <span class={kind}>({said})</span>"


def _image(caption: str, png: bytes) -> str:
    text, data = html_text(caption), base64.b64encode(png).decode()
    picture = f"<img alt='{text}' src='data:image/png;base64,{data}'>"
    return f"<figure>{picture}<figcaption class=soft>{text}</figcaption></figure>"
