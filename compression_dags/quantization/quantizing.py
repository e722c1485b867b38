"""A quantizer's run over a model: with or without calibration tokens, and the in-memory reference of the gate."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.gate import load_stock, probe_of
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.provenance.resume import ResumePoint
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.packing import Packer
from compression_dags.quantization.results import QuantizedModel, Rounding
from compression_dags.quantization.rounding_pass import RoundingPass
from compression_dags.quantization.schemes import needs_rebuilding, rebuilds_while_loading
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.solvers.rounding import Rounded
from compression_dags.stage import Progress, silent


def quantize(
    stage: QuantizeStage,
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
    """The quantized checkpoint; see `QuantizeStage.quantize`."""
    stage.check(source.shape)
    if stage.reads_tokens and blocks is None:
        raise InputError(f"quantize: {stage.method} needs calibration tokens; none were given")
    if stage.bits and schemes is None:
        raise InputError(f"quantize: bits: {stage.bits:g} needs a plan of schemes; none was given")
    choices = dict(schemes) if schemes is not None else stage.choices(source.shape)
    fp4 = next((c.scheme for c in choices.values() if c.format.kind == "fp4"), None)
    if fp4 and dtype != "bfloat16" and not rebuilds_while_loading():
        raise InputError(f"{fp4} in {dtype} needs transformers >= 5.23; older ones load it in bfloat16 only")
    if not stage.reads_tokens:
        return Packer(stage, source, _directly(stage, source, choices, device), device, progress).write(directory)
    run = RoundingPass(stage, source, choices, blocks, device, dtype)
    run.run_layers(resume, progress)
    return Packer(stage, source, run.rounding(device), device, progress).write(directory)


def _directly(stage: QuantizeStage, source: Checkpoint, choices: Mapping[str, Choice], device: str) -> Rounding:
    return Rounding(choices, lambda name: stage.round_weight(source, f"{name}.weight", device, choices[name]))


def reference_logits(
    stage: QuantizeStage,
    source: Checkpoint,
    ids: torch.Tensor | None = None,
    *,
    rounding: Rounding | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> torch.Tensor:
    """Logits of the rounded model in memory; see `QuantizeStage.reference_logits`."""
    model = load_stock(source.path, device=device, dtype=dtype)
    if ids is None:
        ids = probe_of(model)
    rounding = rounding or _directly(stage, source, stage.choices(source.shape), device)
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


def _as_loaded(rounded: Rounded, choice: Choice, dtype: torch.dtype, early: bool) -> torch.Tensor:
    """Ŵ with the arithmetic of the loader that will read it: in the stored scales' dtype, or in the model's."""
    if choice.format.kind == "fp4":
        return rounded.dequantize(torch.float32).to(torch.bfloat16).to(dtype)
    return rounded.dequantize(rounded.scales.scale.dtype).to(dtype) if early else rounded.dequantize(dtype)


def _round_input(args: Any, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Forward pre-hook: the input (…, T, in) rounded with dynamic scales, by compressed-tensors."""
    scale, zero = compute_dynamic_scales_and_zp(inputs[0], args, module)
    return fake_quantize(inputs[0], scale, zero, args), *inputs[1:]
