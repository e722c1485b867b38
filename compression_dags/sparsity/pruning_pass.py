"""The pass of a pruner over a model, group of matrices by group of matrices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from compression_dags.errors import InputError
from compression_dags.passes.input_sums import InputSums
from compression_dags.passes.sequential import Modules, SequentialPass
from compression_dags.provenance.resume import ResumePoint
from compression_dags.sparsity.allocation import SparsityPlan
from compression_dags.sparsity.experts import FUSED, ExpertBlock
from compression_dags.sparsity.pruner import Problem, Pruned
from compression_dags.sparsity.results import Results, Sparsified
from compression_dags.sparsity.stage import SparsifyStage, all_matrices
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint


class PruningPass(SequentialPass):
    """One run of a pruner over a model. Experts are one more stop of a layer's forward: `ExpertBlock`."""

    def __init__(
        self,
        stage: SparsifyStage,
        source: Checkpoint,
        plan: SparsityPlan,
        blocks: TokenBlocks | None,
        device: str,
        dtype: str,
    ):
        wanted = {m.name for m in all_matrices(source)}
        if wanted != set(plan.patterns):
            odd = sorted(wanted ^ set(plan.patterns))
            raise InputError(f"sparsify: the plan is for another model: {len(odd)} matrices differ, first {odd[0]}")
        self.stage, self.plan = stage, plan
        self.results = Results(stage, source, plan)
        super().__init__(
            source,
            blocks,
            device,
            dtype,
            name=stage.method,
            statistic=stage.statistic,
            propagate=stage.propagate,
            follows=stage.follows,
        )

    def run(self, directory: Path, resume: ResumePoint | None, progress: Progress) -> Sparsified:
        self.run_layers(resume, progress)
        return self.results.write(directory)

    def change(self, index: int, held: dict[str, Tensor], seen: InputSums | None, label: str) -> list[Tensor]:
        return [pruned.weight for pruned in self.prune_matrices(index, held, seen, label)]

    def prune_matrices(
        self, index: int, held: dict[str, Tensor], seen: InputSums | None, label: str, **stated: str
    ) -> list[Pruned]:
        """Matrices that read one input, pruned and recorded; `stated` goes into the row of each."""
        weights = tuple(self.stored(name, weight) for name, weight in held.items())
        problem = Problem.of(tuple(held), weights, self.plan, seen, label)
        found = self.stage.prune(problem)
        for name, pruned in zip(held, found, strict=True):
            pruned.evidence.update(stated)
            self.results.add(index, name, pruned, problem.tokens)
        return found

    def extras(self, index: int, modules: Modules) -> list[ExpertBlock]:
        return [ExpertBlock(self, index, modules[FUSED])] if FUSED in modules else []

    def results_state(self) -> dict[str, Tensor]:
        return self.results.state()

    def restore_results(self, state: dict[str, Tensor]) -> None:
        self.results.restore(state)


def sparsify(
    stage: SparsifyStage,
    source: Checkpoint,
    plan: SparsityPlan,
    blocks: TokenBlocks | None,
    directory: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    resume: ResumePoint | None = None,
    progress: Progress = silent,
) -> Sparsified:
    """The checkpoint pruned by `plan`; see `SparsifyStage.sparsify`."""
    stage.check(source.shape)
    if stage.reads_tokens and blocks is None:
        raise InputError(f"sparsify: {stage.method} needs calibration tokens; none were given")
    return PruningPass(stage, source, plan, blocks, device, dtype).run(directory, resume, progress)
