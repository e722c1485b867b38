"""What all quantizers share: which matrices get which scheme, the checks, and the in-memory reference of the gate.

A method subclasses `QuantizeStage` and says how to round one matrix, or matrices that share an input; packing and
writing are `packing.py`'s, the formats `formats.py`'s.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.architectures import ModelShape
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.options import Options
from compression_dags.provenance.decisions import Decision
from compression_dags.quantization.formats import FREE, Choice, Format, Scheme
from compression_dags.stage import Progress, Stage, StatisticKind, Target, silent
from compression_dags.step import WEIGHTS, Chain, Kind, Step

if TYPE_CHECKING:
    import torch

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.passes.input_sums import InputSums
    from compression_dags.provenance.resume import ResumePoint
    from compression_dags.quantization.rounding_pass import RoundedGroup
    from compression_dags.quantization.smoothing import Fold
    from compression_dags.solvers.rounding import Rounded

    Rounder = Callable[[str], Rounded]


@dataclass(frozen=True)
class Rounding:
    """What a method decided.

    Attributes:
        choices: module → its scheme, in the order of the layers.
        rounded: module name → Ŵ on its grid.
        evidence: module → what the ledger says beside the common columns; `weight_error` there is the relative error
            of a weight that was scaled before it was rounded.
        changed: tensors of the checkpoint that are not quantized but no longer the source's (norms, biases).
    """

    choices: Mapping[str, Choice]
    rounded: Rounder = field(repr=False)
    evidence: Mapping[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class QuantizedModel:
    """What a quantizer made.

    Attributes:
        decisions: a row for every quantized matrix and for every matrix kept as it was.
        bits_per_weight: stored bits of the quantized matrices, scales and zero points included, over their weights.
        rounding: what was packed.
    """

    checkpoint: Checkpoint
    decisions: list[Decision]
    bits_per_weight: float
    rounding: Rounding = field(repr=False)


class Override(Options):
    """A scheme of some matrices' own."""

    scheme: Scheme
    group_size: int | None = Field(None, gt=0)
    symmetric: bool = True

    @property
    def choice(self) -> Choice:
        return Choice.of(self.scheme, self.group_size, self.symmetric)

    @model_validator(mode="after")
    def _allowed_by_scheme(self) -> Override:
        assert self.choice
        return self


