"""What every pruner has in common: the target, its allocation, and the pass that calls it group by group."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.architectures import Architecture, ModelShape
from compression_dags.errors import InputError
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import number
from compression_dags.solvers.patterns import Pattern
from compression_dags.sparsity.allocation import (
    UNSTRUCTURED,
    AllocationProbe,
    Matrix,
    SparsityEvidence,
    SparsityPlan,
    make_plan,
)
from compression_dags.sparsity.allocators import AnyAllocation
from compression_dags.sparsity.allocators.uniform import Uniform
from compression_dags.sparsity.fitness import pruned_widths, refuse_unprunable
from compression_dags.sparsity.identity import plan_identity
from compression_dags.stage import Progress, Stage, StatisticKind, Target, implementation, silent
from compression_dags.step import ANALYSIS, WEIGHTS, Chain, Kind, Step, worker

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.provenance.resume import ResumePoint
    from compression_dags.sparsity.pruner import Problem, Pruned
    from compression_dags.sparsity.results import Sparsified

PLAN_FIELDS = {"sparsity", "pattern", "allocation"}


class SparsifyStage(Stage):
    """Options of all pruners."""

    stage: ClassVar[str] = "sparsify"
    kinds: ClassVar[tuple[Kind, ...]] = (
        Kind(
            "sparsity_plan",
            "The share of zeros, or the pattern, of every projection.",
            (WEIGHTS, *ANALYSIS, "similarity_redundancy"),
        ),
        Kind(
            "sparse_weights",
            "The pruned model, its packed masks beside it, reload gate passed.",
            (WEIGHTS, "sparsity_plan", "calibration_tokens"),
            weights=True,
        ),
    )
    version: ClassVar[str] = "1"
    statistic: ClassVar[StatisticKind] = "none"
    rule: ClassVar[str]
    """Which weights go, in words that follow `zeros are`: `the smallest |W|`."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="share of zeros over all projections")
    pattern: str | None = Field(None, description="N:M, kept weights of every M inputs: 2:4, 4:8")
    allocation: AnyAllocation = Field(Uniform(), description="how the zeros are shared out")
    propagate: Literal["pruned", "dense"] = Field(
        "pruned", description="pruned: statistics of the already pruned model; dense: of the model as it was"
    )
    expert_tokens: Literal["routed", "all"] = Field(
        "routed", description="tokens that an expert is calibrated on: those routed to it, or all of its layer"
    )

    @model_validator(mode="after")
    def _one_target(self) -> SparsifyStage:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity (0.5) or pattern (2:4)")
        if self.pattern is not None:
            asked = Pattern.parse(self.pattern)
            if not asked.zeros:
                raise ValueError(f"pattern {self.pattern} keeps every weight; N must be below M")
        return self

    @property
    def asked(self) -> Pattern:
        if self.pattern is not None:
            return Pattern.parse(self.pattern)
        assert self.sparsity is not None
        return Pattern.unstructured(self.sparsity)

    @property
    def versions(self) -> dict[str, str]:
        allocation = self.allocation
        return super().versions | {f"allocation: {allocation.method}": allocation.version}

    @property
    def follows(self) -> Target:
        """Whose outputs the pruned ones should be near. Experts always follow their own."""
        return "own"

    @property
    def reads_tokens(self) -> bool:
        return self.statistic != "none"

    def plan_reads(self, merged: bool) -> tuple[str, ...]:
        """Shared analysis that the sparsity plan reads.

        The stored statistics are those of the base model. Weights that were merged or recovered before get a
        calibration pass of their own, from the tokens; so does whatever prunes to compare candidates.
        """
        allocation = self.allocation
        reads = allocation.reads_statistics or bool(allocation.needs)
        if allocation.measures or (reads and merged):
            return ("calibration_tokens",)
        found = ["calibration_activations"] * allocation.reads_statistics
        return (*found, *(f"similarity_{need}" for need in allocation.needs))

    def steps(self, chain: Chain) -> tuple[Step, ...]:
        reads, worker = self.plan_reads(chain.merged), "compression_dags.sparsity.workers"
        options = plan_identity(self, reads, chain.calibration.samples, chain.calibration.seed)
        tokens = ("calibration_tokens",) if self.reads_tokens else ()
        plan = Step(
            "sparsity_plan",
            self.code_version,
            options,
            (WEIGHTS, *reads),
            f"{worker}:plan",
            self,
            gpu="calibration_tokens" in reads,
        )
        sparse = Step(
            "sparse_weights",
            self.version,
            self.prune_options(),
            (WEIGHTS, "sparsity_plan", *tokens),
            f"{worker}:prune",
            self,
            weights=True,
        )
        return plan, sparse

    def plan_options(self) -> dict[str, Any]:
        """Options that decide the plan. An allocation that prunes to compare candidates depends on all of them."""
        whole = self.options()
        return whole if self.allocation.measures else {k: v for k, v in whole.items() if k in PLAN_FIELDS}

    def prune_options(self) -> dict[str, Any]:
        """Options that decide the weights, given the plan."""
        return {k: v for k, v in self.options().items() if k not in PLAN_FIELDS}

    def check(self, shape: ModelShape) -> None:
        self.allocation.check(self.asked.sparsity)
        self.allocation.check_model(self.asked.sparsity, shape)
        refuse_unprunable(shape)
        for width, what in pruned_widths(shape):
            if self.asked.m and width % self.asked.m:
                raise InputError(f"sparsify: pattern {self.pattern} does not divide the {what} {width}")

    def check_tokens(self, shape: ModelShape, sequences: int, length: int) -> None:
        if self.allocation.measures and sequences < 2:
            raise InputError(
                f"sparsify: allocation {self.allocation.method} scores candidates on sequences kept apart and needs 2, "
                f"not {sequences}: raise calibration.sequences"
            )

    def plan(
        self, source: Checkpoint, evidence: SparsityEvidence, probe: AllocationProbe | None = None
    ) -> tuple[SparsityPlan, list[Decision]]:
        """Which pattern every projection of `source` gets, and a row for each."""
        matrices, target = all_matrices(source), self.asked.sparsity
        pattern = self.pattern or UNSTRUCTURED
        allocated = self.allocation.allocate(matrices, target, evidence, probe, pattern)
        found = make_plan(self.allocation.method, matrices, allocated, target, pattern)
        rows = [
            Decision(
                "sparsity_plan",
                self.allocation.method,
                step,
                m.name,
                "prune",
                [m.layer],
                found.patterns[m.name].sparsity,
                "share of zeros",
                f"{_share_said(found.patterns[m.name], allocated.sparsity[m.name])}: "
                f"{self.allocation.why(m, allocated, target)}",
                {"parameters": m.numel, **found.evidence["matrices"][m.name]},
            )
            for step, m in enumerate(matrices)
        ]
        return found, rows

    def prune(self, problem: Problem) -> list[Pruned]:
        """The matrices that read one input, pruned by the function that the method names."""
        return implementation(self)(self, problem)

    def sparsify(
        self,
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
        """The checkpoint that is written: every projection pruned by `plan`, with its masks (`masks.MASKS`).

        Raises:
            InputError: no calibration tokens for a pruner that reads them, or a plan for other matrices.
            IntegrityError: activations or Hessians that cannot be used.
        """
        run = worker("compression_dags.sparsity.pruning_pass:sparsify")
        return run(self, source, plan, blocks, directory, device=device, dtype=dtype, resume=resume, progress=progress)


def _share_said(pattern: Pattern, asked: float) -> str:
    """`pruned by 0.5`; N:M with its name, and what was asked for if that is another share."""
    share = f"pruned by {number(pattern.sparsity)}"
    if pattern.m is None:
        return share
    rounded = "" if pattern.sparsity == asked else f", the nearest to {number(asked)} that fits"
    return f"{share} ({pattern.m - (pattern.zeros or 0)}:{pattern.m}{rounded})"


def all_matrices(source: Checkpoint) -> list[Matrix]:
    """Every linear projection of every layer, in the order in which they are evaluated; experts one after another.

    Routers are none: they choose, and are a thousandth of a layer.
    """
    found = []
    for index in range(source.num_layers):
        prefix, names = source.architecture.layer_prefix(index), source.layer(index)
        present = (p for p in source.architecture.projections_of(index) if f"{p}.weight" in names)
        for local in itertools.chain(present, _of_experts(source.architecture, names)):
            rows, columns = source.tensors[names[f"{local}.weight"]].shape
            found.append(Matrix(f"{prefix}{local}", index, local, rows, columns))
    return found


def _of_experts(architecture: Architecture, names: Container[str]) -> Iterator[str]:
    """Gate, up and down of every expert of the layer that has tensors of these `names`."""
    if (experts := architecture.experts) is None:
        return
    for expert in itertools.count():
        matrices = experts.matrices(expert)
        if f"{matrices[0]}.weight" not in names:
            return
        yield from matrices
