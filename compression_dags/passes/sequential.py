"""One pass that changes a model as it goes: layer by layer, group by group, every projection evaluated once.

What a pruner or a quantizer does with a group is its own; which inputs it sees, when the changed weights take effect,
and how a killed pass goes on is the same for all.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from compression_dags.architectures import ProjectionGroup
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.passes.input_sums import InputSums, Reference
from compression_dags.passes.lockstep import LockstepForward
from compression_dags.provenance.resume import ResumePoint
from compression_dags.stage import Progress, StatisticKind, Target

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint

Modules = dict[str, nn.Module]
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Extra(Protocol):
    """Something of a layer that is no group of projections: one more stop, after all groups."""

    module: nn.Module

    def seen(self, mask: Tensor | None, *args: Tensor, **kwargs: Tensor) -> None:
        """Take the module's arguments of one batch; `mask` (b, T) is False at padding."""
        ...

    def change(self, go_on: bool) -> None:
        """All batches wait; with `go_on` the forward goes on with changed weights."""
        ...


#: Where a layer's forward waits.
Stop = ProjectionGroup | Extra


def _module(place: Stop, modules: Modules) -> nn.Module:
    return modules[place.projections[0]] if isinstance(place, ProjectionGroup) else place.module


class SequentialPass(ABC):
    """One run over a model.

    `propagate: pruned` lets the statistics of every group be those of the model changed so far (true-sequential);
    `dense` takes them all from the model as it was.

    `follows`: `own` statistics are of the changed model's inputs alone; `dense` has the unchanged model run beside it
    and gives the cross products with its inputs; `residual` also what the residual stream has drifted, for groups that
    write into it.

    Args:
        blocks: calibration tokens; None if the statistic is `none`.
    """

    def __init__(
        self,
        source: Checkpoint,
        blocks: TokenBlocks | None,
        device: str,
        dtype: str,
        *,
        name: str,
        statistic: StatisticKind,
        propagate: Literal["pruned", "dense"] = "pruned",
        follows: Target = "own",
    ):
        self.source, self.name = source, name
        self.statistic: StatisticKind = statistic
        self.propagate, self.follows = propagate, follows
        self.stream = DecoderStream(source, device=device, dtype=dtype, resident=False)
        self.batches = self.stream.batches(blocks) if blocks is not None and statistic != "none" else []
        self.masks = [b.mask.to(self.stream.device) if b.padded else None for b in self.batches]
        #: the dense model's states beside the changed one's, where they are followed
        self.dense = [b.hidden for b in self.batches] if follows != "own" else []

    @abstractmethod
    def change(self, index: int, held: dict[str, Tensor], seen: InputSums | None, label: str) -> list[Tensor]:
        """New weights of matrices of layer `index` that read one input, each of the shape and in the order of `held`:
        name on disk → what is in memory. `label` names the input in errors."""

    @abstractmethod
    def results_state(self) -> dict[str, Tensor]:
        """What was made so far, for a killed pass to go on with."""

    @abstractmethod
    def restore_results(self, state: dict[str, Tensor]) -> None: ...

    def extras(self, index: int, modules: Modules) -> list[Any]:
        """`Extra` stops of a layer, at most one."""
        return []

    def stored(self, name: str, held: Tensor) -> Tensor:
        """The weight as it is stored, for kept ones must stay so bit for bit: what is held may be a converted copy."""
        if _STORED.get(held.dtype) == self.source.tensors[f"{name}.weight"].dtype:
            return held
        return self.source.tensor(f"{name}.weight").to(self.stream.device)

    def run_layers(self, resume: ResumePoint | None, progress: Progress) -> None:
        first = self._restore(resume)
        for index in progress(range(first, self.stream.num_layers), f"{self.name} (layers)"):
            with torch.inference_mode(), self.stream.layer(index) as layer:
                self._layer(index, layer)
            if resume:
                resume.save_if_due(index + 1, self._state)
        self.stream.close()

    # -- a layer ----------------------------------------------------------------------------------------------------

    def _layer(self, index: int, layer: nn.Module) -> None:
        modules = dict(layer.named_modules())
        stops = self._stops(index, modules)
        if not self.batches:
            for stop in stops:
                if isinstance(stop, ProjectionGroup):
                    self._change(index, stop, modules, None)
                else:
                    stop.change(go_on=False)
        elif self.dense:
            self._both(index, layer, modules, stops)
        else:
            self._alone(index, layer, modules, stops)

    def _stops(self, index: int, modules: Modules) -> list[Stop]:
        """Groups and extras in the order in which the layer evaluates them."""
        architecture = self.source.architecture
        groups = [g for g in architecture.groups_of(index) if g.projections[0] in modules]
        first = architecture.kinds[architecture.kind_of[index]].before_experts if architecture.kinds else None
        before = [g for g in groups if first is None or g.name in first]
        return [*before, *self.extras(index, modules), *(g for g in groups if g not in before)]

    def _alone(self, index: int, layer: nn.Module, modules: Modules, places: list[Stop]) -> None:
        sums = [self._sums(place, modules) for place in places]
        staged = self.propagate == "pruned"

        def seen(stop: int, turn: int, *args: Tensor, **kwargs: Tensor) -> None:
            place, own = places[stop], sums[stop]
            if isinstance(place, ProjectionGroup):
                assert own is not None
                own.add(self._shaped(turn, args[0]), self.masks[turn])
            else:
                place.seen(self.masks[turn], *args, **kwargs)

        def change(stop: int) -> None:
            place = places[stop]
            if isinstance(place, ProjectionGroup):
                self._change(index, place, modules, sums[stop])
            else:
                place.change(go_on=staged)

        stops = [(_module(place, modules),) for place in places]
        forward = LockstepForward(
            len(self.batches),
            lambda turn: self.stream.apply(layer, index, self.batches[turn]),
            stops,
            seen,
            change if staged else lambda _: None,
        )
        for batch, hidden in zip(self.batches, forward.run(), strict=True):
            batch.hidden = hidden
        for stop in range(0 if staged else len(stops)):
            change(stop)

    def _both(self, index: int, layer: nn.Module, modules: Modules, places: list[Stop]) -> None:
        """Turn 2i is batch i in the dense model, 2i + 1 in the changed one, right after it."""
        before = copy.deepcopy(layer)
        dense = dict(before.named_modules())
        sums = [self._sums(place, modules) for place in places]
        drifting = self._drifting(index) if self.follows == "residual" else ()
        residual: dict[int, Tensor] = {}  # by turn: what the next writer's output will be added to
        waiting: list[Tensor] = []

        def forward(turn: int) -> Tensor:
            batch = self.batches[turn // 2]
            residual[turn] = batch.hidden if turn % 2 else self.dense[turn // 2]
            return self.stream.apply(layer if turn % 2 else before, index, batch, residual[turn])

        def seen(stop: int, turn: int, *args: Tensor, **kwargs: Tensor) -> None:
            place, own = places[stop], sums[stop]
            if not isinstance(place, ProjectionGroup):
                if turn % 2:
                    place.seen(self.masks[turn // 2], *args, **kwargs)
            elif turn % 2 == 0:
                waiting.append(args[0])
            else:
                number = turn // 2
                drift = residual[turn - 1] - residual[turn] if place.name in drifting else None
                reference = Reference(self._shaped(number, waiting.pop()), drift)
                assert own is not None
                own.add(self._shaped(number, args[0]), self.masks[number], reference)

        def change(stop: int) -> None:
            place = places[stop]
            if isinstance(place, ProjectionGroup):
                self._change(index, place, modules, sums[stop])
            else:
                place.change(go_on=True)

        names = {id(module): name for name, module in modules.items()}
        stops = [(module, dense[names[id(module)]]) for module in (_module(place, modules) for place in places)]
        staged = LockstepForward(2 * len(self.batches), forward, stops, seen, change)

        def enters(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            residual[staged.turn] = args[0].reshape(residual[staged.turn].shape)

        norm = self._norm_before_mlp(index)
        hooks = [m[norm].register_forward_pre_hook(enters) for m in (modules, dense) if norm in m]
        outputs = staged.run()
        for hook in hooks:
            hook.remove()
        self.dense = outputs[0::2]
        for batch, hidden in zip(self.batches, outputs[1::2], strict=True):
            batch.hidden = hidden

    def _norm_before_mlp(self, index: int) -> str | None:
        """The norm that reads the residual stream to which the MLP's output is added."""
        architecture = self.source.architecture
        kind = architecture.kinds[architecture.kind_of[index]] if architecture.kinds else architecture
        return dict(kind.input_norms).get("mlp_input")

    def _drifting(self, index: int) -> tuple[str, ...]:
        """Groups whose output is added as it is to a residual stream that is known here; others follow `dense`."""
        architecture = self.source.architecture
        if not architecture.kinds:
            return architecture.stream_writers
        kind = architecture.kinds[architecture.kind_of[index]]
        norms, plain = dict(kind.input_norms), kind.plain_writers
        first = kind.writers[0] if kind.writers else None
        known = {"attention_output": "attention_input" in norms, "mlp_output": "mlp_input" in norms}
        known["attention_output"] = known["attention_output"] and first in kind.members("attention_output")
        return tuple(name for name, reads in known.items() if reads and plain.issuperset(kind.members(name)))

    def _shaped(self, number: int, x: Tensor) -> Tensor:
        return x.reshape(*self.batches[number].mask.shape, -1)

    def _sums(self, place: Stop, modules: Modules) -> InputSums | None:
        """Empty sums of a group's input; an extra keeps its own."""
        if not isinstance(place, ProjectionGroup):
            return None
        first: Any = modules[place.projections[0]]
        return InputSums(self.statistic, first.weight.shape[1], self.stream.device)

    def _change(self, index: int, group: ProjectionGroup, modules: Modules, seen: InputSums | None) -> None:
        prefix = self.source.architecture.layer_prefix(index)
        chosen: dict[str, Any] = {prefix + p: modules[p] for p in group.projections if p in modules}
        held = {name: module.weight.data for name, module in chosen.items()}
        found = self.change(index, held, seen, f"layer {index} {group.name}")
        for module, weight in zip(chosen.values(), found, strict=True):
            module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        hidden = {"hidden": torch.cat([b.hidden.cpu() for b in self.batches])} if self.batches else {}
        dense = {"dense": torch.cat([h.cpu() for h in self.dense])} if self.dense else {}
        return {**hidden, **dense, **self.results_state()}

    def _restore(self, resume: ResumePoint | None) -> int:
        saved = resume.load() if resume else None
        if saved is None:
            return 0
        step, state = saved
        for number, batch in enumerate(self.batches):
            rows = slice(batch.rows.start, batch.rows.stop)
            batch.hidden = state["hidden"][rows].to(batch.hidden)
            if self.dense:
                self.dense[number] = state["dense"][rows].to(batch.hidden)
        self.restore_results(state)
        return step
