"""Would vLLM serve this directory? Its loader's rules, checked on config.json and the safetensors headers alone.

The rules are those of vLLM 0.33.0 (`model_executor/layers/quantization/compressed_tensors/` and the parameter classes
it fills), which pins compressed-tensors 0.17.0. What a GPU's age allows is not checked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from compression_dags.checkpoints.reader import INDEX, Checkpoint, TensorInfo
from compression_dags.checkpoints.serving_schemes import (
    FLOATS,
    FORMATS,
    LOCAL_NAMES,
    Group,
    Layout,
    dense_shape,
    layout,
    parse_group,
    refusal,
)
from compression_dags.errors import InputError, IntegrityError

METHOD = "compressed-tensors"
#: Group of projections → what vLLM calls the one module that it makes of them.
FUSED = {"attention_input": "qkv_proj", "mlp_input": "gate_up_proj"}
#: Part of the names of all its linear classes (`RowParallelLinear`, …); it looks for a target in them.
_CLASS = "parallellinear"
#: Tensors of no layer: embeddings, the last norm.
_OUTSIDE = r"\.(embed_tokens|embed_positions|norm|final_layer_norm)\.(weight|bias)$"
SHOWN = 5


@dataclass(frozen=True)
class Findings:
    """What is wrong, one line each: the module, the value, what is allowed.

    Attributes:
        damaged: the files contradict config.json or themselves (leftovers, missing tensors, shapes): no reader is safe.
        refused: whole, but vLLM stops, or serves other weights than those stored.
    """

    damaged: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.damaged or self.refused)

    @property
    def lines(self) -> list[str]:
        return [*self.damaged, *self.refused]


def examine(path: str | Path) -> Findings:
    """All findings of a checkpoint directory; none for a dense one.

    Raises:
        InputError: not a readable checkpoint, or of a family that this project does not know.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.raw_config.get("quantization_config")
    if config is None:
        return Findings(tuple(_stray(checkpoint)), tuple(_unlisted(checkpoint)))
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        method = config.get("quant_method") if isinstance(config, dict) else config
        return Findings(refused=(f"quant_method {method!r}; allowed: {METHOD!r}",))
    return _Examination(checkpoint, config).findings()


def lint(path: str | Path) -> list[str]:
    """Everything that keeps vLLM from serving `path` as it is meant; empty if nothing does. Errors: see `examine`."""
    return examine(path).lines


def require_servable(path: str | Path) -> None:
    """
    Raises:
        IntegrityError: with the first findings.
        InputError: see `examine`.
    """
    if found := lint(path):
        raise IntegrityError(f"{path} cannot be served by vLLM: {_joined(found)}")


def serving_fact(path: str | Path) -> str:
    """`"ok"`, or why vLLM would not serve it: what the artifact's metadata says.

    Raises:
        IntegrityError: the files are damaged, which is nobody's choice of a scheme.
        InputError: see `examine`.
    """
    found = examine(path)
    if found.damaged:
        raise IntegrityError(f"{path} is not a whole {METHOD} checkpoint: {_joined(found.damaged)}")
    return _joined(found.refused) or "ok"


def _joined(lines: Iterable[str]) -> str:
    lines = list(lines)
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])


def _stray(checkpoint: Checkpoint) -> Iterator[str]:
    """Tensors of compressed modules in a checkpoint that says it has none."""
    for name in checkpoint.tensors:
        if name.rpartition(".")[2] in LOCAL_NAMES - {"weight"}:
            yield f"{name}: a quantized tensor, but config.json has no quantization_config"


def _unlisted(checkpoint: Checkpoint) -> Iterator[str]:
    """Files that vLLM would read though no tensor of the model is in them: without an index it takes all."""
    if (checkpoint.path / INDEX).is_file():
        return
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        if file.name not in checkpoint.files:
            yield f"{file.name}: vLLM reads every .safetensors file of a directory without {INDEX}"


