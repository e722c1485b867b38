"""Small plots as PNG bytes, the same bytes for the same numbers."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from compression_dags.provenance.escaping import plot_text

INK, SOFT, ACCENT, SECOND, LIGHT = "#1f2933", "#9aa5b1", "#2563eb", "#d97706", "#93c5fd"


def _figure(width: float, height: float):
    # reports are declared, and hits said, without matplotlib, which takes half a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _name_axes(axes, x: str, y: str) -> None:
    axes.set(xlabel=plot_text(x), ylabel=plot_text(y))


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def heatmap_png(matrix: np.ndarray, axis: str, label: str) -> bytes:
    """A square matrix; small values dark."""
    figure, axes = _figure(5.6, 4.6)
    image = axes.imshow(matrix, cmap="viridis", origin="upper", interpolation="nearest")
    _name_axes(axes, axis, axis)
    figure.colorbar(image, ax=axes, label=plot_text(label), shrink=0.85)
    return _png(figure)


def merge_tree_png(matrix: np.ndarray, merges: Sequence[tuple[range, range, float]], axis: str, label: str) -> bytes:
    """A square similarity matrix, large values bright, under the tree of its adjacent merges.

    Args:
        merges: of neighbouring groups of indices, in order, each with its similarity, the height of its bracket. A
            merge more similar than an earlier one of its members (a mean can rise) is drawn level with it.
    """
    figure, tree = _figure(5.8, 5.9)
    tree.remove()
    tree, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3.4])
    image = axes.imshow(matrix, cmap="viridis", origin="upper", interpolation="nearest", aspect="auto")
    _name_axes(axes, axis, axis)
    figure.colorbar(image, ax=axes, label=plot_text(label), shrink=0.85)
    # (centre, height) of every group so far, by its first index
    place: dict[int, tuple[float, float | None]] = {i: (float(i), None) for i in range(len(matrix))}
    top = max((value for *_, value in merges), default=1.0)
    heights = [value for *_, value in merges]
    floor = top + 0.05 * (top - min(heights, default=0.0) or 1.0)
    for first, second, value in merges:
        (left, low), (right, lower) = place[first.start], place[second.start]
        starts = [floor if h is None else h for h in (low, lower)]
        height = min(value, *starts)
        tree.plot([left, left, right, right], [starts[0], height, height, starts[1]], color=ACCENT, linewidth=1.1)
        place[first.start] = ((left + right) / 2, height)
    tree.invert_yaxis()
    tree.set_ylabel("merged at")
    tree.spines[["top", "right", "bottom"]].set_visible(False)
    tree.tick_params(axis="x", length=0, labelbottom=False)
    return _png(figure)


def bars_png(values: np.ndarray, errors: np.ndarray | None, axis: str, label: str) -> bytes:
    figure, axes = _figure(6.4, 3.2)
    axes.bar(np.arange(len(values)), values, yerr=errors, color=ACCENT, ecolor=INK, capsize=2)
    _name_axes(axes, axis, label)
    axes.set_xticks(np.arange(0, len(values), max(1, len(values) // 16)))
    return _png(figure)


def sorted_bars_png(
    values: Sequence[float | None], sorts: Sequence[str], colours: Mapping[str, str], axis: str, label: str
) -> bytes:
    """Bars in the colour of their sort, over a strip of the same colours that shows those without a value too.

    Args:
        values: one an index; None where nothing was measured.
        sorts: of each, a key of `colours`.
    """
    figure, axes = _figure(7.2, 3.4)
    axes.bar(np.arange(len(values)), [v or 0.0 for v in values], color=[colours[sort] for sort in sorts])
    for name, colour in colours.items():
        mine = [place for place, sort in enumerate(sorts) if sort == name]
        if mine:
            below = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.scatter(mine, [-0.03] * len(mine), marker="s", s=18, color=colour, label=name, **below)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.tick_params(axis="x", length=0, pad=10)
    axes.set_xticks(np.arange(0, len(values), max(1, len(values) // 16)))
    axes.set(xlabel=plot_text(axis), ylabel=textwrap.fill(plot_text(label), 36))
    figure.legend(loc="outside upper center", ncols=len(colours), frameon=False, fontsize=8)
    return _png(figure)


def scatter_png(points: dict[str, tuple[float, float]], xlabel: str, ylabel: str, baseline: str | None = None) -> bytes:
    """Labelled points; the baseline in another colour. The y axis is logarithmic when it spans a factor of 5."""
    figure, axes = _figure(7.2, 4.2)
    for name, (x, y) in points.items():
        axes.scatter([x], [y], s=46, color=SECOND if name == baseline else ACCENT, zorder=3)
        axes.annotate(plot_text(name), (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8, color=INK)
    ys = [y for _, y in points.values() if y > 0]
    if ys and max(ys) > 5 * min(ys):
        axes.set_yscale("log")
    axes.grid(True, color=SOFT, alpha=0.3)
    axes.margins(x=0.15, y=0.12)
    _name_axes(axes, xlabel, ylabel)
    return _png(figure)
