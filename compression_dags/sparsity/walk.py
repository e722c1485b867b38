"""The pruning pass: layer by layer, group by group, every projection evaluated once."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compression_dags.architectures import ProjectionGroup
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.errors import InputError
from compression_dags.provenance.progress import Progress, as_note, from_note
from compression_dags.sparsity.allocation import SparsityPlan
from compression_dags.sparsity.experts import FUSED, ExpertBlock
from compression_dags.sparsity.inputs import InputSums, Reference
from compression_dags.sparsity.pruner import Problem, Pruned
from compression_dags.sparsity.results import Results
from compression_dags.sparsity.stage import Sparsified, SparsifyStage, all_matrices
from compression_dags.sparsity.staged import StagedForward
from compression_dags.stages import Track

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint

Modules = dict[str, nn.Module]
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class PruneWalk:
    """One run of a pruner over a model.

    `propagate: pruned` lets the statistics of every group be those of the model pruned so far (true-sequential);
    `dense` takes them all from the model as it was. A pruner that aims at the dense model's outputs (`stage.follows`)
    has both models run side by side. Experts are one more stop of a layer's forward, after the groups: `ExpertBlock`.
    """

    def __init__(
        self,
        stage: SparsifyStage,
        source: Checkpoint,
        plan: SparsityPlan,
        blocks: TokenBlocks | None,
        device: str,
        dtype: str,
    ):
        self.stage, self.source, self.plan = stage, source, plan
        self.stream = DecoderStream(source, device=device, dtype=dtype, resident=False)
        self.batches = self.stream.batches(blocks) if blocks is not None and stage.reads_tokens else []
        self.masks = [b.mask.to(self.stream.device) if b.padded else None for b in self.batches]
        #: the dense model's states beside the pruned one's, where the pruner asks for them
        self.dense = [b.hidden for b in self.batches] if stage.follows != "own" else []
        self.results = Results(stage.method, source, plan)
        wanted = {m.name for m in all_matrices(source)}
        if wanted != set(plan.patterns):
            odd = sorted(wanted ^ set(plan.patterns))
            raise InputError(f"sparsify: the plan is for another model: {len(odd)} matrices differ, first {odd[0]}")

    def run(self, directory: Path, progress: Progress | None, track: Track) -> Sparsified:
        first = self._restore(progress)
        for index in track(range(first, self.stream.num_layers), f"{self.stage.method} (layers)"):
            with torch.inference_mode(), self.stream.layer(index) as layer:
                self._layer(index, layer)
            if progress:
                progress.save_if_due(index + 1, self._state)
        self.stream.close()
        return self.results.write(directory)

    def _layer(self, index: int, layer: nn.Module) -> None:
        modules = dict(layer.named_modules())
        groups = [g for g in self.source.architecture.groups if g.projections[0] in modules]
        experts = [ExpertBlock(self, index, modules[FUSED])] if FUSED in modules else []
        if not self.batches:
            for group in groups:
                self._prune(index, group, modules, None)
            for block in experts:
                block.prune(go_on=False)
        elif self.dense:
            self._both(index, layer, modules, groups, experts)
        else:
            self._alone(index, layer, modules, groups, experts)

    def _alone(
        self,
        index: int,
        layer: nn.Module,
        modules: Modules,
        groups: list[ProjectionGroup],
        experts: list[ExpertBlock],
    ) -> None:
        sums = [self._sums(group, modules) for group in groups]
        pruned = self.stage.propagate == "pruned"

        def seen(stop: int, turn: int, *args: Tensor, **kwargs: Tensor) -> None:
            if stop < len(groups):
                sums[stop].add(self._shaped(turn, args[0]), self.masks[turn])
            else:
                experts[0].seen(self.masks[turn], *args, **kwargs)

        def prune(stop: int) -> None:
            if stop < len(groups):
                self._prune(index, groups[stop], modules, sums[stop])
            else:
                experts[0].prune(go_on=pruned)

        stops = [*((modules[g.projections[0]],) for g in groups), *((e.module,) for e in experts)]
        staged = StagedForward(
            len(self.batches),
            lambda turn: self.stream.apply(layer, index, self.batches[turn]),
            stops,
            seen,
            prune if pruned else lambda _: None,
        )
        for batch, hidden in zip(self.batches, staged.run(), strict=True):
            batch.hidden = hidden
        for stop in range(0 if pruned else len(stops)):
            prune(stop)

    def _both(
        self,
        index: int,
        layer: nn.Module,
        modules: Modules,
        groups: list[ProjectionGroup],
        experts: list[ExpertBlock],
    ) -> None:
        """Turn 2i is batch i in the dense model, 2i + 1 in the pruned one, right after it."""
        before = copy.deepcopy(layer)
        dense = dict(before.named_modules())
        sums = [self._sums(group, modules) for group in groups]
        drifting = self.source.architecture.stream_writers if self.stage.follows == "residual" else ()
        residual: dict[int, Tensor] = {}  # by turn: what the next writer's output will be added to
        waiting: list[Tensor] = []

        def forward(turn: int) -> Tensor:
            batch = self.batches[turn // 2]
            residual[turn] = batch.hidden if turn % 2 else self.dense[turn // 2]
            return self.stream.apply(layer if turn % 2 else before, index, batch, residual[turn])

        def seen(stop: int, turn: int, *args: Tensor, **kwargs: Tensor) -> None:
            if stop == len(groups):
                if turn % 2:
                    experts[0].seen(self.masks[turn // 2], *args, **kwargs)
                return
            x = args[0]
            if turn % 2 == 0:
                waiting.append(x)
                return
            number = turn // 2
            drift = residual[turn - 1] - residual[turn] if groups[stop].name in drifting else None
            reference = Reference(self._shaped(number, waiting.pop()), drift)
            sums[stop].add(self._shaped(number, x), self.masks[number], reference)

        def prune(stop: int) -> None:
            if stop < len(groups):
                self._prune(index, groups[stop], modules, sums[stop])
            else:
                experts[0].prune(go_on=True)

        stops = [g.projections[0] for g in groups] + [FUSED for _ in experts]
        staged = StagedForward(2 * len(self.batches), forward, [(modules[s], dense[s]) for s in stops], seen, prune)

        def enters(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            residual[staged.turn] = args[0].reshape(residual[staged.turn].shape)

        norm = dict(self.source.architecture.input_norms).get("mlp_input")
        hooks = [m[norm].register_forward_pre_hook(enters) for m in (modules, dense) if norm in m]
        outputs = staged.run()
        for hook in hooks:
            hook.remove()
        self.dense = outputs[0::2]
        for batch, hidden in zip(self.batches, outputs[1::2], strict=True):
            batch.hidden = hidden

    def _shaped(self, number: int, x: Tensor) -> Tensor:
        return x.reshape(*self.batches[number].mask.shape, -1)

    def _sums(self, group: ProjectionGroup, modules: Modules) -> InputSums:
        first: Any = modules[group.projections[0]]
        return InputSums(self.stage.statistic, first.weight.shape[1], self.stream.device)

    def _prune(self, index: int, group: ProjectionGroup, modules: Modules, seen: InputSums | None) -> None:
        prefix = self.source.architecture.layer_prefix(index)
        chosen: dict[str, Any] = {prefix + p: modules[p] for p in group.projections if p in modules}
        held = {name: module.weight.data for name, module in chosen.items()}
        found = self.prune_matrices(index, held, seen, f"layer {index} {group.name}")
        for module, pruned in zip(chosen.values(), found, strict=True):
            module.weight = nn.Parameter(pruned.weight.to(module.weight.dtype), requires_grad=False)

    def prune_matrices(
        self, index: int, held: dict[str, Tensor], seen: InputSums | None, label: str, **stated: str
    ) -> list[Pruned]:
        """Prune and record matrices that read one input; `held` has what is in memory of each, by its name on disk.
        `stated` goes into the row of each."""
        weights = tuple(self._stored(name, weight) for name, weight in held.items())
        problem = Problem.of(tuple(held), weights, self.plan, seen, label)
        found = self.stage.prune(problem)
        for name, pruned in zip(held, found, strict=True):
            pruned.evidence.update(stated)
            self.results.add(index, name, pruned, problem.tokens)
        return found

    def _stored(self, name: str, held: Tensor) -> Tensor:
        """The weight as it is stored, for kept ones must stay so bit for bit: what is held may be a converted copy."""
        if _STORED.get(held.dtype) == self.source.tensors[f"{name}.weight"].dtype:
            return held
        return self.source.tensor(f"{name}.weight").to(self.stream.device)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        hidden = {"hidden": torch.cat([b.hidden.cpu() for b in self.batches])} if self.batches else {}
        dense = {"dense": torch.cat([h.cpu() for h in self.dense])} if self.dense else {}
        self.results.settle()  # it completes the decisions
        decisions = {"decisions": as_note([asdict(d) for d in self.results.decisions])}
        return {**hidden, **dense, **decisions, **self.results.state()}

    def _restore(self, progress: Progress | None) -> int:
        saved = progress.load() if progress else None
        if saved is None:
            return 0
        step, state = saved
        for number, batch in enumerate(self.batches):
            rows = slice(batch.rows.start, batch.rows.stop)
            batch.hidden = state["hidden"][rows].to(batch.hidden)
            if self.dense:
                self.dense[number] = state["dense"][rows].to(batch.hidden)
        self.results.restore(from_note(state["decisions"]), state)
        return step
