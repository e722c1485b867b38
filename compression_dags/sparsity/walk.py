"""The pruning pass: layer by layer, group by group, every projection evaluated once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compression_dags.calibration.streaming import Batch, DecoderStream
from compression_dags.errors import InputError, IntegrityError
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.progress import Progress, as_note, from_note
from compression_dags.solvers.hessian import Hessian
from compression_dags.sparsity.allocation import SparsityPlan
from compression_dags.sparsity.masks import check_pattern, mask_digest, pack_mask, save_masks
from compression_dags.sparsity.pruner import Problem, Pruned
from compression_dags.sparsity.stage import Sparsified, SparsifyStage, all_matrices
from compression_dags.sparsity.staged import StagedForward
from compression_dags.stages import Track

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint


class Statistic:
    """What a pruner needs of one input, summed over real tokens."""

    def __init__(self, kind: str, channels: int, device: torch.device):
        self.kind, self.tokens = kind, 0
        self.hessian = Hessian.empty(channels, device) if kind == "hessian" else None
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, batch: Batch, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if batch.padded:
            rows = rows[batch.mask.reshape(-1).to(x.device)]
        self.tokens += len(rows)
        if self.hessian is not None:
            self.hessian.add(rows)
        else:
            self.squares += rows.float().square().sum(0).double()

    def mean_square(self, label: str) -> Tensor:
        if not bool(torch.isfinite(self.squares).all()):
            raise IntegrityError(f"{label}: activations are not finite; nothing can be pruned by them")
        return self.squares / max(1, self.tokens)


class PruneWalk:
    """One run of a pruner over a model.

    `propagate: pruned` lets the statistics of every group be those of the model pruned so far (true-sequential);
    `dense` takes them all from the model as it was.
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
        self.tensors: dict[str, Tensor] = {}
        self.packed: dict[str, np.ndarray] = {}
        self.decisions: list[Decision] = []
        wanted = {m.name for m in all_matrices(source)}
        if wanted != set(plan.patterns):
            odd = sorted(wanted ^ set(plan.patterns))
            raise InputError(f"sparsify: the plan is for another model: {len(odd)} matrices differ, first {odd[0]}")

    def run(self, directory: Path, progress: Progress | None, track: Track) -> Sparsified:
        from compression_dags.checkpoints.writer import PlannedTensor, unchanged, write_checkpoint

        first = self._restore(progress)
        for index in track(range(first, self.stream.num_layers), f"{self.stage.method} (layers)"):
            with torch.inference_mode(), self.stream.layer(index) as layer:
                self._layer(index, layer)
            if progress:
                progress.save_if_due(index + 1, self._state)
        self.stream.close()

        def planned(name: str) -> PlannedTensor:
            if name not in self.tensors:
                return unchanged(self.source, name)
            info = self.source.tensors[name]
            return PlannedTensor(info.dtype, info.shape, lambda: self.tensors[name])

        names = {name: planned(name) for name in self.source.tensors}
        written = write_checkpoint(directory, self.source, self.source.config, names)
        columns = {name: self.source.tensors[f"{name}.weight"].shape[1] for name in self.packed}
        save_masks(self.packed, columns, directory)
        return Sparsified(written, self.decisions, self._facts(), self.tensors)

    # -- one layer --------------------------------------------------------------------------------------------------

    def _layer(self, index: int, layer: nn.Module) -> None:
        modules = dict(layer.named_modules())
        groups = [g for g in self.source.architecture.groups if g.projections[0] in modules]
        if not self.batches:
            for group in groups:
                self._prune(index, group.name, group.projections, modules, None)
            return
        found: list[Statistic] = []
        for group in groups:
            first: Any = modules[group.projections[0]]
            found.append(Statistic(self.stage.statistic, first.weight.shape[1], self.stream.device))

        def seen(stop: int, batch: int, x: Tensor) -> None:
            found[stop].add(self.batches[batch], x)

        def ready(stop: int) -> None:
            if self.stage.propagate == "pruned":
                self._prune(index, groups[stop].name, groups[stop].projections, modules, found[stop])

        def forward(batch: int) -> Tensor:
            return self.stream.apply(layer, index, self.batches[batch])

        stops = [modules[g.projections[0]] for g in groups]
        outputs = StagedForward(len(self.batches), forward, stops, seen, ready).run()
        for batch, hidden in zip(self.batches, outputs, strict=True):
            batch.hidden = hidden
        if self.stage.propagate == "dense":
            for group, statistic in zip(groups, found, strict=True):
                self._prune(index, group.name, group.projections, modules, statistic)

    def _prune(
        self, index: int, group: str, locals_: tuple[str, ...], modules: dict[str, nn.Module], seen: Statistic | None
    ) -> None:
        prefix = self.source.architecture.layer_prefix(index)
        present = [p for p in locals_ if p in modules]
        names = tuple(prefix + p for p in present)
        # Kept weights must be the stored ones, so it is not the module's (perhaps converted) copy that is pruned.
        weights = tuple(self.source.tensor(f"{n}.weight").to(self.stream.device) for n in names)
        patterns = tuple(self.plan.patterns[n] for n in names)
        mean = seen.mean_square(f"layer {index} {group}") if seen and seen.hessian is None else None
        problem = Problem(names, weights, patterns, seen.hessian if seen else None, mean, seen.tokens if seen else 0)
        for local, name, pattern, pruned in zip(present, names, patterns, self.stage.prune(problem), strict=True):
            check_pattern(name, pruned.mask, pattern)
            module: Any = modules[local]
            module.weight = nn.Parameter(pruned.weight.to(module.weight.dtype), requires_grad=False)
            self._record(index, name, pruned, problem)

    def _record(self, index: int, name: str, pruned: Pruned, problem: Problem) -> None:
        weight = pruned.weight.cpu().contiguous()
        self.tensors[f"{name}.weight"] = weight
        self.packed[name] = packed = pack_mask(pruned.mask)
        zeros, numel = int((weight == 0).sum()), weight.numel()
        pattern = self.plan.patterns[name]
        evidence = {
            "requested": pattern.sparsity,
            "zeros": zeros,
            "parameters": numel,
            "pattern": self.plan.pattern if pattern.m is None else f"{pattern.m - (pattern.zeros or 0)}:{pattern.m}",
            "tokens": problem.tokens,
            "mask_sha256": mask_digest(packed),
            **pruned.evidence,
        }
        row = Decision(
            "sparsify",
            self.stage.method,
            len(self.decisions),
            name,
            "prune",
            [index],
            zeros / numel,
            "share of zeros",
            evidence,
        )
        self.decisions.append(row)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, float | int | str]:
        zeros = sum(d.evidence["zeros"] for d in self.decisions)
        numel = sum(d.evidence["parameters"] for d in self.decisions)
        errors = [d.evidence["output_error"] for d in self.decisions if "output_error" in d.evidence]
        more = {"mean_output_error": sum(errors) / len(errors)} if errors else {}
        return {"sparsity": zeros / numel, "zeros": zeros, "pruned_matrices": len(self.decisions), **more}

    def _state(self) -> dict[str, Tensor]:
        from dataclasses import asdict

        hidden = {"hidden": torch.cat([b.hidden.cpu() for b in self.batches])} if self.batches else {}
        return {
            **hidden,
            "decisions": as_note([asdict(d) for d in self.decisions]),
            **{f"tensor.{k}": v for k, v in self.tensors.items()},
            **{f"mask.{k}": torch.from_numpy(v) for k, v in self.packed.items()},
        }

    def _restore(self, progress: Progress | None) -> int:
        saved = progress.load() if progress else None
        if saved is None:
            return 0
        step, state = saved
        for batch in self.batches:
            batch.hidden = state["hidden"][batch.rows.start : batch.rows.stop].to(batch.hidden)
        self.decisions = [Decision(**row) for row in from_note(state["decisions"])]
        self.tensors = {k.removeprefix("tensor."): v for k, v in state.items() if k.startswith("tensor.")}
        self.packed = {k.removeprefix("mask."): v.numpy() for k, v in state.items() if k.startswith("mask.")}
        return step
