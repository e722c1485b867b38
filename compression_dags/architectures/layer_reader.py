"""What one layer of a traced model is made of: matrices by common input, norms, writers, router and experts.

Nothing here knows a family. A role is a place in the flow of data: what the attention's core reads and gives, what is
added to the residual stream, what chooses experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from compression_dags.architectures.decoder import LayerKind, ProjectionGroup
from compression_dags.architectures.tracing import PRODUCTS, Op, Trace

_COPIES = frozenset({"_to_copy", "clone", "_unsafe_view", "dropout", "native_dropout"})
_ATTENTION = ("scaled_dot_product", "softmax")
_CHOICE = ("topk",)
_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm"})


@dataclass(frozen=True)
class _Gain:
    """A product with a vector of parameters, as at the end of a norm."""

    module: str
    offset: float
    reads: int


@dataclass(frozen=True)
class _Product:
    """A matrix that met an input."""

    op: Op
    parameter: str
    local: str
    reads: int


class LayerReader:
    """One layer of a trace."""

    def __init__(self, trace: Trace, layers: str, index: int):
        self.trace, self.prefix = trace, f"{layers}.{index}."
        path = self.prefix[:-1]
        self.call = next(c for c in trace.calls if c.path == path)
        self.ops = [o for o in trace.ops if o.scope == path or o.scope.startswith(self.prefix)]
        self.made_by: dict[int, Op] = {}
        self.users: dict[int, list[Op]] = {}
        for op in self.ops:
            for value in op.outs:
                self.made_by.setdefault(value, op)
            for value in op.values:
                self.users.setdefault(value, []).append(op)

    def read(self, attention: str | None) -> LayerKind:
        """The layer's description. `attention` is what the config calls its type, if it does."""
        own = [p for p in self.products if p.parameter.startswith(self.prefix)]
        flat = [p for p in own if self._ndim(p.parameter) == 2]
        # one row is a gate: a choice between a branch and nothing
        routers = [p.local for p in flat if self._reaches(p.op.outs, _CHOICE) or self._rows(p.parameter) == 1]
        uses = Counter(p.local for p in flat)
        odd = [p.local for p in flat if p.local not in routers and (uses[p.local] > 1 or not self._is_linear(p))]
        inputs: dict[int, list[_Product]] = {}
        for product in flat:
            if product.local not in (*routers, *odd):
                inputs.setdefault(self._original(product.reads), []).append(product)
        names = self._named(inputs)
        read = {names[k]: g for k, g in self.gains.items() if k in inputs}
        for product in own:  # what experts read has no group of its own
            gain = self.gains.get(self._original(product.reads))
            if gain and gain not in read.values() and (self._ndim(product.parameter) == 3 or product.local in routers):
                read["mlp_input"] = gain
        writers = self._writers({p.local: names[k] for k, members in inputs.items() for p in members})
        experts = tuple(dict.fromkeys(p.local for p in own if self._ndim(p.parameter) == 3))
        homes = [members[0].local.rpartition(".")[0] for members in inputs.values()]
        return LayerKind(
            attention=attention or ("attention" if self._attends else homes[0] if homes else "none"),
            attends=self._attends,
            feed_forward="experts" if experts else "dense",
            groups=tuple(ProjectionGroup(names[k], _once(p.local for p in v)) for k, v in inputs.items()),
            norms=_once(g.module for g in self.gains.values()),
            input_norms=tuple((name, gain.module) for name, gain in read.items()),
            norm_offsets=tuple(sorted({gain.offset for gain in read.values()})),
            branch_norms=_once(g.module for k, g in self.gains.items() if k in self._added),
            head_norms=_once(
                g.module for k, g in self.gains.items() if k not in self._added and self._reaches([k], _ATTENTION)
            ),
            writers=tuple(writers),
            factors=tuple(writers.values()),
            routers=_once(routers),
            experts=experts,
            odd=_once(odd),
            shared=_once(p.parameter for p in self.products if not p.parameter.startswith(self.prefix)),
            shapes=tuple((name, tuple(p.shape)) for name, p in self._module.named_parameters()),
            sole=tuple(names[k] for k, members in inputs.items() if self._used_by(k) <= {id(p.op) for p in members}),
            before_experts=self._before_experts(names, inputs) if experts else (),
            row_folds=tuple((names[k], row) for k in inputs if (row := self._row_fold(k, names, inputs))),
        )

    def _before_experts(self, names: dict[int, str], inputs: dict[int, list[_Product]]) -> tuple[str, ...]:
        place = {id(product): number for number, product in enumerate(self.products)}
        first = min(place[id(p)] for p in self.products if self._ndim(p.parameter) == 3)
        return tuple(names[k] for k, members in inputs.items() if place[id(members[0])] < first)

    def _used_by(self, value: int) -> set[int]:
        """The operations that read a value or a copy of it."""
        found, todo = set[int](), [value]
        while todo:
            for op in self.users.get(todo.pop(), []):
                if op.name in _COPIES and len(op.values) == 1:
                    todo += op.outs
                else:
                    found.add(id(op))
        return found

    def _row_fold(self, value: int, names: dict[int, str], inputs: dict[int, list[_Product]]) -> str:
        """The matrix in whose rows a value is linear, channel by channel: the values of attention, or a gated input."""
        op = self.made_by.get(value)
        if op is None or op.held:
            return ""
        if "scaled_dot_product" in op.name and names[value] == "attention_output":
            candidates = op.values[2:3]
        elif op.name == "mul" and len(op.values) == 2 and names[value] == "mlp_output":
            candidates = op.values
        else:
            return ""
        rows = {id(p.op): (p.local, k) for k, members in inputs.items() for p in members}
        for candidate in candidates:
            made = self.made_by.get(first := self._original(candidate))
            if made is not None and id(made) in rows and self._used_by(first) == {id(op)}:
                return rows[id(made)][0]
        return ""

    def _is_linear(self, product: _Product) -> bool:
        """Whether it is the weight of a linear module, met in that module's own call."""
        module = dict(self._module.named_modules()).get(product.local)
        return isinstance(module, nn.Linear) and product.op.scope == self.prefix + product.local

    @property
    def _module(self) -> nn.Module:
        return self.trace.model.get_submodule(self.prefix[:-1])

    # -- what the trace says ----------------------------------------------------------------------------------------

    def _ndim(self, name: str) -> int:
        return self.trace.model.get_parameter(name).ndim

    def _rows(self, name: str) -> int:
        return self.trace.model.get_parameter(name).shape[0]

    def _local(self, name: str) -> str:
        return name.removeprefix(self.prefix).removesuffix(".weight")

    @cached_property
    def products(self) -> list[_Product]:
        """Every matrix that meets an input, in order."""
        found = []
        for op in self.ops:
            if op.name not in PRODUCTS or not op.values:
                continue
            reads = op.values[-1] if op.name in ("addmm", "baddbmm") else op.values[0]
            for held in op.held.values():
                if self._ndim(held.name) >= 2:
                    found.append(_Product(op, held.name, self._local(held.name), reads))
        return found

    @cached_property
    def gains(self) -> dict[int, _Gain]:
        """Value → the norm that made it."""
        found = {}
        for op in self.ops:
            for held in op.held.values():
                if self._ndim(held.name) != 1 or not held.name.startswith(self.prefix):
                    continue
                module = held.name.removeprefix(self.prefix).rpartition(".")[0]
                scaled = op.name == "mul" and len(op.values) == 1
                if module and held.name.endswith(".weight") and (scaled or op.name in _NORMS):
                    found[op.outs[0]] = _Gain(module, held.offset, op.values[0])
        return found

    @cached_property
    def _attends(self) -> bool:
        return any(word in op.name for op in self.ops for word in _ATTENTION[:1])

    @cached_property
    def _chooses(self) -> bool:
        return any(self._ndim(p.parameter) == 3 for p in self.products)

    def _original(self, value: int) -> int:
        """The value of which this is a copy."""
        while (op := self.made_by.get(value)) is not None and op.name in _COPIES and len(op.values) == 1:
            value = op.values[0]
        return value

    def _reaches(self, start: Iterable[int], wanted: tuple[str, ...], *, back: bool = False) -> bool:
        """Whether an operation named so follows from these values (or made them) without a matrix between."""
        seen, todo = set[int](), list(start)
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            made = [self.made_by[value]] if value in self.made_by else []
            for op in made if back else self.users.get(value, []):
                if any(word in op.name for word in wanted):
                    return True
                ends = op.name in PRODUCTS and any(self._ndim(h.name) >= 2 for h in op.held.values())
                if not ends and not (value in self.stream and not back):
                    todo += op.values if back else op.outs
        return False

    # -- the residual stream ----------------------------------------------------------------------------------------

    @cached_property
    def stream(self) -> dict[int, int | None]:
        """Value of the residual stream → what was added to get it; None where nothing was."""
        found: dict[int, int | None] = dict.fromkeys(self.call.ins[:1])
        for op in self.ops:
            if op.name in ("add", "add_") and len(op.values) == 2:
                first, second = map(self._original, op.values)
                if (first in found) != (second in found):
                    found[op.outs[0]] = second if first in found else first
            elif op.name in _COPIES and len(op.values) == 1 and op.values[0] in found:
                found[op.outs[0]] = None
        return found

    @cached_property
    def _added(self) -> set[int]:
        return {self._original(value) for value in self.stream.values() if value is not None}

    def _writers(self, group_of: dict[str, str]) -> dict[str, float]:
        """Matrix → the constant by which its output is multiplied before it is added to the stream."""
        if not any(self._original(value) in self.stream for value in self.call.outs):
            return {}  # a norm over the sum: nothing is added unchanged
        found: dict[str, float] = {}
        for value in self.stream.values():
            if value is not None:
                found |= {p: factor for p, factor in self._summands(value, 1.0) if p in group_of}
        return found

    def _summands(self, value: int, factor: float) -> list[tuple[str, float]]:
        """Matrices whose outputs, times a constant, add up to a value."""
        op = self.made_by.get(value)
        if op is None:
            return []
        if op.name in PRODUCTS:
            return [(self._local(h.name), factor) for h in op.held.values() if self._ndim(h.name) == 2]
        if op.name == "mul" and len(op.values) == 1 and not op.held and op.scalar is not None:
            return self._summands(op.values[0], factor * op.scalar)
        if op.name == "add" or (op.name in _COPIES and len(op.values) == 1):  # a bias, or two branches
            return [found for v in op.values for found in self._summands(v, factor)]
        return []

    # -- names ------------------------------------------------------------------------------------------------------

    def _named(self, inputs: dict[int, list[_Product]]) -> dict[int, str]:
        """Input → the name of its group: by its role where there is one of the role, else by its first matrix."""
        names: dict[int, str] = {}
        into = [k for k, v in inputs.items() if any(self._reaches(p.op.outs, _ATTENTION) for p in v)]
        out_of = [k for k in inputs if k not in into and self._reaches([k], _ATTENTION, back=True)]
        for role, found in (("attention_input", into), ("attention_output", out_of)):
            if len(found) == 1:
                names[found[0]] = role
        homes: dict[str, list[int]] = {}
        for value in (k for k in inputs if k not in names):
            homes.setdefault(inputs[value][0].local.rpartition(".")[0], []).append(value)
        last = next(reversed(homes), None)  # after the tokens were mixed, and one module's own
        mixes = bool(names) or len(homes) > 1
        own = last is not None and "." not in last and len(homes[last]) <= 2 and not self._chooses
        for home, values in homes.items():
            is_mlp = own and mixes and home == last
            roles: Any = ("mlp_input", "mlp_output")[-len(values) :] if is_mlp else None
            for number, value in enumerate(values):
                names[value] = roles[number] if roles else inputs[value][0].local
        return names


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
