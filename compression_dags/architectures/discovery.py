"""The architecture of any decoder that transformers knows: found by tracing one forward, not by a list of families."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from torch import nn

from compression_dags.architectures.decoder import Discovered
from compression_dags.architectures.layer_reader import LayerReader
from compression_dags.architectures.tracing import PRODUCTS, Trace, traced
from compression_dags.errors import InputError

_NORMS = ("mul", "native_layer_norm", "_fused_rms_norm")


def discover(config: Any) -> Discovered:
    """What a model of this transformers config is made of.

    Raises:
        InputError: it cannot be built or run, or nothing in it is a stack of layers.
    """
    return read(traced_model(config), config)


def traced_model(config: Any) -> Trace:
    """The trace of a model of this transformers config.

    Raises:
        InputError: it cannot be built or run.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{config.model_type} is an encoder and a decoder; only decoders are compressed")
    try:
        return traced(config)
    except Exception as error:  # a forward may raise anything
        words = " ".join(str(error).split())[:200]
        raise InputError(f"{config.model_type} cannot be traced: {type(error).__name__}: {words}") from error


def read(trace: Trace, config: Any) -> Discovered:
    """What a trace says of a model of this config.

    Raises:
        InputError: nothing in it is a stack of layers.
    """
    layers = _stack(trace)
    model: Any = trace.model
    count = len(model.get_submodule(layers))
    text = _config_of(model, layers)
    types = getattr(text, "layer_types", None)
    types = types if isinstance(types, list) and len(types) == count else [None] * count
    each = [LayerReader(trace, layers, index).read(kind) for index, kind in enumerate(types)]
    kinds = tuple(dict.fromkeys(each))
    head, norm = _tail(trace, layers)
    return Discovered(
        model_type=config.model_type,
        stack=_takes_ids(model, layers),
        layers=layers,
        embedding=_table(trace, layers),
        head=head,
        final_norm=norm,
        config_path=_path_of(config, text),
        kinds=kinds,
        kind_of=tuple(kinds.index(kind) for kind in each),
        returned=next(call.returned for call in trace.calls if call.path == f"{layers}.0"),
    )


def _outside(trace: Trace, layers: str) -> list[Any]:
    return [op for op in trace.ops if not f"{op.scope}.".startswith(f"{layers}.")]


def _stack(trace: Trace) -> str:
    """Path of the outermost list of modules that are called one after another and do most of the work."""
    model: Any = trace.model
    called = Counter(call.path for call in trace.calls)
    lists = {p: len(m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    whole = [path for path, count in lists.items() if all(called[f"{path}.{i}"] for i in range(count))]
    outer = [path for path in whole if not any(path.startswith(f"{other}.") for other in whole)]
    if not outer:
        raise InputError(f"{model.config.model_type}: no list of layers is called one after another")
    work = {p: sum(op.name in PRODUCTS and op.scope.startswith(f"{p}.") for op in trace.ops) for p in outer}
    return max(outer, key=lambda path: work[path])


def _table(trace: Trace, layers: str) -> str:
    """Name of the token embedding."""
    for op in _outside(trace, layers):
        if op.name == "embedding" and trace.ids in op.ins:
            return next((held.name for held in op.held.values()), "")
    return ""


def _tail(trace: Trace, layers: str) -> tuple[str, str]:
    """Names of the head's matrix and of the norm's weight before it."""
    head, norm = "", ""
    gains: dict[int, str] = {}
    for op in _outside(trace, layers):
        for held in op.held.values():
            shape = trace.model.get_parameter(held.name).shape
            if len(shape) == 1 and op.name in _NORMS and held.name.endswith("weight"):
                gains[op.outs[0]] = held.name
            elif len(shape) == 2 and op.name in PRODUCTS:
                head, norm = held.name, next((gains[value] for value in op.values if value in gains), "")
    return head, norm


def _takes_ids(model: Any, layers: str) -> str:
    """Path of the innermost module around the layers that takes token ids."""
    path = layers
    while path:
        path = path.rpartition(".")[0]
        if "input_ids" in inspect.signature(type(model.get_submodule(path)).forward).parameters:
            return path
    return path


def _config_of(model: Any, layers: str) -> Any:
    """The config of the innermost model around the layers: of a wrapper, that of its text."""
    path, config = layers, model.config
    while path:
        path = path.rpartition(".")[0]
        if (found := getattr(model.get_submodule(path), "config", None)) is not None:
            return found
    return config


def _path_of(config: Any, text: Any) -> tuple[str, ...]:
    """Where a wrapper's config holds that of its text."""
    if text is config:
        return ()
    names = getattr(config, "sub_configs", {})
    for name in names:
        inner = getattr(config, name, None)
        if inner is not None and (inner is text or inner.to_dict() == text.to_dict()):
            return (name,)
        if inner is not None and (deeper := _path_of(inner, text)):
            return (name, *deeper)
    return ()
