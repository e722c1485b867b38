"""Which models have the layers of a Llama, as far as methods that mix channels or whole groups of layers rely on it."""

from __future__ import annotations

from collections.abc import Iterator

from compression_dags.architectures.decoder import LayerKind, ModelShape
from compression_dags.errors import InputError

_ROLES = ("attention_input", "attention_output", "mlp_input", "mlp_output")


def unlike_llama(shape: ModelShape) -> str:
    """What of a discovered model's layers is not as in a Llama layer, in words; empty where nothing is."""
    architecture = shape.architecture
    if not architecture.kinds:
        return ""
    if architecture.has_experts:
        return "some layers are mixtures of experts"
    return next((why for kind in architecture.kinds for why in _faults(kind, shape)), "") or _mixed(shape)


def refuse_unlike(shape: ModelShape, what: str, instead: str) -> None:
    """Raise InputError for a model whose layers are not as in a Llama layer.

    Args:
        what: the method, with its stage.
        instead: what works for such a model.
    """
    if why := unlike_llama(shape):
        raise InputError(f"{what} does not fit {shape.architecture.model_type}: {why}; {instead}")


def refuse_shared(shape: ModelShape, what: str, instead: str) -> None:
    """Raise InputError for a discovered model whose layers use one another's matrices."""
    architecture = shape.architecture
    inside = (n for k in architecture.kinds for n in k.shared if n.startswith(f"{architecture.modules}."))
    if name := next(inside, ""):
        raise InputError(f"{what} does not fit {architecture.model_type}: several layers use {name}; {instead}")


def _mixed(shape: ModelShape) -> str:
    """What differs between kinds whose layers are each as in a Llama."""
    names = [group.name for group in shape.architecture.groups]
    return "" if sorted(names) == sorted(_ROLES) else "its kinds of layers have matrices of other names"


def _faults(kind: LayerKind, shape: ModelShape) -> Iterator[str]:
    found = {group.name: group.projections for group in kind.groups}
    if kind.odd:
        yield f"{kind.odd[0]} is no plain linear matrix"
    if kind.shared:
        yield f"layers share {kind.shared[0]}"
    if set(found) != set(_ROLES):
        more = ", ".join(name for name in found if name not in _ROLES) or "too few matrices"
        yield f"a layer ({kind.attention}) has other matrices than attention and one MLP ({more})"
        return
    counts = [len(found[role]) for role in _ROLES]
    if counts[:2] + counts[3:] != [3, 1, 1] or counts[2] > 2:
        yield f"matrices that read one input are {', '.join(map(str, counts))} in a layer, not 3, 1, 1 or 2, and 1"
        return
    if {name for name, _ in kind.input_norms} != {"attention_input", "mlp_input"}:
        yield "its attention and MLP do not each read the output of a norm"
    if set(kind.factors) - {1.0}:
        yield f"what a layer adds to the residual stream is multiplied by {kind.factors[0]:g}"
    if missing := next((n for n in ("hidden_size", "num_attention_heads") if not shape.config.get(n)), ""):
        yield f"its config has no {missing}"
        return
    yield from _odd_shapes(kind, shape, found)


def _odd_shapes(kind: LayerKind, shape: ModelShape, found: dict[str, tuple[str, ...]]) -> Iterator[str]:
    sizes = dict(kind.shapes)
    query, pair = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    (q, k, v), (o,), ins, (down,) = (found[role] for role in _ROLES)
    inner = sizes[f"{down}.weight"][1]
    wanted = {q: (query, shape.hidden), k: (pair, shape.hidden), v: (pair, shape.hidden), o: (shape.hidden, query)}
    wanted |= dict.fromkeys(ins, (inner, shape.hidden)) | {down: (shape.hidden, inner)}
    for name, size in wanted.items():
        if sizes[f"{name}.weight"] != size:
            yield f"{name} is {_times(sizes[f'{name}.weight'])}, not {_times(size)} as its heads and channels say"
    if inner != shape.intermediate:
        yield f"{down} reads {inner} channels, and the config says {shape.intermediate}"
    for norm in kind.head_norms:
        if sizes.get(f"{norm}.weight") != (shape.head_dim,):
            yield f"{norm} is over all heads at once"
    if len(kind.branch_norms) not in (0, 2) or len(kind.branch_norms) + len(kind.writers) < 2:
        yield "something stands between a branch's last matrix and the residual stream"
    known = {*wanted, *kind.norms}
    if extra := next((name for name, _ in kind.shapes if name.rpartition(".")[0] not in known), ""):
        yield f"{extra} is neither a matrix nor a norm that Llama has"


def _times(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))
