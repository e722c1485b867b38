"""The model card and `compression.json` of an exported checkpoint; every number is read from artifacts."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from compression_dags.evaluation.scorecard import is_headline, samples_note, samples_of
from compression_dags.provenance.artifacts import Artifact, describe_files
from compression_dags.sparsity.masks import MASKS, settle_masks


def write_card(
    directory: Path,
    recipe: dict[str, Any],
    slug: str,
    base: Artifact,
    weights: Artifact,
    lineage: dict[str, dict[str, Any]],
    card: dict[str, Any],
    decisions: pd.DataFrame,
) -> None:
    """Write `README.md` and `compression.json` beside the weights in `directory`."""
    masked = settle_masks(directory)
    record = {
        "base_model": {"slug": slug, "digest": base.digest, **{k: base.facts.get(k) for k in ("origin", "revision")}},
        "recipe": recipe,
        "weights": {"fingerprint": weights.fingerprint, "digest": weights.digest, "facts": weights.facts},
        "scores": card["scores"],
        "samples": card.get("samples"),
        "change": card["change"],
        "lineage": lineage,
        "files": describe_files(directory),
    }
    (directory / "compression.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    zeros = weights.facts.get("sparsity") if masked else None
    (directory / "README.md").write_text(_readme(recipe, slug, base, card, decisions, zeros), encoding="utf-8")


def _readme(
    recipe: dict[str, Any],
    slug: str,
    base: Artifact,
    card: dict[str, Any],
    decisions: pd.DataFrame,
    zeros: float | None,
) -> str:
    stages = {name for stage in recipe["stages"] for name in stage}
    kind = "quantized" if "quantize" in stages else "merge" if "merge" in stages else "finetune"
    front = {
        "base_model": base.facts.get("origin") if "/" in str(base.facts.get("origin")) else slug,
        "base_model_relation": kind,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"license": base.facts["licence"]} if base.facts.get("licence") else {}),
        "tags": ["compression-dags", *(f"{s}-{o['method']}" for e in recipe["stages"] for s, o in e.items())],
    }
    if str(front["base_model"]).startswith(("/", ".")):
        front["base_model"] = slug  # a path of the machine that made it says nothing to a reader
    sizes = [
        f"| {name} | {base.facts[name]:,} | {card[name]:,} | {card[f'{name}_ratio']:.4f} |"
        for name in ("layers", "parameters", "bytes")
    ]
    scores = [
        f"| {task} | {metric} | {value:.5g} | {_change(card, task, metric)} |"
        for task, metrics in card["scores"].items()
        for metric, value in metrics.items()
        if is_headline(metric)
    ]
    counts = Counter(zip(decisions["stage"], decisions["method"], decisions["action"], strict=True))
    rows = [f"| {stage} | {method} | {action} | {n} |" for (stage, method, action), n in counts.items()]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {slug}, {recipe['name']}",
            "",
            f"{recipe['description']}. Made by compression_dags; loads in stock transformers.",
            "",
            *_on_zeros(zeros),
            "```yaml",
            yaml.safe_dump({"stages": recipe["stages"]}, sort_keys=False).strip(),
            "```",
            "",
            "| | base | this | ratio |",
            "| --- | --- | --- | --- |",
            *sizes,
            "",
            "| task | metric | score | change |",
            "| --- | --- | --- | --- |",
            *scores,
            "",
            *_on_samples(card),
            "Decisions (every one with its evidence is in the ledger; lineage in `compression.json`):",
            "",
            "| stage | method | action | count |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _on_zeros(share: float | None) -> list[str]:
    if share is None:
        return []
    return [
        f"{share:.2%} of the projections' weights are zero. Zeros are stored like other values, so the checkpoint is "
        f"neither smaller nor faster by itself; `{MASKS}` says where they are, one bit a weight.",
        "",
    ]


def _on_samples(card: dict[str, Any]) -> list[str]:
    """What both models write, side by side."""
    if note := samples_note(card):
        return [f"Samples: {note}.", ""]
    rows = [f"| {' | '.join(map(_cell, (s.prompt, s.base, s.this)))} |" for s in samples_of(card)]
    head = ["Greedy continuations of fixed prompts:", "", "| prompt | base | this |", "| --- | --- | --- |"]
    return [*head, *rows, ""]


def _cell(text: str) -> str:
    """Text that no Markdown or HTML in it can turn into something else, on one line."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _change(card: dict[str, Any], task: str, metric: str) -> str:
    value = card["change"].get(task, {}).get(metric)
    if value is None:
        return ""
    return f"{value:+.2%}" if metric.startswith("perplexity") else f"{value:+.4f}"
