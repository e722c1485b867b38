"""Draws size against perplexity of SmolLM2-135M from the table in a log page, as the README shows it.

    python benchmarks/plot_front.py --out docs/images/smollm2-front.svg

The log's first table has the columns model, MB, perplexity. Names that begin with `planned` are the planner's. The
same table gives the same bytes: the file holds no date, and its identifiers are seeded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "docs" / "log" / "smollm2-2026-11.md"
#: Kind of model → colour and marker.
KINDS = {
    "dense": ("#444444", "*"),
    "quantized": ("#1f77b4", "o"),
    "planned": ("#2ca02c", "D"),
    "layers cut": ("#bbbbbb", "v"),
    "cut and distilled": ("#d62728", "^"),
}


def read_table(page: Path) -> list[tuple[str, float, float]]:
    """Model, MB and perplexity of each row of a page's first table."""
    rows = [line.strip("| \n").split("|") for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return [(name.strip(), float(size), float(score)) for name, size, score, *_ in rows[2:]]


def kind_of(name: str) -> str:
    """The key of `KINDS` that a model belongs to."""
    if "cut" in name:
        return "cut and distilled" if "distilled" in name else "layers cut"
    return "dense" if name == "dense" else "planned" if name.startswith("planned") else "quantized"


def draw(rows: list[tuple[str, float, float]], out: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "smollm2", "svg.fonttype": "none", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for kind, (colour, marker) in KINDS.items():
        points = [(size, score) for name, size, score in rows if kind_of(name) == kind]
        if points:
            axes.scatter(
                *zip(*points, strict=True), c=colour, marker=marker, s=110 if kind == "dense" else 60, label=kind
            )
    for name, size, score in rows:
        short = name.removeprefix("planned, ").replace(", distilled", "")
        axes.annotate(short, (size, score), xytext=(7, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="MB of all tensors", ylabel="perplexity, WikiText-2 validation", title="SmolLM2-135M")
    axes.set_xlim(90, 300)
    axes.set_ylim(21, 43)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center")
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "smollm2-front.svg")
    args = parser.parse_args()
    draw(read_table(args.log), args.out)


if __name__ == "__main__":
    main()
