"""Quantization schemes, and how a rounded model becomes a compressed-tensors checkpoint.

A method subclasses `QuantizeStage` and says how to round one matrix; checking, packing, writing and the in-memory
reference of the reload gate are the same for all methods.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.architectures import StackFacts
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.writer import PlannedTensor, unchanged, write_checkpoint
from compression_dags.errors import InputError, IntegrityError
from compression_dags.provenance.decisions import Decision
from compression_dags.stages import Follows, Stage, StatisticKind, Track, silent

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.calibration.inputs import InputSums
    from compression_dags.provenance.progress import Progress
    from compression_dags.solvers.rounding import Grid, Rounded

    Rounder = Callable[[str], Rounded]

Scheme = Literal["W8A16", "W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"]
UNIT = "relative weight error"
SHOWN = {"scheme", "symmetric"}


@dataclass(frozen=True)
class Format:
    """How a scheme lies on disk.

    Attributes:
        name: compressed-tensors' name of the format.
        group_size: the default (None: one scale a channel); it may be chosen only where `free`.
    """

    name: str
    kind: Literal["int", "fp8", "fp4"]
    bits: int
    group_size: int | None = None
    free: bool = False


FORMATS: dict[str, Format] = {
    "W8A16": Format("pack-quantized", "int", 8, free=True),
    "W4A16": Format("pack-quantized", "int", 4, group_size=128, free=True),
    "W8A8": Format("int-quantized", "int", 8),
    "FP8_DYNAMIC": Format("float-quantized", "fp8", 8),
    "NVFP4A16": Format("nvfp4-pack-quantized", "fp4", 4, group_size=16),
}
FREE = ", ".join(name for name, format in FORMATS.items() if format.free)


@dataclass(frozen=True)
class QuantizedModel:
    """What a quantizer made.

    Attributes:
        decisions: a row for every quantized matrix and for every matrix kept as it was.
        bits_per_weight: stored bits of the quantized matrices, scales and zero points included, over their weights.
        rounded: module name → Ŵ on its grid, as it was packed.
    """

    checkpoint: Checkpoint
    decisions: list[Decision]
    bits_per_weight: float
    rounded: Rounder = field(repr=False)


class QuantizeStage(Stage):
    """Common options of the quantizers.

    A method that needs no data defines `round_weight`; one that does names its `statistic` and defines `round_group`.
    """

    stage: ClassVar[str] = "quantize"
    statistic: ClassVar[StatisticKind] = "none"
    method: str

    scheme: Scheme = Field(description="bits and kind of weights (W) and activations (A)")
    group_size: int | None = Field(None, gt=0, description=f"inputs sharing a scale; for {FREE}; default: the scheme's")
    symmetric: bool = Field(True, description=f"false adds zero points; for {FREE}")
    ignore: tuple[str, ...] = Field(("lm_head",), description="modules kept as they are: names, or re:<pattern>")

    @model_validator(mode="after")
    def _allowed_by_scheme(self) -> QuantizeStage:
        if self.format.free:
            return self
        if self.group_size is not None:
            fixed = self.format.group_size or "one scale an output channel"
            raise InputError(f"group_size {self.group_size}: {self.scheme} fixes it ({fixed}); it is free for {FREE}")
        if not self.symmetric:
            raise InputError(f"symmetric false: {self.scheme} is always symmetric; zero points exist for {FREE}")
        return self

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme]

    @property
    def effective_group(self) -> int | None:
        """Inputs that share a scale, None for a whole row."""
        return self.group_size or self.format.group_size

    @property
    def dequantize_on_load(self) -> bool:
        """Whether config.json must ask transformers to rebuild dense weights while loading (docs/quantization-rtn.md).

        transformers' default path expects unpacked zero points, and leaves NVFP4 weights in bfloat16 in a model of
        another dtype. Only weight-only schemes may set this: it drops the rounding of activations.
        """
        return not self.symmetric or self.format.kind == "fp4"

    def grid(self) -> Grid:
        from compression_dags.solvers.rounding import Grid

        return Grid(self.format.kind, self.format.bits, self.effective_group, self.symmetric)

    def check(self, facts: StackFacts) -> None:
        """See `Stage.check`: mixtures of experts, quantized sources, group sizes that do not divide, bad `ignore`."""
        architecture = facts.architecture
        if architecture.experts is not None:
            raise InputError(
                f"quantizing {architecture.model_type} is not supported yet: its experts are fused parameters, "
                "not Linear modules, so a Linear-targeted scheme would leave most weights as they are"
            )
        if facts.config.get("quantization_config"):
            raise InputError(f"the model is quantized already; {self.scheme} needs dense float weights")
        self._check_groups(input_dimensions(facts))
        modules = [architecture.layer_prefix(i) + p for i in range(facts.layers) for p in architecture.projections()]
        for entry in self.ignore:
            if not any(_matches(entry, module) for module in ("lm_head", *modules)):
                raise InputError(f"ignore {entry!r} names no module; there are lm_head and e.g. {modules[0]}")
        if all(any(_matches(entry, module) for entry in self.ignore) for module in modules):
            raise InputError(f"ignore {list(self.ignore)} leaves nothing to quantize")

    def _check_groups(self, dimensions: dict[str, int]) -> None:
        size = self.effective_group or 1
        bad = next((name for name, dimension in dimensions.items() if dimension % size), None)
        if bad is None:
            return
        common = [2**k for k in range(4, 13) if all(d % 2**k == 0 for d in dimensions.values())]
        allowed = f"powers of two from 16 that divide all: {', '.join(map(str, common)) or 'none'}"
        raise InputError(
            f"{self.scheme}: group size {size} does not divide the input dimension {dimensions[bad]} of {bad}; "
            + (allowed if self.format.free else "the scheme fixes the group size")
        )

    @property
    def reads_tokens(self) -> bool:
        return self.statistic != "none"

    @property
    def follows(self) -> Follows:
        return "own"

    def round_weight(self, source: Checkpoint, name: str, device: str) -> Rounded:
        """Ŵ of the tensor `name` on its grid, the same on every call. A method without data says how."""
        raise AssertionError(f"{type(self).__name__} must define round_weight")

    def round_group(
        self, weights: dict[str, torch.Tensor], seen: InputSums, label: str
    ) -> dict[str, tuple[Rounded, dict[str, Any]]]:
        """Ŵ of matrices (out_i, in) that read one input, and what the ledger says of each. A calibrated method says
        how; `label` names the input in errors."""
        raise AssertionError(f"{type(self).__name__} must define round_group")

    def quantize(
        self,
        source: Checkpoint,
        directory: Path,
        *,
        blocks: TokenBlocks | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        progress: Progress | None = None,
        track: Track = silent,
    ) -> QuantizedModel:
        """Write the quantized checkpoint. Equal inputs give equal bytes.

        Without data one matrix is in memory at a time; calibrated methods hold the codes of all. `dtype` is what the
        model computes in on calibration tokens; rounding itself is always float32.

        Raises:
            InputError: see `check`; a projection is not a float matrix; the installed transformers cannot load it; no
                calibration tokens for a method that reads them.
            IntegrityError: a weight, a scale or an activation is not finite.
        """
        self.check(source.facts)
        if self.reads_tokens and blocks is None:
            raise InputError(f"quantize: {self.method} needs calibration tokens; none were given")
        if self.format.kind == "fp4" and dtype != "bfloat16" and not rebuilds_while_loading():
            raise InputError(
                f"{self.scheme} in {dtype} needs transformers >= 5.23; older ones load it in bfloat16 only"
            )
        if not self.reads_tokens:
            return _Packer(self, source, self._rounder(source, device), {}, device, track).write(directory)
        from compression_dags.quantization.walk import RoundWalk

        walk = RoundWalk(self, source, blocks, device, dtype)
        walk.run_layers(progress, track)
        return _Packer(self, source, lambda name: walk.rounded[name].to(device), walk.evidence, device, track).write(
            directory
        )

    def _rounder(self, source: Checkpoint, device: str) -> Rounder:
        return lambda name: self.round_weight(source, f"{name}.weight", device)

    def reference_logits(
        self,
        source: Checkpoint,
        ids: torch.Tensor | None = None,
        *,
        rounded: Rounder | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> torch.Tensor:
        """Logits of the quantized model as it is in memory, without the written files: what the gate compares with.

        Args:
            ids: (sequences, T) int64; default: the gate's probe.
            rounded: `QuantizedModel.rounded`; methods without data find it anew.

        Returns:
            (sequences, T, vocabulary) float32 on the CPU.
        """
        import torch

        from compression_dags.checkpoints.gate import PROBE_TOKENS, load_stock, probe_ids

        model = load_stock(source.path, device=device, dtype=dtype)
        if ids is None:
            ids = probe_ids(model.config.vocab_size, getattr(model.config, "max_position_embeddings", PROBE_TOKENS))
        inputs = compression_scheme(self).input_activations
        rounded = rounded or self._rounder(source, device)
        with torch.inference_mode():
            for name in projections(source, self):
                linear = model.get_submodule(name)
                linear.weight.copy_(self._as_loaded(rounded(name).to(device), getattr(torch, dtype)))
                if inputs is not None:
                    linear.register_forward_pre_hook(functools.partial(_round_input, inputs))
            return model(ids.to(device)).logits.float().cpu()

    def _as_loaded(self, rounded: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """Ŵ with the arithmetic of the loader that will read it: in the stored scales' dtype, or in the model's."""
        import torch

        if self.format.kind == "fp4":
            return rounded.dequantize(torch.float32).to(torch.bfloat16).to(dtype)
        early = self.dequantize_on_load and rebuilds_while_loading()
        return rounded.dequantize(rounded.scales.scale.dtype).to(dtype) if early else rounded.dequantize(dtype)


def _matches(entry: str, module: str) -> bool:
    """compressed-tensors' rule: an equal name, or `re:` and a pattern that matches from the start."""
    try:
        return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
    except re.error as error:
        raise InputError(f"ignore {entry!r} is not a regular expression: {error}") from None


