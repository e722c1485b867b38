"""Which models can be pruned, and how wide their matrices are; read without torch."""

from __future__ import annotations

from compression_dags.architectures import Architecture, ModelShape
from compression_dags.architectures.uniformity import refuse_shared
from compression_dags.errors import InputError


def refuse_unprunable(shape: ModelShape) -> None:
    """Raise InputError for a model without prunable matrices, or with experts that are stored in an unknown way."""
    architecture = shape.architecture
    if not architecture.kinds:
        return
    refuse_shared(shape, "sparsify", "drop layers instead (shortgpt, sleb)")
    experts = [name for kind in architecture.kinds for name in kind.experts]
    if experts and architecture.experts is None:
        raise InputError(
            f"sparsify: most weights of {architecture.model_type} are experts, and its experts are {experts[0]}, not "
            "one gate, up and down matrix an expert on disk; drop layers instead (shortgpt, sleb)"
        )
    if not architecture.projections() and not experts:
        left = f" (there are {', '.join(architecture.opaque[:3])})" if architecture.opaque else ""
        raise InputError(
            f"sparsify: layers of {architecture.model_type} have no plain linear matrices with a tensor of their "
            f"own{left}; drop layers instead (shortgpt, sleb)"
        )


def pruned_widths(shape: ModelShape) -> list[tuple[int, str]]:
    """Inputs of the matrices that are pruned, with what the width is called."""
    architecture = shape.architecture
    kinds = {shape.kind(index)[1].partition(" ")[0] for index in range(shape.layers)}
    experts = [(shape.expert_intermediate, "experts' intermediate size")] if "experts" in kinds else []
    if architecture.kinds:
        found = {(k.columns(p), f"inputs of {p}:") for k in architecture.kinds for g in k.groups for p in g.projections}
        return [*sorted(found), *experts]
    dense = [(shape.intermediate, "intermediate size")] if "dense" in kinds else []
    return [(shape.hidden, "hidden size"), *dense, *experts]


def why_dense(architecture: Architecture, layer: int, local: str) -> str:
    """Why a matrix of a discovered model's layer is never pruned."""
    kind = architecture.kinds[architecture.kind_of[layer]]
    if local in kind.routers:
        return "it chooses experts"
    if local in kind.odd:
        return "it is no plain linear module, or is used outside of it or more than once"
    if local in architecture.opaque:
        return "its name or form in memory is another than on disk"
    return "it multiplies no input of the layer, as far as a trace shows"
