"""Scorecards and the leaderboard: size and scores beside the uncompressed model's. Plain JSON and pandas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compression_dags.evaluation.samples import NO_TOKENIZER
from compression_dags.provenance.escaping import line

if TYPE_CHECKING:
    import pandas as pd

#: Task → metric → value.
Scores = dict[str, dict[str, float]]


def make_scorecard(
    family: str,
    weights: dict[str, Any],
    base: dict[str, Any],
    scores: dict[str, dict[str, float]],
    baseline: dict[str, Any] | None,
    samples: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Join the size of a family's weights, its scores and what it writes with the base model's.

    Args:
        samples: `prompts`, and `texts`, a continuation of each (None: the model has no tokenizer).

    Returns:
        `layers`, `parameters`, `bytes`; their ratios to the base; `scores` (task → metric → value); `change`
        (task → metric → relative change for perplexities, difference otherwise); `flat`, one number a metric;
        `samples` as given, with the base model's texts as `base`.
    """
    change = changes(scores, (baseline or {}).get("scores", {}))
    flat = {f"{t}/{m}": v for t, metrics in scores.items() for m, v in metrics.items() if is_headline(m)}
    size = {name: weights[name] for name in ("layers", "parameters", "bytes")}
    ratios = {f"{name}_ratio": size[name] / base[name] for name in size}
    card = {"family": family, **size, **ratios, "scores": scores, "change": change, "flat": flat}
    if samples:
        card["samples"] = {**samples, "base": ((baseline or {}).get("samples") or samples)["texts"]}
    return card


def changes(scores: Scores, dense: Scores) -> Scores:
    """Task → metric → change against the dense model's score: relative of a perplexity, the difference of others."""
    return {
        task: {
            metric: value / dense[task][metric] - 1 if metric.startswith("perplexity") else value - dense[task][metric]
            for metric, value in metrics.items()
            if is_headline(metric) and metric in dense.get(task, {})
        }
        for task, metrics in scores.items()
    }


@dataclass(frozen=True)
class Sample:
    """A prompt and what the base model and the compressed one add to it."""

    prompt: str
    base: str
    this: str


def samples_of(card: dict[str, Any]) -> list[Sample]:
    """What a scorecard says both models write; nothing where there is no tokenizer, or an older card."""
    found = card.get("samples") or {}
    if not found.get("texts") or not found.get("base"):
        return []
    return [Sample(*row) for row in zip(found["prompts"], found["base"], found["texts"], strict=True)]


def samples_note(card: dict[str, Any]) -> str | None:
    """Why there are no samples; None if there are."""
    if "samples" not in card:
        return "nothing was generated"
    return None if samples_of(card) else NO_TOKENIZER


def is_headline(metric: str) -> bool:
    """Whether a metric is a score, rather than a count or a standard error."""
    return metric.startswith("perplexity@") or metric in {"acc", "acc_norm", "exact_match", "f1", "perplexity"}


def standard_error(metric: str, metrics: dict[str, float]) -> float | None:
    """Of a score, over windows or documents; None where it is not known. Of a perplexity, by that of its NLL."""
    name, _, window = metric.partition("@")
    if name == "perplexity" and window:
        found = metrics.get(f"nll_stderr@{window}")
        return None if found is None else found * metrics[metric]
    return metrics.get(f"{metric}_stderr")


def leaderboard_frame(cards: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a family, the baseline first, then by bytes; a column a score, its change and its standard error."""
    # a scoreboard is text that needs no pandas, which takes half a second
    import pandas as pd  # noqa: PLC0415

    return pd.DataFrame(_rows(cards))


def _rows(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for card in cards:
        row = {name: card[name] for name in ("family", "layers", "parameters", "bytes")}
        for task, metrics in sorted(card["scores"].items()):
            for metric in sorted(filter(is_headline, metrics)):
                row[f"{task} {metric}"] = metrics[metric]
                if (error := standard_error(metric, metrics)) is not None:
                    row[f"{task} {metric} error"] = error
                if metric in card["change"].get(task, {}):
                    row[f"{task} {metric} change"] = card["change"][task][metric]
        rows.append(row)
    rows.sort(key=lambda r: (r["family"] != "baseline", -r["bytes"], r["family"]))
    return rows


def scoreboard(model: str, cards: list[dict[str, Any]], hits: dict[str, str]) -> str:
    """The table at the end of a run: size, scores, change against the baseline, cache hits."""
    rows = _rows(cards)
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in names}
    table["cache hits"] = [hits[row["family"]] for row in rows]
    return f"{model}\n{_aligned(table)}"


def frame_text(frame: pd.DataFrame) -> str:
    """A leaderboard as aligned text; standard error and change stand behind a score."""
    return _aligned({name: list(frame[name]) for name in frame.columns})


def _aligned(table: Mapping[str, Sequence[Any]]) -> str:
    columns: list[tuple[str, list[str]]] = []
    for name, held in table.items():
        if name.endswith((" change", " error")):
            continue
        values = [_text(name, v) for v in held]
        if f"{name} error" in table:
            values = [v + _error(e) for v, e in zip(values, table[f"{name} error"], strict=True)]
        if f"{name} change" in table:
            changes = table[f"{name} change"]
            percent = "perplexity" in name
            values = [v + _change(c, percent) for v, c in zip(values, changes, strict=True)]
        columns.append((_heading(name), values))
    widths = [max(len(title), *map(len, values)) for title, values in columns]
    lines = ["  ".join(title.ljust(w) for (title, _), w in zip(columns, widths, strict=True))]
    lines.append("  ".join("-" * w for w in widths))
    for i in range(len(table["family"])):
        cells = [
            values[i].ljust(w) if k == 0 else values[i].rjust(w)
            for k, ((_, values), w) in enumerate(zip(columns, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _heading(name: str) -> str:
    known = {"family": "recipe", "bytes": "MB", "parameters": "M params"}
    return known.get(name, line(name).replace("perplexity", "ppl"))


def _text(name: str, value: Any) -> str:
    if name in {"bytes", "parameters"}:
        return f"{value / 1e6:.2f}"
    return number_text(value) if value is None or isinstance(value, float) else line(value)


def _error(value: float | None) -> str:
    return "" if value is None or value != value else f" ± {value:.2g}"


def _change(value: float | None, percent: bool) -> str:
    return f" ({said})" if (said := change_text(value, percent)) else ""


def number_text(value: float | None, missing: str = "-") -> str:
    """A score as people read it: four digits, no exponent between 0.001 and a billion, `missing` for none or NaN."""
    if value is None or value != value:
        return missing
    size = abs(value)
    if size in (0.0, float("inf")) or 0.001 <= size < 999.95:
        decimals = 1 if size >= 99.995 else 2 if size >= 9.9995 else 3 if size >= 0.99995 else 4
        return _unsigned_zero(f"{value:.{decimals}f}")
    return f"{value:,.0f}" if 999.95 <= size < 1e9 else f"{value:.3e}"


def change_text(value: float | None, relative: bool) -> str:
    """A change with its sign; a relative one in per cent, from 100 % on without decimals. Empty for none or NaN."""
    if value is None or value != value:
        return ""
    if not relative:
        return _unsigned_zero(f"{value:+.4f}")
    if abs(value) == float("inf"):
        return f"{value:+} %"
    return _unsigned_zero(f"{100 * value:+,.{0 if abs(value) >= 0.9995 else 1}f} %")


def _unsigned_zero(text: str) -> str:
    """`-0.0` and `+0.0` are 0.0."""
    return text if re.search("[1-9i]", text) else text.lstrip("+-")
