"""The model card and `compression.json` of an exported checkpoint; every number is read from artifacts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from compression_dags.checkpoints.gguf_import import HUB_ID, NAME
from compression_dags.provenance.artifacts import METADATA, Artifact, describe_files
from compression_dags.provenance.escaping import line, markdown_block, markdown_line
from compression_dags.reports.scorecard import change_text, is_headline, number_text, samples_note, samples_of
from compression_dags.sparsity.masks import MASKS, settle_masks

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


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
    origin = {key: base.metadata.get(key) for key in ("origin", "revision")}
    record = {
        "base_model": {"slug": slug, "digest": base.digest, **origin},
        "recipe": recipe,
        "weights": {"fingerprint": weights.fingerprint, "digest": weights.digest, METADATA: weights.metadata},
        "scores": card["scores"],
        "samples": card.get("samples"),
        "change": card["change"],
        "lineage": lineage,
        "files": describe_files(directory),
    }
    (directory / "compression.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    zeros = weights.metadata.get("sparsity") if masked else None
    (directory / "README.md").write_text(_readme(recipe, slug, base, card, decisions, zeros), encoding="utf-8")


def _readme(
    recipe: dict[str, Any],
    slug: str,
    base: Artifact,
    card: dict[str, Any],
    decisions: pd.DataFrame,
    zeros: float | None,
) -> str:
    sizes = [
        f"| {name} | {base.metadata[name]:,} | {card[name]:,} | {card[f'{name}_ratio']:.4f} |"
        for name in ("layers", "parameters", "bytes")
    ]
    scores = [
        f"| {markdown_line(task)} | {markdown_line(metric)} | {_number(value)} | {_change(card, task, metric)} |"
        for task, metrics in card["scores"].items()
        for metric, value in metrics.items()
        if is_headline(metric)
    ]
    counts = Counter(zip(decisions["stage"], decisions["method"], decisions["action"], strict=True))
    rows = [f"| {' | '.join(map(markdown_line, names))} | {n} |" for names, n in counts.items()]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front(recipe, base), sort_keys=False).strip(),
            "---",
            f"# {markdown_line(slug)}, {markdown_line(recipe['name'])}",
            "",
            f"{markdown_line(recipe['description']).rstrip('.')}. Made by compression_dags; loads in transformers.",
            "",
            *_on_zeros(zeros),
            markdown_block(yaml.safe_dump(_as_run(recipe), sort_keys=False).strip(), "yaml"),
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


def _as_run(recipe: dict[str, Any]) -> dict[str, Any]:
    """Size of the calibration set and stages: what a recipe file would say, but for places on a machine."""
    calibration = {name: recipe["calibration"][name] for name in ("sequences", "length")}
    return {"calibration": calibration, "stages": recipe["stages"]}


def _front(recipe: dict[str, Any], base: Artifact) -> dict[str, Any]:
    """The card's metadata. The hub knows a base model by its id, so a local one is not named.

    Of the hub's four relations (adapter, finetune, merge, quantized), `merge` is of several models into one. A model
    that lost layers or weights is a finetune of one.
    """
    stages = [(name, options) for stage in recipe["stages"] for name, options in stage.items()]
    relation = "quantized" if any(name == "quantize" for name, _ in stages) else "finetune"
    origin, licence = str(base.metadata.get("origin") or ""), base.metadata.get("licence")
    origin = HUB_ID if origin == NAME else origin
    return {
        **({"base_model": origin, "base_model_relation": relation} if _HUB_ID.fullmatch(origin) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"license": line(licence)} if licence else {}),
        "tags": ["compression-dags", *(line(f"{name}-{options['method']}") for name, options in stages)],
    }


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
    rows = [f"| {' | '.join(map(markdown_line, (s.prompt, s.base, s.this)))} |" for s in samples_of(card)]
    head = ["Greedy continuations of fixed prompts:", "", "| prompt | base | this |", "| --- | --- | --- |"]
    return [*head, *rows, ""]


def _number(value: float) -> str:
    return number_text(value, missing="nan")


def _change(card: dict[str, Any], task: str, metric: str) -> str:
    return change_text(card["change"].get(task, {}).get(metric), metric.startswith("perplexity"))