class _Examination:
    """One quantized checkpoint, its config groups and what was found so far."""

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any]):
        self.checkpoint, self.config = checkpoint, config
        self.architecture, self.shape = checkpoint.architecture, checkpoint.stated_shape
        self.ignore = [str(entry) for entry in config.get("ignore") or ()]
        self.damaged: list[str] = []
        self.refused: list[str] = []

    def findings(self) -> Findings:
        self._check_config()
        self.refused.extend(_unlisted(self.checkpoint))
        if self.architecture.experts is not None:
            self.refused.append(f"model_type {self.architecture.model_type!r}: quantized experts are not checked")
        elif self.groups:
            for module in self.modules:
                self._check_module(module)
            for fused, shards in self._fused():
                self._check_fused(fused, shards)
            self._check_unknown()
        return Findings(tuple(self.damaged), tuple(self.refused))

    # -- config.json ---------------------------------------------------------------------------------------------------

    def _check_config(self) -> None:
        refuse = self.refused.append
        if self.config.get("sparsity_config"):
            refuse(f"sparsity_config {self.config['sparsity_config']}; allowed: empty or absent")
        if self.config.get("kv_cache_scheme"):
            refuse(f"kv_cache_scheme {self.config['kv_cache_scheme']} is not checked; allowed: null")
        if self.config.get("format") not in FORMATS:
            refuse(f"format {self.config.get('format')!r}; allowed: {', '.join(FORMATS)}")
        if not self.config.get("config_groups"):
            refuse("config_groups is empty; allowed: one group or more")
        for group in self.groups:
            if reason := refusal(group):
                refuse(f"{group.name}: {reason}")

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Config groups that can be read; the others are findings."""
        found = []
        for name, raw in (self.config.get("config_groups") or {}).items():
            try:
                found.append(parse_group(str(name), raw, self.config.get("format")))
            except InputError as error:
                self.refused.append(f"{name}: {error}")
        return found

    # -- which group a module gets -------------------------------------------------------------------------------------

    @property
    def modules(self) -> list[str]:
        """The `Linear` modules: every projection of every layer, and the head."""
        layers = range(self.shape.layers)
        prefix, own = self.architecture.layer_prefix, self.architecture.projections_of
        inside = [prefix(i) + p for i in layers for p in own(i)]
        return [*inside, "lm_head"]

    def _ignored(self, module: str) -> bool:
        return any(_matches(entry, module) for entry in self.ignore)

    @functools.cache  # noqa: B019 (lives as long as one examination)
    def _groups_of(self, module: str) -> tuple[Group, ...]:
        """Groups that name the module; if none does, those that name its class (compressed-tensors' precedence)."""
        named = tuple(g for g in self.groups if any(_matches(t, module) for t in g.targets))
        return named or tuple(g for g in self.groups if "Linear" in g.targets)

    def _group_in_vllm(self, fused: str, shards: list[str]) -> Group | None:
        """The group of a fused module: by its own name, by its shards' names (the first shard's), by its class."""
        targets = [(t, g) for g in self.groups for t in g.targets]
        own = next((g for t, g in targets if _matches(t, fused)), None)
        if own is not None:
            return own
        first = [next((g for t, g in targets if _matches(t, shard)), None) for shard in shards]
        if all(first):
            return first[0]
        return next((g for t, g in targets if not t.startswith("re:") and t.lower() in _CLASS), None)

    # -- one module ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def local(self) -> dict[str, dict[str, TensorInfo]]:
        """Module → local name → tensor."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.checkpoint.tensors.items():
            module, _, local = name.rpartition(".")
            found.setdefault(module, {})[local] = info
        return found

    def _check_module(self, module: str) -> None:
        tensors, groups = self.local.get(module, {}), self._groups_of(module)
        if self._ignored(module):
            tied = module == "lm_head" and not tensors
            self._check_tensors(module, {} if tied else {"weight": (FLOATS, None)}, "ignored")
        elif len(groups) == 1:
            self._check_quantized(module, tensors, groups[0])
        else:
            by = ", ".join(g.name for g in groups) or "no config group"
            self.refused.append(f"{module}: in `ignore`: no, matched by {by}; allowed: `ignore` or exactly one group")

    def _check_quantized(self, module: str, tensors: dict[str, TensorInfo], group: Group) -> None:
        if refusal(group):
            return  # one finding for the group; what its modules should hold is unknown
        if module == "lm_head" and not any(_matches(t, module) for t in group.targets):
            self.refused.append(
                f"lm_head: quantized through the target 'Linear', which vLLM's head is not; "
                f"allowed: in `ignore`, or a target of {group.name} by name"
            )
        shape = dense_shape(group, {name: info.shape for name, info in tensors.items()}, self._stored_shape(module))
        if shape is None:
            self._check_tensors(module, dict.fromkeys(sorted(group.holds), ((), None)), group.name)
            return
        for problem in self._misshapen(module, shape):
            self.damaged.append(f"{module}: {problem}")
        if group.weights.group_size and shape[1] % group.weights.group_size:
            self.refused.append(
                f"{module}: group_size {group.weights.group_size} of {group.name} does not divide its {shape[1]} inputs"
            )
            return
        self._check_tensors(module, layout(group, shape), group.name)

    def _stored_shape(self, module: str) -> tuple[int, ...] | None:
        """The values of `weight_shape`, if it is there."""
        return self._values(f"{module}.weight_shape", int)

    def _values(self, name: str, kind: type) -> tuple[Any, ...] | None:
        info = self.checkpoint.tensors.get(name)
        if info is None or info.dtype not in {"I64", "F32"}:
            return None
        with safe_open(self.checkpoint.path / info.file, framework="np") as file:
            return tuple(kind(value) for value in file.get_tensor(name).ravel())

    def _misshapen(self, module: str, shape: tuple[int, int]) -> Iterator[str]:
        """Dimensions that config.json states otherwise."""
        if self.architecture.kinds:
            layer, projection = self.architecture.split_name(module)
            kind = self.architecture.kinds[self.architecture.kind_of[layer or 0]]
            if (traced := dict(kind.shapes).get(f"{projection}.weight")) and tuple(traced) != tuple(shape):
                yield f"{' x '.join(map(str, shape))}; config.json makes it {' x '.join(map(str, traced))}"
            return
        config = self.shape.config
        hidden, between = self.shape.hidden, config.get("intermediate_size") or config.get("ffn_dim")
        stated = {"attention_input": (None, hidden), "attention_output": (hidden, None)}
        stated |= {"mlp_input": (between, hidden), "mlp_output": (hidden, between)}
        _, projection = self.architecture.split_name(module)
        for group in self.architecture.groups:
            if projection in group.projections:
                for axis, wanted, found in zip(("outputs", "inputs"), stated[group.name], shape, strict=True):
                    if wanted and wanted != found:
                        yield f"{found} {axis}; config.json says {wanted}"

    def _check_tensors(self, module: str, wanted: Layout, why: str) -> None:
        tensors = self.local.get(module, {})
        for name in wanted.keys() - tensors.keys():
            self.damaged.append(f"{module}.{name} is missing; {why} needs {', '.join(sorted(wanted))}")
        for name in tensors.keys() - wanted.keys() - {"bias"}:
            allowed = ", ".join(sorted(wanted)) or "no tensor"
            self.damaged.append(f"{module}.{name} is left over; {why} allows {allowed}")
        for name in wanted.keys() & tensors.keys():
            (dtypes, shape), info = wanted[name], tensors[name]
            if dtypes and info.dtype not in dtypes:
                self.damaged.append(f"{info.name} is {info.dtype}; {why} allows {' or '.join(dtypes)}")
            if shape is not None and info.shape != shape:
                self.damaged.append(f"{info.name} has the shape {list(info.shape)}; {why} needs {list(shape)}")

    def _check_unknown(self) -> None:
        """Tensors of no module of the architecture."""
        linear, norms = set(self.modules), self.architecture.norms
        for name in self.checkpoint.tensors:
            layer, rest = self.architecture.split_name(name)
            module, _, local = name.rpartition(".")
            if self.architecture.kinds:
                known = layer is None or module in linear or self._is_traced(layer, rest)
            elif layer is None:
                known = module in linear or re.search(_OUTSIDE, name)
            else:
                norm = local in {"weight", "bias"} and rest.rpartition(".")[0] in norms
                known = layer < self.shape.layers and (module in linear or norm)
            if not known:
                self.damaged.append(f"{name}: no module of a {self.shape.layers}-layer {self.architecture.model_type}")

    def _is_traced(self, layer: int, rest: str) -> bool:
        """Whether a discovered model's layer has this tensor; where names in memory are others, it may."""
        architecture = self.architecture
        if layer >= self.shape.layers:
            return False
        return bool(architecture.opaque) or rest in dict(architecture.kinds[architecture.kind_of[layer]].shapes)

    # -- modules that vLLM makes one -----------------------------------------------------------------------------------

    def _fused(self) -> Iterator[tuple[str, list[str]]]:
        for layer in range(self.shape.layers):
            for group in self.architecture.groups_of(layer):
                if group.name in FUSED and len(group.projections) > 1:
                    shards = [self.architecture.layer_prefix(layer) + p for p in group.projections]
                    yield f"{shards[0].rpartition('.')[0]}.{FUSED[group.name]}", shards

    def _check_fused(self, fused: str, shards: list[str]) -> None:
        ignored = [shard for shard in shards if self._ignored(shard)]
        if ignored and len(ignored) < len(shards):
            self.refused.append(f"{fused}: `ignore` names {', '.join(ignored)} alone; allowed: all of it or nothing")
        groups = [self._groups_of(shard) for shard in shards]
        if ignored or any(len(found) != 1 for found in groups):
            return
        chosen = self._group_in_vllm(fused, shards)
        differ = [f"{s.rpartition('.')[2]}: {g.name}" for s, (g,) in zip(shards, groups, strict=True)]
        if self._ignored(fused) or chosen is None or any(g.scheme != chosen.scheme for (g,) in groups):
            used = "no group" if chosen is None or self._ignored(fused) else chosen.name
            self.refused.append(f"{fused}: {', '.join(differ)}; vLLM takes {used} for all; allowed: one equal scheme")
        elif not refusal(chosen):
            self.refused.extend(f"{fused}: {problem}" for problem in self._unjoinable(shards, chosen))

    def _unjoinable(self, shards: list[str], group: Group) -> Iterator[str]:
        """Why matrices of one scheme still cannot become one matrix."""
        weights = group.weights
        shapes = [
            dense_shape(group, {n: i.shape for n, i in self.local.get(s, {}).items()}, self._stored_shape(s))
            for s in shards
        ]
        rows = [shape[0] for shape in shapes if shape]
        odd = [n for n in rows if n * weights.bits % 32]
        if group.holds & {"weight_zero_point"} and odd:
            yield (
                f"{odd[0]} rows of {weights.bits}-bit zero points do not fill int32 words; allowed: {weights.bits} "
                "bits times the rows a multiple of 32, or symmetric weights"
            )
        if weights.block and (uneven := [n for n in rows[:-1] if n % weights.block[0]]):
            yield f"{uneven[0]} rows; allowed: multiples of the block's {weights.block[0]}, but for the last matrix"
        factors = [self._values(f"{shard}.weight_global_scale", float) for shard in shards]
        if group.format == "nvfp4-pack-quantized" and len(set(factors)) > 1:
            shown = ", ".join(f"{f[0]:g}" for f in factors if f)
            yield f"weight_global_scale {shown}: vLLM takes the largest for all; allowed: one equal value"


def _matches(entry: str, module: str) -> bool:
    """An equal name, or `re:` and a pattern that matches from the start."""
    try:
        return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
    except re.error:
        return False
