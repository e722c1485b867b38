"""The `models inspect` verb: what tracing finds of a model, before anything is computed or stored."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compression_dags.architectures.decoder import Discovered, LayerKind


def inspect_model(home: Path, model: str) -> Discovered:
    """The architecture of a base model by its config alone; weights are not read.

    Raises:
        InputError: no model, remote code, or a config that transformers cannot build or run.
    """
    from compression_dags.architectures.discovery import discover
    from compression_dags.checkpoints.gate import quiet
    from compression_dags.checkpoints.headers import read_object
    from compression_dags.checkpoints.stated_config import check_code, stock_config
    from compression_dags.resources.model_hub import ModelHub

    hub = ModelHub(home=str(home))
    with tempfile.TemporaryDirectory() as scratch:
        file = hub.fetch(hub.resolve(model), Path(scratch)) / "config.json"
        raw = read_object(file)
        check_code(raw, file)
        with quiet():
            return discover(stock_config(raw, file))


def text(found: Discovered) -> str:
    """A paragraph a kind of layer: its matrices by common input, what writes the residual stream, what is refused."""
    count, kinds = len(found.kind_of), len(found.kinds)
    head = "the embedding" if found.head == found.embedding else found.head
    lines = [
        f"{found.model_type}: {count} layers of {kinds} kind{'s' if kinds > 1 else ''} under {found.layers}",
        f"embedding {found.embedding}, head {head}, last norm {found.final_norm or 'none'}",
    ]
    for number, kind in enumerate(found.kinds):
        where = [index for index, other in enumerate(found.kind_of) if other == number]
        lines += ["", f"{kind.attention}, {kind.feed_forward}: {spans(where)}", *_kind_lines(kind)]
    return "\n".join(lines)


def _kind_lines(kind: LayerKind) -> list[str]:
    shapes, norms = dict(kind.shapes), dict(kind.input_norms)
    lines = []
    for group in kind.groups:
        members = [f"{p} {_shape(shapes.get(f'{p}.weight'))}" for p in group.projections]
        after = f" after {norms[group.name]}" if group.name in norms else ""
        lines.append(f"  {group.name}{after}: {', '.join(members)}")
    for name in kind.experts:
        lines.append(f"  experts: {name} {_shape(shapes.get(name))}")
    lines += [f"  router: {name} {_shape(shapes.get(f'{name}.weight'))}" for name in kind.routers]
    lines.append(f"  added to the residual stream: {_writers(kind)}")
    if reason := why_no_recovery(kind):
        lines.append(f"  least-squares recovery: no, {reason}")
    if kind.shared:
        lines.append(f"  width methods: no, it uses {', '.join(kind.shared[:3])} of another place")
    return lines


def _writers(kind: LayerKind) -> str:
    named = [p if f == 1 else f"{f:g} x {p}" for p, f in zip(kind.writers, kind.factors, strict=True)]
    return ", ".join(named) or "no matrix's output unchanged"


def why_no_recovery(kind: LayerKind) -> str:
    """Why no matrix at the end of the layer can take up what is lost; empty where one can."""
    outputs = [p for group in kind.groups if group.name == "mlp_output" for p in group.projections]
    if kind.branch_norms:
        return f"{kind.branch_norms[-1]} stands between the last matrix and the residual stream"
    if kind.experts:
        return "a router chooses between the last matrices"
    if not set(outputs) & set(kind.writers):
        return "the last matrix does not write into the residual stream"
    return ""


def spans(indices: list[int]) -> str:
    """Layers as a person writes them: `layers 0-2, 4-6`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(named)}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return f"({' x '.join(map(str, shape))})" if shape else ""
