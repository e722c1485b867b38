"""How a rounded model becomes a compressed-tensors checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from transformers import AutoConfig

from compression_dags.architectures.tracing import auto_class
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.checkpoints.writer import PlannedTensor, unchanged, write_checkpoint
from compression_dags.errors import InputError, IntegrityError
from compression_dags.provenance.decisions import Decision
from compression_dags.quantization.formats import Choice, Layout
from compression_dags.quantization.reasons import why_kept, why_scheme
from compression_dags.quantization.results import QuantizedModel, Rounding
from compression_dags.quantization.schemes import needs_rebuilding
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.stage import Progress

if TYPE_CHECKING:
    import torch

    from compression_dags.solvers.rounding import Rounded

UNIT = "relative weight error"
MIXED = "mixed-precision"


def linear_modules(source: Checkpoint) -> list[str]:
    """Names of all `nn.Linear` modules of the model, in its order; no weights are read."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source.path)
        model = auto_class(config).from_config(config)
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def quantization_config(choices: Mapping[str, Choice], ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json as `ModelCompressor.update_config` writes it, and `dequantize` if needed.

    One scheme targets every Linear that is not ignored; several name their modules, a config group each.
    """
    schemes = list(dict.fromkeys(choices.values()))
    targets = {c: tuple(n for n, own in choices.items() if own == c) for c in schemes}
    names = {c.format.name for c in schemes}
    config = QuantizationConfig(
        config_groups={
            f"group_{i}": c.compression_scheme(targets[c] if len(schemes) > 1 else ("Linear",))
            for i, c in enumerate(schemes)
        },
        format=names.pop() if len(names) == 1 else MIXED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    head = {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}
    extra = {"dequantize": True} if needs_rebuilding(choices) else {}
    return {**head, **config.model_dump(mode="json"), **extra}


def pack(rounded: Rounded, choice: Choice) -> dict[str, torch.Tensor]:
    """The local tensors of a compressed module, on the CPU.

    compressed-tensors rounds once more while packing. Given Ŵ and its scales in float32 that finds the same codes: the
    quotient is off by an ulp, never by half a step. (In bfloat16 it could be: 127·s has 8 bits too few.)
    """
    scheme = choice.compression_scheme()
    scales, stored = rounded.scales, rounded.scales.scale.dtype
    scale = scales.scale[:: choice.format.block_rows]
    state = {"weight": rounded.dequantize(), "weight_scale": scale.float()}
    optional = {"weight_zero_point": scales.zero_point, "weight_global_scale": scales.global_scale}
    state |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    tensors = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)  # pyright: ignore[reportArgumentType]
    kept = {} if choice.format.scaling == "mx" else {"weight_scale": stored}
    return {name: t.to("cpu", kept.get(name, t.dtype)).contiguous() for name, t in tensors.items() if t is not None}


class Packer:
    """Streams a checkpoint through one stage: a module is rounded when the writer asks for its first tensor."""

    def __init__(self, stage: QuantizeStage, source: Checkpoint, rounding: Rounding, device: str, progress: Progress):
        self.stage, self.source, self.rounding, self.device = stage, source, rounding, device
        self.linear = linear_modules(source)
        self.layouts = {name: self._layout(name) for name in rounding.choices}
        self.errors: dict[str, float] = {}
        self.progress = iter(progress(self.layouts, "round and pack", len(self.layouts)))
        # One module at a time: its tensors are neighbours in the plan.
        self.packed = functools.lru_cache(maxsize=1)(self._pack)

    def write(self, directory: Path) -> QuantizedModel:
        ignore = [name for name in self.linear if name not in self.layouts]
        quantized = quantization_config(self.rounding.choices, ignore)
        config = {**self.source.raw_config, "quantization_config": quantized}
        planned: dict[str, PlannedTensor] = {}
        for name in self.source.tensors:
            module = name.removesuffix(".weight")
            planned.update(self._planned(module) if module in self.layouts else {name: self._kept(name)})
        checkpoint = write_checkpoint(directory, self.source, config, planned)
        next(self.progress, None)  # past the end: a progress bar closes
        after = {m: sum(planned[f"{m}.{local}"].nbytes for local in layout) for m, layout in self.layouts.items()}
        numel = sum(self.source.tensors[f"{module}.weight"].numel for module in after)
        bits = 8 * sum(after.values()) / numel
        return QuantizedModel(checkpoint, self._decisions(after), bits, self.rounding)

    def _kept(self, name: str) -> PlannedTensor:
        changed = self.rounding.changed.get(name)
        if changed is None:
            return unchanged(self.source, name)
        info = self.source.tensors[name]
        return PlannedTensor(info.dtype, info.shape, lambda: changed)

    def _layout(self, module: str) -> Layout:
        info = self.source.tensors.get(f"{module}.weight")
        if info is None or module not in self.linear or len(info.shape) != 2:
            raise IntegrityError(f"{module} is not a Linear module with a weight on disk; it cannot be quantized")
        if info.dtype not in {"F32", "F16", "BF16"}:
            raise InputError(f"{info.name} is stored as {info.dtype}; only F32, F16 and BF16 weights can be quantized")
        return self.rounding.choices[module].layout(info.shape, info.dtype)

    def _planned(self, module: str) -> Iterator[tuple[str, PlannedTensor]]:
        for local, (dtype, shape) in self.layouts[module].items():
            load = functools.partial(lambda module, local: self.packed(module)[local], module, local)
            yield f"{module}.{local}", PlannedTensor(dtype, shape, load)

    def _pack(self, module: str) -> dict[str, torch.Tensor]:
        name = f"{module}.weight"
        rounded = self.rounding.rounded(module)
        own = self.rounding.evidence.get(module, {})
        if "weight_error" in own:
            self.errors[module] = own["weight_error"]
        else:
            self.errors[module] = rounded.relative_error(self.source.tensor(name).to(self.device))
        tensors, layout = pack(rounded, self.rounding.choices[module]), self.layouts[module]
        if {n: tuple(t.shape) for n, t in tensors.items()} != {n: shape for n, (_, shape) in layout.items()}:
            raise IntegrityError(f"compressed-tensors packed {name} as {sorted(tensors)}, expected {sorted(layout)}")
        next(self.progress, None)
        return tensors

    def _decisions(self, after: dict[str, int]) -> list[Decision]:
        stage, rows = self.stage, []
        for module in (*self._embeddings(), *self.linear):
            layer, info = self.source.architecture.split_name(module)[0], self.source.tensors.get(f"{module}.weight")
            before = info.nbytes if info else 0  # a tied head is stored nowhere
            evidence = {"bytes_before": before, "bytes_after": after.get(module, before)}
            kept = module not in after
            action, more = ("keep", self._kept_because(module)) if kept else ("quantize", self._quantized(module))
            origin, error = [] if layer is None else [layer], self.errors.get(module)
            reason = why_kept(stage, module, layer, info is None, module in self.linear) if kept else self._why(module)
            evidence |= more
            rows.append(
                Decision("quantize", stage.method, len(rows), module, action, origin, error, UNIT, reason, evidence)
            )
        return rows

    def _why(self, module: str) -> str:
        """Why a module got its scheme."""
        columns = self.source.tensors[f"{module}.weight"].shape[1]
        own = self.rounding.evidence.get(module, {})
        return why_scheme(self.stage, module, self.rounding.choices[module], columns, own)

    def _quantized(self, module: str) -> dict[str, Any]:
        choice, asked = self.rounding.choices[module], self.stage.asked(module)
        named = {"scheme": choice.scheme, "bits": choice.format.bits, "group_size": choice.group_size}
        named["symmetric"] = choice.symmetric
        if choice != asked and self.stage.bits is None:
            named["asked"] = self._asked(module)
        own = self.rounding.evidence.get(module, {})
        return named | {k: v for k, v in own.items() if k != "weight_error"}

    def _kept_because(self, module: str) -> dict[str, Any]:
        tied, stage = f"{module}.weight" not in self.source.tensors, self.stage
        if tied or stage.bits is not None or module not in stage.wished(self.source.shape):
            return {"tied": tied}
        return {"tied": False, "asked": self._asked(module)}

    def _asked(self, module: str) -> str:
        asked, columns = self.stage.asked(module), self.source.tensors[f"{module}.weight"].shape[1]
        if asked.fits(columns):
            return f"{asked.scheme}, group size {asked.group_size}, which does not divide other matrices' inputs"
        return f"{asked.scheme}, group size {asked.group_size}, which does not divide"

    def _embeddings(self) -> list[str]:
        """Matrices outside the layers that are no Linear modules."""
        outside = {n.removesuffix(".weight"): self.source.tensors[n] for n in self.source.outside_layers()}
        return [name for name, info in outside.items() if len(info.shape) == 2 and name not in self.linear]
