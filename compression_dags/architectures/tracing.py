"""One forward of a model without numbers, written down: which matrix reads which input, and what becomes of it.

Fake tensors have shapes and no values, so a model of any size is traced in seconds and without its weights. Storages
stand for values: a view shares its storage, so a matrix that reads a reshaped input reads the same one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

#: Operations in which a matrix meets an input.
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "linear"})
#: Operations that hand a parameter on, whole or in parts.
_HAND_ON = frozenset({"_to_copy", "clone", "index", "index_select", "gather", "cat", "stack", "add"})


@dataclass(frozen=True)
class Held:
    """A tensor that is a parameter, or a part or copy of one.

    Attributes:
        offset: what was added to it: 1 for a norm that multiplies by (1 + weight).
    """

    name: str
    offset: float = 0.0


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: aten's name, without its overload.
        scope: path of the innermost module that was running.
        ins, outs: storages of its tensors.
        held: storage → parameter, of those inputs that are parameters.
        shape: of its first result.
        scalar: the one number among its arguments, if it is one.
    """

    name: str
    scope: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    held: dict[int, Held]
    shape: tuple[int, ...]
    scalar: float | None

    @property
    def values(self) -> tuple[int, ...]:
        """Inputs that are no parameters."""
        return tuple(k for k in self.ins if k not in self.held)


@dataclass(frozen=True)
class Call:
    """One call of a module: storages of the tensors that it got and gave.

    Attributes:
        returned: how many values it returned in a tuple; 0 where it returned one as it is.
    """

    path: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    returned: int


@dataclass
class Trace:
    """What one forward did, in order.

    Attributes:
        model: it has shapes and no values.
        ids: storage of the token ids.
    """

    model: nn.Module
    ids: int = 0
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this config whole: with its towers, where it has some."""
    wraps = config.get_text_config(decoder=True) is not config
    alone = type(config) not in AutoModelForCausalLM._model_mapping
    # a wrapper's causal class may be that of its text alone
    if alone or (wraps and type(config) in AutoModelForImageTextToText._model_mapping):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def traced(config: Any) -> Trace:
    """What a model of this config does with two rows of eight tokens.

    Raises:
        Exception: whatever transformers raises for a config that it cannot build or run.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with no_init_weights():
            model: Any = auto_class(config).from_config(config).eval()
        model.tie_weights()  # else a head that is the embedding would look like a matrix of its own
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the only one whose steps do not depend on the routing
        ids = fake.from_tensor(torch.zeros(2, 8, dtype=torch.long))
        trace = Trace(model, key(ids))
        with torch.no_grad(), _calls(model, trace) as scopes, _Recorder(trace, scopes):
            model(input_ids=ids, use_cache=False)
    return trace


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace, scopes: list[str]):
        super().__init__()
        self.trace, self.scopes = trace, scopes
        self.held = {key(p): Held(name) for name, p in trace.model.named_parameters()}
        self.kept: list[Tensor] = []  # a storage that is freed could come back as another value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}))
        ins = tuple(key(t) for t in leaves if isinstance(t, Tensor))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        outs = tuple(map(key, made))
        self.kept += made
        name = func.overloadpacket.__name__
        numbers = [float(v) for v in leaves if isinstance(v, (int, float)) and not isinstance(v, bool)]
        scalar = numbers[0] if len(numbers) == 1 else None
        held = {k: self.held[k] for k in ins if k in self.held}
        if name in _HAND_ON and held and len({h.name for h in held.values()}) == 1 and set(ins[:1]) <= set(held):
            first = held[ins[0]]
            if name != "add" or (len(set(ins)) == 1 and scalar is not None):
                more = scalar if name == "add" and scalar is not None else 0.0
                for k in outs:
                    self.held.setdefault(k, Held(first.name, first.offset + more))
        if not set(outs) <= set(ins):
            shape = tuple(made[0].shape) if made else ()
            self.trace.ops.append(Op(name, self.scopes[-1], ins, outs, held, shape, scalar))
        return out


def key(tensor: Tensor) -> int:
    """What all views of one value share."""
    return tensor.untyped_storage()._cdata


@contextmanager
def _calls(model: nn.Module, trace: Trace) -> Iterator[list[str]]:
    """The paths of the modules that are running, outermost first; every call goes into the trace."""
    scopes, handles, entered = [""], list[Any](), list[tuple[int, ...]]()

    def enter(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            scopes.append(path)
            entered.append(tuple(key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)))

        return hook

    def leave(path: str) -> Any:
        def hook(_: nn.Module, args: Any, result: Any) -> None:
            scopes.pop()
            outs = tuple(key(t) for t in tree_leaves(result) if isinstance(t, Tensor))
            returned = len(result) if isinstance(result, (tuple, list)) else 0
            trace.calls.append(Call(path, entered.pop(), outs, returned))

        return hook

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(path)))
    try:
        yield scopes
    finally:
        for handle in handles:
            handle.remove()
