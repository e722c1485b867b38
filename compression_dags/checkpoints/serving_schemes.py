"""Schemes of compressed-tensors that vLLM has a class for, and the tensors that each expects on disk.

Read from vLLM 0.33.0, `compressed_tensors.py: _get_scheme_from_parts` and `schemes/*.py: create_weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compression_dags.errors import InputError

#: `CompressionFormat` of compressed-tensors 0.17, which vLLM 0.33 pins, without the sparse ones that it dropped.
FORMATS = (
    "dense",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "mixed-precision",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
#: Fields of `QuantizationArgs` in compressed-tensors 0.17; it refuses any other.
ARGUMENTS = frozenset(
    {
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
        *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    }
)
#: Names that tensors of a compressed module may have.
LOCAL_NAMES = frozenset(
    {
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
        *("weight_g_idx", "input_scale", "input_zero_point", "input_global_scale"),
    }
)
FLOATS = ("F32", "F16", "BF16")
_FP8_STRATEGIES = {"tensor", "channel", "block"}
_FLOAT_FORMATS = {"float-quantized", "naive-quantized"}

#: Local name → (dtypes allowed, none meaning any; shape, None meaning any).
Layout = dict[str, tuple[tuple[str, ...], tuple[int, ...] | None]]


@dataclass(frozen=True)
class Arguments:
    """How weights or inputs are rounded: `QuantizationArgs`."""

    bits: int
    type: str
    strategy: str | None
    group_size: int | None
    block: tuple[int, ...] | None
    symmetric: bool
    dynamic: bool
    actorder: str | None
    scale_dtype: str | None


@dataclass(frozen=True)
class Group:
    """One of `config_groups`."""

    name: str
    format: str | None
    weights: Arguments
    inputs: Arguments | None
    targets: tuple[str, ...]

    @property
    def scheme(self) -> tuple[str | None, Arguments, Arguments | None]:
        """What must be equal in matrices that are fused."""
        return self.format, self.weights, self.inputs

    @property
    def holds(self) -> frozenset[str]:
        """Names of the tensors that a module of this group has, beside its bias."""
        names = {"weight_scale"}
        if self.format == "pack-quantized":
            names |= {"weight_packed", "weight_shape"} | (
                {"weight_zero_point"} if not self.weights.symmetric else set()
            )
        elif self.format in {"nvfp4-pack-quantized", "mxfp4-pack-quantized"}:
            names |= {"weight_packed"}
        else:
            names |= {"weight"}
        if self.format == "nvfp4-pack-quantized":
            names |= {"weight_global_scale"} | ({"input_global_scale"} if self.inputs else set())
        elif self.inputs and not self.inputs.dynamic:
            names |= {"input_scale"} | ({"input_zero_point"} if not self.inputs.symmetric else set())
        return frozenset(names)


def parse_group(name: str, raw: dict[str, Any], default_format: str | None) -> Group:
    """A config group; its own format counts before the checkpoint's.

    Raises:
        InputError: fields that compressed-tensors 0.17 does not know; no weights; no targets; rounded outputs.
    """
    targets = raw.get("targets")
    if not targets or not raw.get("weights"):
        raise InputError(f"targets {targets!r}, weights {raw.get('weights')!r}; allowed: at least one target, weights")
    if raw.get("output_activations"):
        raise InputError(f"output_activations {raw['output_activations']} are not checked; allowed: null")
    inputs = raw.get("input_activations")
    format = raw.get("format") or default_format
    return Group(name, format, _arguments(raw["weights"]), _arguments(inputs) if inputs else None, tuple(targets))


def _arguments(raw: dict[str, Any]) -> Arguments:
    if unknown := sorted(raw.keys() - ARGUMENTS):
        raise InputError(f"fields {', '.join(unknown)}; allowed: {', '.join(sorted(ARGUMENTS))}")
    strategy, size, block = raw.get("strategy"), raw.get("group_size"), raw.get("block_structure")
    if strategy is None:  # compressed-tensors infers it
        strategy = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    order = "group" if raw.get("actorder") is True else raw.get("actorder") or None
    return Arguments(
        bits=int(raw.get("num_bits", 8)),
        type=str(raw.get("type", "int")),
        strategy=strategy,
        group_size=size if size and size > 0 else None,
        block=tuple(block) if block else None,
        symmetric=bool(raw.get("symmetric", True)),
        dynamic=bool(raw.get("dynamic", False)),
        actorder=order,
        scale_dtype=raw.get("scale_dtype"),
    )


# -- schemes ---------------------------------------------------------------------------------------------------------


def _static_weights(w: Arguments, kind: str, bits: range | tuple[int, ...], *strategies: str) -> bool:
    return w.type == kind and w.bits in bits and w.strategy in strategies and not w.dynamic


def _fp8_weights(group: Group) -> bool:
    weights = _static_weights(group.weights, "float", (8,), *_FP8_STRATEGIES)
    return weights and group.weights.symmetric and group.format in _FLOAT_FORMATS


def _packed(group: Group, bits: range | tuple[int, ...] = range(2, 9)) -> bool:
    return group.format == "pack-quantized" and _static_weights(group.weights, "int", bits, "group", "channel")


def _wn_a16(group: Group) -> bool:
    return _packed(group) and group.inputs is None


def _wn_int(group: Group) -> bool:
    a = group.inputs
    rounded = a is not None and a.type == "int" and a.bits in (4, 8) and a.symmetric and a.dynamic
    return _packed(group) and rounded and a is not None and a.strategy in {"token", "group"}


def _w4_afp8(group: Group) -> bool:
    a, w = group.inputs, group.weights
    rounded = a is not None and a.type == "float" and a.bits == 8 and a.symmetric and a.dynamic
    return _packed(group, (4,)) and rounded and a is not None and a.strategy == "token" and _grouped_symmetric(w)


def _grouped_symmetric(w: Arguments) -> bool:
    return w.strategy == "group" and w.symmetric


def _w8_a8_int(group: Group) -> bool:
    a, w = group.inputs, group.weights
    if a is None or a.type != "int" or a.bits != 8 or group.format not in {"int-quantized", "naive-quantized"}:
        return False
    inputs = a.strategy == ("token" if a.dynamic else "tensor")
    return inputs and w.symmetric and _static_weights(w, "int", (8,), "tensor", "channel")


def _w8_a8_fp8(group: Group) -> bool:
    a = group.inputs
    if a is None or a.type != "float" or a.bits != 8 or not _fp8_weights(group):
        return False
    return a.dynamic or (a.symmetric and a.strategy == "tensor" and group.weights.strategy != "block")


def _w8_a16_fp8(group: Group) -> bool:
    return group.inputs is None and _fp8_weights(group)


def _nvfp4(a: Arguments) -> bool:
    return (a.type, a.bits, a.strategy, a.group_size, a.symmetric) == ("float", 4, "tensor_group", 16, True)


def _is_nvfp4(group: Group) -> bool:
    whole = _nvfp4(group.weights) and (group.inputs is None or _nvfp4(group.inputs))
    return whole and group.format == "nvfp4-pack-quantized"


def _is_mxfp4(group: Group) -> bool:
    w = group.weights
    whole = (w.type, w.bits, w.strategy, w.group_size, w.symmetric) == ("float", 4, "group", 32, True)
    return whole and group.format == "mxfp4-pack-quantized" and (group.inputs is None or group.inputs.dynamic)


def _is_mxfp8(group: Group) -> bool:
    w = group.weights
    whole = (w.type, w.bits, w.strategy, w.group_size, w.symmetric) == ("float", 8, "group", 32, True)
    return whole and w.scale_dtype == "torch.uint8" and group.format == "mxfp8-quantized"


#: What a finding calls it → whether a group is one.
SCHEMES: dict[str, Callable[[Group], bool]] = {
    "W2A16 to W8A16 (int, group or channel, pack-quantized)": _wn_a16,
    "W2 to W8 with int8 or int4 inputs (dynamic, symmetric, token or group, pack-quantized)": _wn_int,
    "W4AFP8 (int4, group, symmetric, pack-quantized)": _w4_afp8,
    "W8A8 (int, symmetric, channel or tensor, int-quantized)": _w8_a8_int,
    "FP8 with FP8 inputs (symmetric, channel, tensor or block, float-quantized)": _w8_a8_fp8,
    "FP8 weights only (symmetric, channel, tensor or block, float-quantized)": _w8_a16_fp8,
    "NVFP4, NVFP4A16 (tensor_group of 16, symmetric, nvfp4-pack-quantized)": _is_nvfp4,
    "MXFP4, MXFP4A16 (group of 32, symmetric, mxfp4-pack-quantized)": _is_mxfp4,
    "MXFP8 (group of 32, symmetric, uint8 scales, mxfp8-quantized)": _is_mxfp8,
}


def refusal(group: Group) -> str | None:
    """Why vLLM has no kernel class for the group, in one line; None if it has one."""
    if group.weights.actorder in {"group", "dynamic"}:
        return f"actorder {group.weights.actorder!r}; allowed: null, 'static' or 'weight'"
    if group.format not in FORMATS:
        return f"format {group.format!r}; allowed: {', '.join(FORMATS)}"
    if any(known(group) for known in SCHEMES.values()):
        return None
    return f"{_described(group)} is no scheme of vLLM; allowed: {'; '.join(SCHEMES)}"


def _described(group: Group) -> str:
    w, a = group.weights, group.inputs
    parts = [f"{w.type}{w.bits} weights", str(w.strategy)]
    parts += [f"group_size {w.group_size}"] if w.group_size else []
    parts += [] if w.symmetric else ["asymmetric"]
    parts += [f"{a.type}{a.bits} inputs, {a.strategy}{'' if a.symmetric else ', asymmetric'}"] if a else []
    return ", ".join([*parts, f"format {group.format}"])


# -- tensors ---------------------------------------------------------------------------------------------------------


def dense_shape(
    group: Group, shapes: dict[str, tuple[int, ...]], stated: tuple[int, ...] | None
) -> tuple[int, int] | None:
    """(out, in) of the matrix that a module's tensors stand for; None if the tensors do not tell.

    Args:
        shapes: local name → shape.
        stated: the values of `weight_shape`.
    """
    if group.format == "pack-quantized":
        return (stated[0], stated[1]) if stated is not None and len(stated) == 2 else None
    packed = group.format in {"nvfp4-pack-quantized", "mxfp4-pack-quantized"}
    found = shapes.get("weight_packed" if packed else "weight")
    if found is None or len(found) != 2:
        return None
    return (found[0], found[1] * 2) if packed else (found[0], found[1])


def layout(group: Group, shape: tuple[int, int]) -> Layout:
    """Tensors that must stand for a matrix of `shape` (out, in), without its bias."""
    rows, columns = shape
    w = group.weights
    groups = columns // w.group_size if w.group_size else 1
    every: Layout = {
        "weight": (("I8",) if w.type == "int" else ("F8_E4M3",), shape),
        "weight_packed": (("U8",), (rows, columns // 2)),
        "weight_scale": (FLOATS, (rows, groups)),
        "weight_shape": (("I64",), (2,)),
        "weight_zero_point": (("I32",), (-(-rows * w.bits // 32), groups)),
        "weight_global_scale": (("F32",), (1,)),
        "input_global_scale": (("F32",), (1,)),
        "input_scale": (FLOATS, None),
        "input_zero_point": ((), None),
    }
    if group.format == "pack-quantized":
        every["weight_packed"] = (("I32",), (rows, -(-columns * w.bits // 32)))
    if group.format == "nvfp4-pack-quantized":
        every["weight_scale"] = (("F8_E4M3",), (rows, groups))
    if group.format in {"mxfp4-pack-quantized", "mxfp8-quantized"}:
        every["weight_scale"] = (("U8",), (rows, groups))
    if w.block:
        every["weight_scale"] = (FLOATS, (-(-rows // w.block[0]), -(-columns // w.block[1])))
    if w.strategy == "tensor":
        every["weight_scale"] = (FLOATS, (1,))
    return {name: every[name] for name in group.holds}