class QuantizeStage(Stage):
    """Common options of the quantizers.

    A method that needs no data defines `round_weight`; one that does names its `statistic` and defines `round_group`.
    """

    stage: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[Kind, ...]] = (
        Kind(
            "quantization_plan",
            "A scheme for every group of projections, where a recipe asks for bits a weight on average.",
            (WEIGHTS, "calibration_tokens"),
        ),
        Kind(
            "quantized_weights",
            "The model rounded onto a compressed-tensors scheme, reload gate passed.",
            (WEIGHTS, "calibration_tokens", "quantization_plan"),
            weights=True,
        ),
    )
    statistic: ClassVar[StatisticKind] = "none"
    method: str

    scheme: Scheme = Field(description="bits and kind of weights (W) and activations (A)")
    group_size: int | None = Field(None, gt=0, description=f"inputs sharing a scale; for {FREE}; default: the scheme's")
    symmetric: bool = Field(True, description=f"false adds zero points; for {FREE}")
    ignore: tuple[str, ...] = Field(("lm_head",), description="modules kept as they are: names, or re:<pattern>")
    overrides: dict[str, Override] = Field(
        {}, description="schemes of some modules' own, by name or re:<pattern>; the first that matches counts"
    )
    fallback: Literal["smaller", "refuse"] = Field(
        "smaller",
        description="where a group size does not divide a matrix: the largest that does, or the matrix stays as it is "
        "(the ledger says so); or stop",
    )

    bits: float | None = Field(
        None, gt=1, lt=16, description="average stored bits a weight: schemes are then chosen by measured sensitivity"
    )
    candidates: tuple[Scheme, ...] = Field(("W3A16", "W8A16"), description="what `bits` may use beside `scheme`")

    @model_validator(mode="after")
    def _allowed_by_scheme(self) -> QuantizeStage:
        assert self.choice
        if self.bits is not None and self.overrides:
            raise InputError("bits and overrides: give one; bits chooses every scheme itself")
        if self.bits is not None:
            check_together({f"candidate {name}": Choice.of(name) for name in (self.scheme, *self.candidates)})
        return self

    def steps(self, chain: Chain) -> tuple[Step, ...]:
        """`quantized_weights`; with `bits` it reads a `quantization_plan`, which the planner declares."""
        tokens = ("calibration_tokens",) if self.reads_tokens else ()
        plan = ("quantization_plan",) if self.bits else ()
        return (
            Step(
                "quantized_weights",
                self.code_version,
                self.options(),
                (WEIGHTS, *tokens, *plan),
                "compression_dags.quantization.workers:quantize",
                self,
                weights=True,
            ),
        )

    @property
    def choice(self) -> Choice:
        """What a matrix gets that no override names and that it fits."""
        return Choice.of(self.scheme, self.group_size, self.symmetric)

    @property
    def format(self) -> Format:
        return self.choice.format

    def asked(self, module: str) -> Choice:
        entry = self.override_of(module)
        return self.choice if entry is None else self.overrides[entry].choice

    def override_of(self, module: str) -> str | None:
        """The entry of `overrides` that decides for a module."""
        return next((entry for entry in self.overrides if matches(entry, module)), None)

    def ignored_by(self, module: str) -> str | None:
        """The entry of `ignore` that names a module."""
        return next((entry for entry in self.ignore if matches(entry, module)), None)

    def remark(self, evidence: Mapping[str, Any]) -> str:
        """What a method's own search found for a matrix, in a few words for its reason; most have nothing to add."""
        return ""

    def _ignored(self, module: str) -> bool:
        return self.ignored_by(module) is not None

    def wished(self, facts: ModelShape) -> list[str]:
        """Projections that `ignore` does not name, whether their scheme fits them or not."""
        architecture, layers = facts.architecture, range(facts.layers)
        modules = [architecture.layer_prefix(i) + p for i in layers for p in architecture.projections()]
        return [m for m in modules if not self._ignored(m)]

    def choices(self, facts: ModelShape) -> dict[str, Choice]:
        """Module → what it is quantized to, layer by layer. Modules that stay as they are do not appear.

        Raises:
            InputError: matrices that engines fuse (query, key and value; gate and up) would differ; schemes that
                cannot share a checkpoint; with `fallback: refuse`, a group size that does not divide.
        """
        architecture, columns = facts.architecture, input_dimensions(facts)
        found: dict[str, Choice] = {}
        for layer in range(facts.layers):
            for group in architecture.groups:
                names = [architecture.layer_prefix(layer) + p for p in group.projections]
                names = [n for n in names if not self._ignored(n)]
                own = {name: self._fitted(name, columns[group.name]) for name in names}
                if len(set(own.values())) > 1:
                    differ = ", ".join(f"{n}: {c.scheme if c else 'as it is'}" for n, c in own.items())
                    raise InputError(f"overrides: matrices of one input must have one scheme; {differ}")
                found |= {name: choice for name, choice in own.items() if choice}
        found = self._alike(found, columns, facts)
        check_together(found)
        return found

    def _fitted(self, name: str, columns: int) -> Choice | None:
        asked = self.asked(name)
        fitted = asked.fitted(columns)
        if fitted != asked and self.fallback == "refuse":
            instead = "leave it as it is"
            if fitted:
                instead = f"take {fitted.scheme} with {fitted.group_size or 'one scale a row'}"
            raise InputError(
                f"{name}: group size {asked.group_size} of {asked.scheme} does not divide its {columns} inputs; "
                f"fallback: smaller would {instead}"
            )
        return fitted

    def _alike(self, found: dict[str, Choice], columns: dict[str, int], facts: ModelShape) -> dict[str, Choice]:
        """With one group size for all matrices that ask for one scheme, where a checkpoint can hold one only."""
        group = {p: g.name for g in facts.architecture.groups for p in g.projections}
        widths: dict[Choice, set[int]] = {}
        for name in found:
            widths.setdefault(self.asked(name), set()).add(columns[group[facts.architecture.split_name(name)[1]]])
        common = {asked: asked.common(seen) for asked, seen in widths.items() if asked.dequantize_on_load}
        return {name: common.get(self.asked(name), choice) for name, choice in found.items()}

    def check(self, facts: ModelShape) -> None:
        """See `Stage.check`: mixtures of experts, quantized sources, bad `ignore` or `overrides`."""
        architecture = facts.architecture
        if architecture.experts is not None:
            raise InputError(
                f"quantizing {architecture.model_type} is not supported yet: its experts are fused parameters, "
                "not Linear modules, so a Linear-targeted scheme would leave most weights as they are"
            )
        if facts.config.get("quantization_config"):
            raise InputError(f"the model is quantized already; {self.scheme} needs dense float weights")
        modules = [architecture.layer_prefix(i) + p for i in range(facts.layers) for p in architecture.projections()]
        for option, entries in (("ignore", self.ignore), ("overrides", tuple(self.overrides))):
            for entry in entries:
                if not any(matches(entry, module) for module in ("lm_head", *modules)):
                    raise InputError(f"{option} {entry!r} names no module; there are lm_head and e.g. {modules[0]}")
                if option == "overrides" and not any(matches(entry, module) for module in modules):
                    raise InputError(f"overrides {entry!r}: the head is never quantized; leave it out")
        if not self.choices(facts):
            if not self.wished(facts):
                raise InputError(f"ignore {list(self.ignore)} leaves nothing to quantize")
            widths = ", ".join(f"{name} {width}" for name, width in input_dimensions(facts).items())
            raise InputError(f"{self.choice.label} fits no matrix of the model, whose inputs are: {widths}")

    @property
    def wanted(self) -> StatisticKind:
        """What is summed over the inputs; where it hangs on options, a method says so here."""
        return self.statistic

    @property
    def reads_tokens(self) -> bool:
        return self.wanted != "none"

    @property
    def follows(self) -> Target:
        return "own"

    def round_weight(self, source: Checkpoint, name: str, device: str, choice: Choice) -> Rounded:
        """Ŵ of the tensor `name` on its grid, the same on every call. A method without data says how."""
        raise AssertionError(f"{type(self).__name__} must define round_weight")

    def round_group(
        self, weights: dict[str, torch.Tensor], seen: InputSums, choice: Choice, label: str
    ) -> RoundedGroup:
        """Matrices (out_i, in) that read one input, rounded. A calibrated method that scales no inputs says how;
        `label` names the input in errors."""
        raise AssertionError(f"{type(self).__name__} must define round_group or round_folded")

    def round_folded(
        self, weights: dict[str, torch.Tensor], seen: InputSums, choice: Choice, label: str, fold: Fold | None
    ) -> RoundedGroup:
        """Like `round_group`; the input may be divided by factors that `fold` takes (None: it may not)."""
        return self.round_group(weights, seen, choice, label)

    def quantize(
        self,
        source: Checkpoint,
        directory: Path,
        *,
        blocks: TokenBlocks | None = None,
        schemes: Mapping[str, Choice] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        resume: ResumePoint | None = None,
        progress: Progress = silent,
    ) -> QuantizedModel:
        """Write the quantized checkpoint. Equal inputs give equal bytes.

        Without data one matrix is in memory at a time; calibrated methods hold the codes of all. `dtype` is what the
        model computes in on calibration tokens; rounding itself is always float32. `schemes` are those that
        `planning.mixed.plan_schemes` chose, where `bits` asks for them.

        Raises:
            InputError: see `check`; a projection is not a float matrix; the installed transformers cannot load it; no
                calibration tokens for a method that reads them.
            IntegrityError: a weight, a scale or an activation is not finite.
        """
        from compression_dags.quantization.packing import Packer

        self.check(source.facts)
        if self.reads_tokens and blocks is None:
            raise InputError(f"quantize: {self.method} needs calibration tokens; none were given")
        if self.bits and schemes is None:
            raise InputError(f"quantize: bits: {self.bits:g} needs a plan of schemes; none was given")
        choices = dict(schemes) if schemes is not None else self.choices(source.facts)
        fp4 = next((c.scheme for c in choices.values() if c.format.kind == "fp4"), None)
        if fp4 and dtype != "bfloat16" and not rebuilds_while_loading():
            raise InputError(f"{fp4} in {dtype} needs transformers >= 5.23; older ones load it in bfloat16 only")
        if not self.reads_tokens:
            return Packer(self, source, self._directly(source, choices, device), device, progress).write(directory)
        from compression_dags.quantization.rounding_pass import RoundingPass

        walk = RoundingPass(self, source, choices, blocks, device, dtype)
        walk.run_layers(resume, progress)
        return Packer(self, source, walk.rounding(device), device, progress).write(directory)

    def _directly(self, source: Checkpoint, choices: Mapping[str, Choice], device: str) -> Rounding:
        return Rounding(choices, lambda name: self.round_weight(source, f"{name}.weight", device, choices[name]))

    def reference_logits(
        self,
        source: Checkpoint,
        ids: torch.Tensor | None = None,
        *,
        rounding: Rounding | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> torch.Tensor:
        """Logits of the quantized model as it is in memory, without the written files: what the gate compares with.

        Args:
            ids: (sequences, T) int64; default: the gate's probe.
            rounding: `QuantizedModel.rounding`; methods without data find it anew.

        Returns:
            (sequences, T, vocabulary) float32 on the CPU.
        """
        import torch

        from compression_dags.checkpoints.gate import PROBE_TOKENS, load_stock, probe_ids

        model = load_stock(source.path, device=device, dtype=dtype)
        if ids is None:
            ids = probe_ids(model.config.vocab_size, getattr(model.config, "max_position_embeddings", PROBE_TOKENS))
        rounding = rounding or self._directly(source, self.choices(source.facts), device)
        early = needs_rebuilding(rounding.choices) and rebuilds_while_loading()
        with torch.inference_mode():
            for name, tensor in rounding.changed.items():
                model.get_parameter(name).copy_(tensor.to(device))
            for name, choice in rounding.choices.items():
                linear, rounded = model.get_submodule(name), rounding.rounded(name).to(device)
                linear.weight.copy_(_as_loaded(rounded, choice, getattr(torch, dtype), early))
                inputs = choice.compression_scheme().input_activations
                if inputs is not None:
                    linear.register_forward_pre_hook(functools.partial(_round_input, inputs))
            return model(ids.to(device)).logits.float().cpu()


def check_together(choices: Mapping[str, Choice]) -> None:
    """
    Raises:
        InputError: these schemes of these modules cannot share a checkpoint, by the first modules that show it.
    """
    rebuilt = next(((n, c) for n, c in choices.items() if c.dequantize_on_load), None)
    if rebuilt is None:
        return
    name, choice = rebuilt
    for other, own in choices.items():
        if own.format.activations < 16:
            raise InputError(
                f"{name}: {choice.label} must be rebuilt while loading, which drops the rounding of inputs that "
                f"{own.label} of {other} asks for; they cannot share a checkpoint"
            )
        if own != choice:
            raise InputError(
                f"{name}: {choice.label} must be rebuilt while loading, and transformers rebuilds all matrices by one "
                f"scheme; {other} is {own.label}; they cannot share a checkpoint"
            )


def needs_rebuilding(choices: Mapping[str, Choice]) -> bool:
    """Whether config.json must say `dequantize`: the key is of the whole checkpoint."""
    return any(choice.dequantize_on_load for choice in choices.values())


def _as_loaded(rounded: Rounded, choice: Choice, dtype: torch.dtype, early: bool) -> torch.Tensor:
    """Ŵ with the arithmetic of the loader that will read it: in the stored scales' dtype, or in the model's."""
    import torch

    if choice.format.kind == "fp4":
        return rounded.dequantize(torch.float32).to(torch.bfloat16).to(dtype)
    return rounded.dequantize(rounded.scales.scale.dtype).to(dtype) if early else rounded.dequantize(dtype)


def matches(entry: str, module: str) -> bool:
    """compressed-tensors' rule: an equal name, or `re:` and a pattern that matches from the start."""
    try:
        return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
    except re.error as error:
        raise InputError(f"{entry!r} is not a regular expression: {error}") from None


def _round_input(args: Any, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Forward pre-hook: the input (…, T, in) rounded with dynamic scales, by compressed-tensors."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scale, zero = compute_dynamic_scales_and_zp(inputs[0], args, module)
    return fake_quantize(inputs[0], scale, zero, args), *inputs[1:]


def rebuilds_while_loading() -> bool:
    """Whether `dequantize` acts on the stored tensors (transformers 5.23), not on the loaded model as it did before."""
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 23)


def input_dimensions(facts: ModelShape) -> dict[str, int]:
    """Group of projections → the dimension of the input that they read."""
    config = facts.config
    heads = int(config["num_attention_heads"])
    return {
        "attention_input": facts.hidden,
        "attention_output": heads * int(config.get("head_dim") or facts.hidden // heads),
        "mlp_input": facts.hidden,
        "mlp_output": int(config.get("intermediate_size") or config["ffn_dim"]),
    }
