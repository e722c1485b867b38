"""What every part of a model could become: the table of candidates from which a budget is solved."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from compression_dags.architectures import Architecture
from compression_dags.checkpoints.reader import Checkpoint, TensorInfo
from compression_dags.planning.options import QUANTIZER, CandidateOptions, quantizer_stage
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.schemes import matches

FILE = "alternatives.json"
Cell = tuple[int, str]
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Candidate:
    """One thing that could be done.

    Attributes:
        kind: `quantize` one group of projections of a layer, or all (`choice` None: leave them as they are), `sparsify`
            a layer, `drop` it (or several, `layers`), or `merge` it with the next into their mean.
        layer: the first layer concerned.
        group: the group of projections; None for all of the layer's (and of the next one's, for `merge`).
        bytes: stored afterwards, of what it covers.
        parameters: left afterwards, likewise; of a sparse layer those that are not 0.
        cost: KL(base ‖ changed) in nats a token, mean over `rows` sequences, everything else being as it was.
        error: standard error of `cost` over the sequences; ∞ for one.
        alive: whether the race went to its end; a poor candidate is given up and never chosen.
        share: of zeros, for `sparsify`.
        layers: for `drop`: all that go.
    """

    kind: Literal["quantize", "sparsify", "drop", "merge"]
    layer: int
    group: str | None
    choice: Choice | None
    bytes: int
    parameters: int
    cost: float = 0.0
    error: float = 0.0
    rows: int = 0
    alive: bool = True
    share: float = 0.0
    layers: tuple[int, ...] = ()

    @property
    def gone(self) -> tuple[int, ...]:
        """Layers that the model has no more afterwards."""
        return {"drop": self.layers, "merge": (self.layer + 1,)}.get(self.kind, ())

    def cells(self, groups: tuple[str, ...]) -> list[Cell]:
        """(layer, group) pairs that it decides."""
        layers = (self.layer, self.layer + 1) if self.kind == "merge" else self.layers or (self.layer,)
        return [(layer, g) for layer in layers for g in groups if self.group in (None, g)]

    @property
    def is_dense(self) -> bool:
        """Whether it leaves projections as they are."""
        return self.kind == "quantize" and self.choice is None

    @property
    def usable(self) -> bool:
        """Whether a plan may hold it: it went through the race, and its cost is a number."""
        return self.alive and math.isfinite(self.cost)

    @property
    def label(self) -> str:
        """What it does: `W4A16/64`, `as it is`, `drop`, `merge`, `merge W4A16/64`."""
        if self.kind in {"sparsify", "quantize"}:
            return label_of(self.choice) if self.kind == "quantize" else f"{100 * self.share:g} % zeros"
        return self.kind if self.choice is None else f"{self.kind} {label_of(self.choice)}"


@dataclass(frozen=True)
class CandidateTable:
    """All candidates of a model, measured.

    Attributes:
        fixed_bytes, fixed_parameters: of what no candidate touches (embeddings, head, final norm).
        projections: weights in all projections; budgets in bits are averages over them.
        together: label → (KL with every unit at that scheme or sparsity, the sum of the units' own costs).
        quantizer: options of the one that `together` was measured with.
        recovered: options of the recovery stage after which drops were measured; None if there was none.
        mixtures: (stored bits a weight, KL promised, KL measured) of the best mixtures of schemes at some sizes.
    """

    layers: int
    groups: tuple[str, ...]
    fixed_bytes: int
    fixed_parameters: int
    projections: int
    alternatives: tuple[Candidate, ...]
    together: dict[str, tuple[float, float]] | None = None
    tokens: int = 0
    quantizer: dict[str, Any] = field(default_factory=lambda: QUANTIZER)
    recovered: dict[str, Any] | None = None
    mixtures: tuple[tuple[float, float, float], ...] = ()

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, directory: Path) -> CandidateTable:
        raw: dict[str, Any] = json.loads((directory / FILE).read_text())
        found = tuple(_read(a) for a in raw.pop("alternatives"))
        together = {k: (v[0], v[1]) for k, v in (raw.pop("together") or {}).items()}
        mixtures = tuple((m[0], m[1], m[2]) for m in raw.pop("mixtures"))
        groups = tuple(raw.pop("groups"))
        return cls(alternatives=found, together=together, mixtures=mixtures, groups=groups, **raw)

    @property
    def most_removed(self) -> int:
        """Layers of the largest cut that was measured: more may not go, whatever they go by."""
        return max((len(a.gone) for a in self.alternatives if a.usable), default=0)

    @property
    def norm_bytes(self) -> int:
        """Bytes of norms and biases in the layers, which no scheme touches."""
        dense = sum(a.bytes for a in self.alternatives if a.is_dense)
        return dense - self.projections * round(dense / max(1, self.projections))

    def scale(self, label: str) -> float:
        """By how much costs at a scheme or sparsity add up to more (or less) than their sum."""
        joint, alone = (self.together or {}).get(label, (0.0, 0.0))
        return joint / alone if joint > 0 and alone > 0 and math.isfinite(joint) else 1.0

    def uniform(self) -> dict[str, list[Candidate]]:
        """Label → the candidates that, together, do the same to every layer."""
        found: dict[str, list[Candidate]] = {}
        for a in self.alternatives:
            if a.kind == "sparsify" or (a.kind == "quantize" and a.choice is not None):
                found.setdefault(a.label, []).append(a)
        return found


def _read(raw: dict[str, Any]) -> Candidate:
    choice = None if raw["choice"] is None else Choice(**raw["choice"])
    return Candidate(**{**raw, "choice": choice, "layers": tuple(raw["layers"])})


def label_of(choice: Choice | None) -> str:
    return "as it is" if choice is None else f"{choice.scheme}/{choice.group_size or 'row'}"


@dataclass(frozen=True)
class Shapes:
    """Tensors of a model as their headers say; of a checkpoint, or of what `ModelShape` knows."""

    architecture: Architecture
    tensors: Mapping[str, TensorInfo]
    num_layers: int

    @classmethod
    def of(cls, source: Checkpoint) -> Shapes:
        return cls(source.architecture, source.tensors, source.num_layers)

    def by_layer(self) -> list[dict[str, TensorInfo]]:
        """Of every layer: local name → tensor."""
        found: list[dict[str, TensorInfo]] = [{} for _ in range(self.num_layers)]
        for name, info in self.tensors.items():
            index, local = self.architecture.split_name(name)
            if index is not None and index < self.num_layers:
                found[index][local] = info
        return found


def removable(options: CandidateOptions, layers: int) -> int:
    """How many of the layers may go; one stays."""
    return min(layers - 1, max(1, int(options.most_removed * layers))) if options.depth else 0


def candidates(source: Checkpoint | Shapes, options: CandidateOptions, merges: bool = True) -> list[Candidate]:
    """Every candidate, with exact bytes and parameters, not measured yet; without merges for what knows no kinds."""
    shapes = source if isinstance(source, Shapes) else Shapes.of(source)
    kind = None if isinstance(source, Shapes) else source.shape.kind
    names, ignored = tuple(g.name for g in shapes.architecture.groups), ignored_cells(shapes, options)
    found: list[Candidate] = []
    for layer, tensors in enumerate(shapes.by_layer()):
        sized = functools.partial(_size, shapes.architecture, tensors)
        fixed = {group for index, group in ignored if index == layer}
        for group in names if options.units == "group" else (None,):
            dense_only = bool(fixed) if group is None else group in fixed
            for choice in (None, *(() if dense_only else options.choices())):
                found.append(Candidate("quantize", layer, group, choice, *sized(group, choice)))
        for share in options.sparsities:
            sizes = _sparse(shapes.architecture, tensors, share)
            found.append(Candidate("sparsify", layer, None, None, *sizes, share=share))
        if not removable(options, shapes.num_layers):
            continue
        found.append(Candidate("drop", layer, None, None, 0, 0, layers=(layer,)))
        if merges and kind and layer + 1 < shapes.num_layers and kind(layer) == kind(layer + 1):
            for choice in (None, *(() if fixed else options.choices())):
                found.append(Candidate("merge", layer, None, choice, *sized(None, choice)))
    return found


def ignored_cells(source: Shapes, options: CandidateOptions) -> set[Cell]:
    """Groups of projections that the quantizer's `ignore` names one of: they stay as they are."""
    ignore = quantizer_stage(options.quantizer, options.choices()[0]).ignore
    if all(entry == "lm_head" for entry in ignore):
        return set()
    architecture = source.architecture
    return {
        (layer, group.name)
        for layer in range(source.num_layers)
        for group in architecture.groups
        if any(matches(e, architecture.layer_prefix(layer) + p) for p in group.projections for e in ignore)
    }


def _size(
    architecture: Architecture, tensors: Mapping[str, TensorInfo], group: str | None, choice: Choice | None
) -> tuple[int, int]:
    """Stored bytes and parameters of a layer's group, norms counted with the first one."""
    total = parameters = 0
    for local, info in tensors.items():
        own = _group_of(architecture, local)
        if group is not None and group != (own or architecture.groups[0].name):
            continue
        parameters += info.numel
        matrix = own is not None and local.endswith(".weight")
        total += stored_bytes(info, choice) if matrix else info.nbytes
    return total, parameters


def _sparse(architecture: Architecture, tensors: Mapping[str, TensorInfo], share: float) -> tuple[int, int]:
    """Stored bytes (zeros are stored too) and parameters that are not 0."""
    total, parameters = _size(architecture, tensors, None, None)
    weights = sum(tensors[f"{p}.weight"].numel for p in architecture.projections())
    return total, parameters - round(share * weights)


def _group_of(architecture: Architecture, local: str) -> str | None:
    module = local.rpartition(".")[0]
    return next((g.name for g in architecture.groups if module in g.projections), None)


def stored_bytes(info: TensorInfo, choice: Choice | None) -> int:
    """Bytes of a matrix on disk, scales, zero points and shape included."""
    fitted = choice and choice.fitted(info.shape[1])
    if fitted is None:
        return info.nbytes
    layout = fitted.layout(info.shape, info.dtype)
    return sum(math.prod(shape) * _BYTES[dtype] for dtype, shape in layout.values())


def empty_table(source: Checkpoint | Shapes, alternatives: list[Candidate]) -> CandidateTable:
    """The candidate table of these candidates before anything is measured."""
    architecture = source.architecture
    split = [(*architecture.split_name(name), info) for name, info in source.tensors.items()]
    outside = [info for index, _, info in split if index is None]
    weights = {f"{p}.weight" for p in architecture.projections()}
    return CandidateTable(
        source.num_layers,
        tuple(g.name for g in architecture.groups),
        sum(t.nbytes for t in outside),
        sum(t.numel for t in outside),
        sum(info.numel for index, local, info in split if index is not None and local in weights),
        tuple(alternatives),
    )


def measured(candidate: Candidate, costs: list[float]) -> Candidate:
    """With the mean and its standard error over sequences."""
    mean = sum(costs) / len(costs)
    spread = math.sqrt(sum((c - mean) ** 2 for c in costs) / max(1, len(costs) - 1) / len(costs))
    return replace(candidate, cost=mean, error=spread if len(costs) > 1 else math.inf, rows=len(costs))
