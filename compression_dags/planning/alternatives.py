"""What every part of a model could become: the bank from which a budget is solved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compression_dags.architectures import Architecture
from compression_dags.checkpoints.reader import Checkpoint, TensorInfo
from compression_dags.errors import InputError
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.schemes import check_together

if TYPE_CHECKING:
    from compression_dags.merging.recovery import RecoverStage
    from compression_dags.quantization.schemes import QuantizeStage

FILE = "alternatives.json"
Cell = tuple[int, str]
QUANTIZER: dict[str, Any] = {"method": "gptq"}
#: Options of a quantizer that the plan chooses.
PLANNED = {"scheme", "group_size", "symmetric", "bits", "candidates", "overrides"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}


def recovery_of(options: Mapping[str, Any]) -> RecoverStage:
    """The recovery stage that these options describe.

    Raises:
        InputError: an unknown method or option.
    """
    from compression_dags.registry import METHODS

    method = options.get("method")
    if method not in METHODS["recover"]:
        raise InputError(f"recover {method!r} is unknown; allowed: {', '.join(METHODS['recover'])}")
    return cast("RecoverStage", METHODS["recover"][method].model_validate(options))


def quantizer_stage(options: Mapping[str, Any], choice: Choice) -> QuantizeStage:
    """The quantizer that these options describe, at one scheme.

    Raises:
        InputError: an unknown method, or an option that the plan decides.
    """
    from compression_dags.registry import METHODS

    method = options.get("method")
    if method not in METHODS["quantize"]:
        raise InputError(f"quantizer {method!r} is unknown; allowed: {', '.join(METHODS['quantize'])}")
    if given := sorted(PLANNED & options.keys()):
        raise InputError(f"quantizer: {given[0]} is what plan decides; leave it out")
    return cast("QuantizeStage", METHODS["quantize"][method].model_validate({**options, **choice.options()}))


class BankOptions(BaseModel):
    """Which alternatives are measured, and on how much text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schemes: tuple[str, ...] = Field(
        ("W8A16", "W4A16", "W3A16", "W3A16/128"),
        min_length=1,
        description="names, or NAME/SIZE: a group size of its own",
    )
    group_size: int | None = Field(64, gt=0, description="of schemes that leave it free and name none")
    units: Literal["group", "layer"] = Field("group", description="what gets a scheme of its own")
    sparsities: tuple[float, ...] = Field((), description="shares of zeros that a layer may get (Wanda's masks)")
    depth: bool = Field(True, description="also drop layers, and merge neighbours")
    quantizer: dict[str, Any] = Field(
        QUANTIZER,
        description="method and options of the recipe's quantizer, without schemes: all projections at a "
        "scheme are measured with it, single ones to nearest for rtn and by GPTQ for all others",
    )
    recover: Literal["auto"] | dict[str, Any] | None = Field(
        "auto",
        description="options of the recovery stage after which removals are measured; auto: least squares where the "
        "model and the calibration set allow it; null: as they are",
    )
    most_removed: float = Field(0.35, gt=0, lt=1, description="largest share of the layers that may go")
    rows: int = Field(12, ge=2, description="calibration sequences that survivors are measured on")
    first_rows: int = Field(4, ge=2, description="sequences after which poor alternatives are given up")
    length: int = Field(512, ge=8, description="tokens of a sequence that are used")

    @field_validator("schemes")
    @classmethod
    def _schemes_exist(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            _choice(entry, None)
        return entries

    @model_validator(mode="after")
    def _first_is_a_part(self) -> BankOptions:
        if bad := [s for s in self.sparsities if not 0 < s < 1]:
            raise ValueError(f"sparsity {bad[0]} must lie between 0 and 1")
        for choice in self.choices():
            quantizer_stage(self.quantizer, choice)
        check_together({f"schemes {entry}": c for entry, c in zip(self.schemes, self.choices(), strict=True)})
        if isinstance(self.recover, dict):
            recovery_of(self.recover)
        if self.first_rows > self.rows:
            raise ValueError(f"first_rows {self.first_rows} must not exceed rows {self.rows}")
        return self

    @property
    def rounding(self) -> Literal["rtn", "gptq"]:
        """How single groups are rounded while they are measured."""
        return "rtn" if self.quantizer["method"] == "rtn" else "gptq"

    def choices(self) -> list[Choice]:
        """The schemes, with the group size where it is free."""
        return [_choice(entry, self.group_size) for entry in self.schemes]


def _choice(entry: str, group_size: int | None) -> Choice:
    """What NAME, or NAME/SIZE, stands for.

    Raises:
        InputError: an unknown scheme, or a group size that is no number or not the scheme's to choose.
    """
    name, given, size = entry.partition("/")
    if given and not (size.isdecimal() and int(size)):
        raise InputError(f"schemes {entry!r}: a group size is a number of inputs, as in W3A16/128")
    free = Choice.of(name).format.free
    return Choice.of(name, int(size) if given else group_size if free else None)


@dataclass(frozen=True)
class Alternative:
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
        alive: whether the race went to its end; a poor alternative is given up and never chosen.
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
    def label(self) -> str:
        """What it does: `W4A16/64`, `as it is`, `drop`, `merge`, `merge W4A16/64`."""
        if self.kind == "sparsify":
            return f"{100 * self.share:g} % zeros"
        if self.kind == "quantize":
            return label_of(self.choice)
        return self.kind if self.choice is None else f"{self.kind} {label_of(self.choice)}"


@dataclass(frozen=True)
class Bank:
    """All alternatives of a model, measured.

    Attributes:
        fixed_bytes, fixed_parameters: of what no alternative touches (embeddings, head, final norm).
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
    alternatives: tuple[Alternative, ...]
    together: dict[str, tuple[float, float]] | None = None
    tokens: int = 0
    quantizer: dict[str, Any] = field(default_factory=lambda: QUANTIZER)
    recovered: dict[str, Any] | None = None
    mixtures: tuple[tuple[float, float, float], ...] = ()

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, directory: Path) -> Bank:
        raw: dict[str, Any] = json.loads((directory / FILE).read_text())
        found = tuple(_read(a) for a in raw.pop("alternatives"))
        together = {k: (v[0], v[1]) for k, v in (raw.pop("together") or {}).items()}
        mixtures = tuple((m[0], m[1], m[2]) for m in raw.pop("mixtures"))
        groups = tuple(raw.pop("groups"))
        return cls(alternatives=found, together=together, mixtures=mixtures, groups=groups, **raw)

    @property
    def most_removed(self) -> int:
        return max((len(a.gone) for a in self.alternatives if a.alive), default=0)

    def scale(self, label: str) -> float:
        """By how much costs at a scheme or sparsity add up to more (or less) than their sum."""
        joint, alone = (self.together or {}).get(label, (0.0, 0.0))
        return joint / alone if joint > 0 and alone > 0 and math.isfinite(joint) else 1.0

    def uniform(self) -> dict[str, list[Alternative]]:
        """Label → the alternatives that, together, do the same to every layer."""
        found: dict[str, list[Alternative]] = {}
        for a in self.alternatives:
            if a.kind == "sparsify" or (a.kind == "quantize" and a.choice is not None):
                found.setdefault(a.label, []).append(a)
        return found


def _read(raw: dict[str, Any]) -> Alternative:
    choice = None if raw["choice"] is None else Choice(**raw["choice"])
    return Alternative(**{**raw, "choice": choice, "layers": tuple(raw["layers"])})


def label_of(choice: Choice | None) -> str:
    return "as it is" if choice is None else f"{choice.scheme}/{choice.group_size or 'row'}"


def candidates(source: Checkpoint, options: BankOptions) -> list[Alternative]:
    """Every alternative, with exact bytes and parameters, not measured yet."""
    groups = tuple(g.name for g in source.architecture.groups)
    found: list[Alternative] = []
    for layer in range(source.num_layers):
        for group in groups if options.units == "group" else (None,):
            for choice in (None, *options.choices()):
                found.append(Alternative("quantize", layer, group, choice, *_size(source, layer, group, choice)))
        for share in options.sparsities:
            found.append(Alternative("sparsify", layer, None, None, *_sparse(source, layer, share), share=share))
        if not options.depth:
            continue
        found.append(Alternative("drop", layer, None, None, 0, 0, layers=(layer,)))
        if layer + 1 < source.num_layers and source.facts.kind(layer) == source.facts.kind(layer + 1):
            for choice in (None, *options.choices()):
                found.append(Alternative("merge", layer, None, choice, *_size(source, layer, None, choice)))
    return found


def _size(source: Checkpoint, layer: int, group: str | None, choice: Choice | None) -> tuple[int, int]:
    """Stored bytes and parameters of a layer's group, norms counted with the first one."""
    architecture, names = source.architecture, source.layer(layer)
    total = parameters = 0
    for local, name in names.items():
        own = _group_of(architecture, local)
        if group is not None and group != (own or architecture.groups[0].name):
            continue
        info = source.tensors[name]
        parameters += info.numel
        matrix = own is not None and local.endswith(".weight")
        total += stored_bytes(info, choice) if matrix else info.nbytes
    return total, parameters


def _sparse(source: Checkpoint, layer: int, share: float) -> tuple[int, int]:
    """Stored bytes (zeros are stored too) and parameters that are not 0."""
    total, parameters = _size(source, layer, None, None)
    prefix = source.architecture.layer_prefix(layer)
    weights = sum(source.tensors[f"{prefix}{p}.weight"].numel for p in source.architecture.projections())
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


def empty_bank(source: Checkpoint, alternatives: list[Alternative]) -> Bank:
    outside = [source.tensors[name] for name in source.outside_layers()]
    projections = sum(source.tensors[f"{name}.weight"].numel for name in _projections(source))
    groups = tuple(g.name for g in source.architecture.groups)
    return Bank(
        source.num_layers,
        groups,
        sum(t.nbytes for t in outside),
        sum(t.numel for t in outside),
        projections,
        tuple(alternatives),
    )


def _projections(source: Checkpoint) -> Iterator[str]:
    for layer in range(source.num_layers):
        yield from (source.architecture.layer_prefix(layer) + p for p in source.architecture.projections())


def measured(alternative: Alternative, costs: list[float]) -> Alternative:
    """With the mean and its standard error over sequences."""
    mean = sum(costs) / len(costs)
    spread = math.sqrt(sum((c - mean) ** 2 for c in costs) / max(1, len(costs) - 1) / len(costs))
    return replace(alternative, cost=mean, error=spread if len(costs) > 1 else math.inf, rows=len(costs))