def _round_input(args: Any, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Forward pre-hook: the input (…, T, in) rounded with one dynamic scale a token, by compressed-tensors."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scale, zero = compute_dynamic_scales_and_zp(inputs[0], args, module)
    return fake_quantize(inputs[0], scale, zero, args), *inputs[1:]


def rebuilds_while_loading() -> bool:
    """Whether `dequantize` acts on the stored tensors (transformers 5.23), not on the loaded model as it did before."""
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 23)


def input_dimensions(facts: StackFacts) -> dict[str, int]:
    """Input dimension of every projection of a layer, in the order in which they are evaluated."""
    config = facts.config
    heads = int(config["num_attention_heads"])
    of_group = {
        "attention_input": facts.hidden,
        "attention_output": heads * int(config.get("head_dim") or facts.hidden // heads),
        "mlp_input": facts.hidden,
        "mlp_output": int(config.get("intermediate_size") or config["ffn_dim"]),
    }
    return {f"{g.name} ({p})": of_group[g.name] for g in facts.architecture.groups for p in g.projections}


def projections(source: Checkpoint, stage: QuantizeStage) -> list[str]:
    """Full names of the modules to quantize, layer by layer."""
    a = source.architecture
    names = (a.layer_prefix(i) + p for i in range(source.num_layers) for p in a.projections())
    return [name for name in names if not any(_matches(entry, name) for entry in stage.ignore)]


def linear_modules(source: Checkpoint) -> list[str]:
    """Names of all `nn.Linear` modules of the model, in its order; no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.path))
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def compression_scheme(stage: QuantizeStage) -> QuantizationScheme:
    """compressed-tensors' own preset, with our group size and symmetry."""
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    scheme = preset_name_to_scheme(stage.scheme, ["Linear"])
    scheme.format = CompressionFormat(stage.format.name)
    if stage.format.free:
        group = stage.effective_group
        assert scheme.weights is not None
        choice = {"strategy": "group" if group else "channel", "group_size": group, "symmetric": stage.symmetric}
        scheme.weights = QuantizationArgs.model_validate({**scheme.weights.model_dump(), **choice})
    return scheme


def quantization_config(stage: QuantizeStage, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json as `ModelCompressor.update_config` writes it, and `dequantize` if needed."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": compression_scheme(stage)},
        format=stage.format.name,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    head = {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}
    extra = {"dequantize": True} if stage.dequantize_on_load else {}
    return {**head, **config.model_dump(mode="json"), **extra}


def packed_layout(stage: QuantizeStage, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for one `weight` on disk: local name → (safetensors dtype, shape).

    Args:
        shape: (out, in) of the dense weight.
        dtype: safetensors' name of its dtype, in which integer and FP8 schemes store their scales.
    """
    rows, columns = shape
    groups, bits = columns // (stage.effective_group or columns), stage.format.bits
    scale = {"weight_scale": (dtype, (rows, groups))}
    match stage.format.name:
        case "int-quantized" | "float-quantized" as name:
            return {"weight": ("I8" if name == "int-quantized" else "F8_E4M3", (rows, columns)), **scale}
        case "nvfp4-pack-quantized":
            scale = {"weight_scale": ("F8_E4M3", (rows, groups)), "weight_global_scale": ("F32", (1,))}
            return {"weight_packed": ("U8", (rows, columns // 2)), **scale}
    packed = {"weight_packed": ("I32", (rows, -(-columns * bits // 32))), **scale, "weight_shape": ("I64", (2,))}
    if not stage.symmetric:
        packed["weight_zero_point"] = ("I32", (-(-rows * bits // 32), groups))
    return packed


def pack(rounded: Rounded, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """The local tensors of a compressed module, on the CPU.

    compressed-tensors rounds once more while packing. Given Ŵ and its scales in float32 that finds the same codes: the
    quotient is off by an ulp, never by half a step. (In bfloat16 it could be: 127·s has 8 bits too few.)
    """
    from compressed_tensors.compressors import BaseCompressor

    scales = rounded.scales
    state = {"weight": rounded.dequantize(), "weight_scale": scales.scale.float()}
    optional = {"weight_zero_point": scales.zero_point, "weight_global_scale": scales.global_scale}
    state |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    tensors = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)  # pyright: ignore[reportArgumentType]
    stored = {"weight_scale": scales.scale.dtype}
    return {name: t.to("cpu", stored.get(name, t.dtype)).contiguous() for name, t in tensors.items() if t is not None}


class _Packer:
    """Streams a checkpoint through one stage: a module is rounded when the writer asks for its first tensor."""

    def __init__(
        self,
        stage: QuantizeStage,
        source: Checkpoint,
        rounded: Rounder,
        evidence: Mapping[str, dict[str, Any]],
        device: str,
        track: Track,
    ):
        self.stage, self.source, self.rounded, self.evidence = stage, source, rounded, evidence
        self.device = device
        self.scheme = compression_scheme(stage)
        self.linear = linear_modules(source)
        self.layouts = {name: self._layout(name) for name in projections(source, stage)}
        self.errors: dict[str, float] = {}
        self.progress = iter(track(self.layouts, "round and pack", len(self.layouts)))
        # One module at a time: its tensors are neighbours in the plan.
        self.packed = functools.lru_cache(maxsize=1)(self._pack)

    def write(self, directory: Path) -> QuantizedModel:
        ignore = [name for name in self.linear if name not in self.layouts]
        config = {**self.source.raw_config, "quantization_config": quantization_config(self.stage, ignore)}
        planned: dict[str, PlannedTensor] = {}
        for name in self.source.tensors:
            module = name.removesuffix(".weight")
            planned.update(self._planned(module) if module in self.layouts else {name: unchanged(self.source, name)})
        checkpoint = write_checkpoint(directory, self.source, config, planned)
        next(self.progress, None)  # past the end: a progress bar closes
        after = {m: sum(planned[f"{m}.{local}"].nbytes for local in layout) for m, layout in self.layouts.items()}
        numel = sum(self.source.tensors[f"{module}.weight"].numel for module in after)
        bits = 8 * sum(after.values()) / numel
        return QuantizedModel(checkpoint, self._decisions(after), bits, self.rounded)

    def _layout(self, module: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        info = self.source.tensors.get(f"{module}.weight")
        if info is None or module not in self.linear or len(info.shape) != 2:
            raise IntegrityError(f"{module} is not a Linear module with a weight on disk; it cannot be quantized")
        if info.dtype not in {"F32", "F16", "BF16"}:
            raise InputError(f"{info.name} is stored as {info.dtype}; only F32, F16 and BF16 weights can be quantized")
        return packed_layout(self.stage, info.shape, info.dtype)

    def _planned(self, module: str) -> Iterator[tuple[str, PlannedTensor]]:
        for local, (dtype, shape) in self.layouts[module].items():
            load = functools.partial(lambda module, local: self.packed(module)[local], module, local)
            yield f"{module}.{local}", PlannedTensor(dtype, shape, load)

    def _pack(self, module: str) -> dict[str, torch.Tensor]:
        name = f"{module}.weight"
        rounded = self.rounded(module)
        self.errors[module] = rounded.relative_error(self.source.tensor(name).to(self.device))
        tensors, layout = pack(rounded, self.scheme), self.layouts[module]
        if {n: tuple(t.shape) for n, t in tensors.items()} != {n: shape for n, (_, shape) in layout.items()}:
            raise IntegrityError(f"compressed-tensors packed {name} as {sorted(tensors)}, expected {sorted(layout)}")
        next(self.progress, None)
        return tensors

    def _decisions(self, after: dict[str, int]) -> list[Decision]:
        stage, rows = self.stage, []
        options = {"bits": stage.format.bits, "group_size": stage.effective_group, **stage.model_dump(include=SHOWN)}
        for module in (*self._embeddings(), *self.linear):
            layer, info = self.source.architecture.split_name(module)[0], self.source.tensors.get(f"{module}.weight")
            before = info.nbytes if info else 0  # a tied head is stored nowhere
            evidence = {"bytes_before": before, "bytes_after": after.get(module, before)}
            own = {**options, **self.evidence.get(module, {})}
            action, more = ("quantize", own) if module in after else ("keep", {"tied": info is None})
            origin, error = [] if layer is None else [layer], self.errors.get(module)
            row = Decision("quantize", stage.method, len(rows), module, action, origin, error, UNIT, evidence | more)
            rows.append(row)
        return rows

    def _embeddings(self) -> list[str]:
        """Matrices outside the layers that are no Linear modules."""
        outside = {n.removesuffix(".weight"): self.source.tensors[n] for n in self.source.outside_layers()}
        return [name for name, info in outside.items() if len(info.shape) == 2 and name not in self.linear]
