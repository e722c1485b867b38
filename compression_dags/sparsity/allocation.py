"""How much sparsity each matrix gets: what allocators read, what they return, and the plan that is stored.

A method gives shares of zeros. Here they are brought to the target over all parameters (not over layers), and rounded
to a grid by largest remainder. So the achieved mean is off by less than one grid step of one unit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from pydantic import Field, field_validator

from compression_dags.architectures import Architecture, ModelShape
from compression_dags.errors import InputError
from compression_dags.options import Options
from compression_dags.similarity.redundancy import Redundancy
from compression_dags.solvers.patterns import Pattern
from compression_dags.sparsity.knapsack import fill_smooth

if TYPE_CHECKING:
    from torch import Tensor

PLAN, EVIDENCE = "plan.json", "evidence.json"
UNSTRUCTURED = "unstructured"
#: No rule may ask for more: a matrix of zeros is a dropped one.
MOST = 0.99
_EXPERT = re.compile(r"^(?P<block>.+)\.experts\.\d+\.(?P<which>\w+)$")


@dataclass(frozen=True)
class Matrix:
    """One linear projection.

    Attributes:
        name: full module name, `model.layers.3.mlp.up_proj`.
        local: name within its layer, `mlp.up_proj` or `mlp.experts.7.up_proj`.
        rows, columns: outputs, inputs.
    """

    name: str
    layer: int
    local: str
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def expert_block(self) -> str | None:
        """`mlp.experts` for a matrix of an expert, whichever expert it is."""
        match = _EXPERT.match(self.local)
        return f"{match['block']}.experts" if match else None


@dataclass(frozen=True)
class SparsityEvidence:
    """What allocators may read besides weights.

    Attributes:
        architecture: names the group of projections that a matrix shares its input with.
        statistics: of the calibration pass: `norms.layers.3.mlp_input.mean_square` → (channels,), …
        redundancy: the RM tables, for methods that need them.
    """

    architecture: Architecture
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    redundancy: Redundancy | None = None

    def input_of(self, matrix: Matrix) -> str | None:
        """Name of the input that the matrix reads; None for what lies inside an expert."""
        for group in self.architecture.groups:
            if matrix.local in group.projections:
                return group.name
        experts, match = self.architecture.experts, _EXPERT.match(matrix.local)
        if experts and match and match["which"] in (experts.gate, experts.up, "gate_proj", "up_proj"):
            return "experts_input"
        return None

    def channel_norms(self, matrix: Matrix) -> np.ndarray | None:
        """(columns,) root mean square of the matrix's inputs over all calibration tokens; None if not recorded."""
        found = self.statistics.get(f"norms.layers.{matrix.layer}.{self.input_of(matrix)}.mean_square")
        return None if found is None else np.sqrt(np.asarray(found, dtype=np.float64))


class AllocationProbe(Protocol):
    """What an allocator that reads weights or measures works on."""

    def weights(self, name: str) -> Tensor:
        """Weight (rows, columns) of the matrix of that name, on the device to compute on, in any float dtype."""
        ...

    def held_out_loss(self, plan: SparsityPlan) -> float:
        """Loss of the model pruned by a plan, on calibration text kept apart; never on an evaluation split."""
        ...


@dataclass(frozen=True)
class Unit:
    """Matrices that get one sparsity."""

    name: str
    layer: int
    matrices: tuple[Matrix, ...]

    @property
    def numel(self) -> int:
        return sum(m.numel for m in self.matrices)


@dataclass(frozen=True)
class Allocated:
    """What a method decided.

    Attributes:
        sparsity: of every matrix, by name, in [0, 1).
        evidence: by matrix name, what led to it (JSON values).
        summary: what concerns all of them (bounds, dual price, counts, search tried).
        notes: sentences a reader must see.
    """

    sparsity: dict[str, float]
    evidence: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SparsityPlan:
    """Which pattern every matrix must satisfy.

    `plan.json` holds what pruning needs, so that equal plans of two methods are equal bytes; `evidence.json` holds the
    method's name and why.

    Attributes:
        method: the allocator.
        target: share of zeros over all matrices that was asked for.
        pattern: `unstructured`, or the N:M that was asked for (`2:4`); then `patterns` may mix N at that M.
        patterns: by matrix name.
        evidence: `summary`, `notes`, `matrices` (name → row), all JSON values.
    """

    method: str
    target: float
    pattern: str
    patterns: Mapping[str, Pattern]
    evidence: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        rows = {
            name: {"sparsity": p.sparsity, **({} if p.m is None else {"m": p.m, "zeros": p.zeros})}
            for name, p in self.patterns.items()
        }
        return json.dumps({"target": self.target, "pattern": self.pattern, "patterns": rows}, indent=1)

    @property
    def digest(self) -> str:
        """sha256 of what pruning needs: equal for equal plans, whichever method made them."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, directory: Path) -> None:
        (directory / PLAN).write_text(self.to_json())
        (directory / EVIDENCE).write_text(json.dumps({"method": self.method, **self.evidence}, indent=1))

    @classmethod
    def load(cls, directory: Path) -> SparsityPlan:
        """A stored plan; without `evidence.json` its method is `stored`."""
        raw = json.loads((directory / PLAN).read_text())
        patterns = {k: Pattern(p["sparsity"], p.get("m"), p.get("zeros")) for k, p in raw["patterns"].items()}
        evidence: dict[str, Any] = {"method": "stored"}
        if (directory / EVIDENCE).is_file():
            evidence = json.loads((directory / EVIDENCE).read_text())
        return cls(evidence.pop("method"), raw["target"], raw["pattern"], patterns, evidence)


class Allocation(Options):
    """Options of an allocator. Subclasses set the `method` literal and define `allocate`."""

    version: ClassVar[str] = "1"
    implementation: ClassVar[str] = ""
    """`module:function` that computes the scores, where they need torch."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Similarity assets that `allocate` reads: `redundancy`."""
    reads_statistics: ClassVar[bool] = False
    """Whether it reads the channel norms of the calibration pass."""

    method: str

    @property
    def measures(self) -> bool:
        """Whether it prunes and scores the model: `probe.held_out_loss`."""
        return False

    @property
    def reads_weights(self) -> bool:
        """Whether it reads weights: `probe.weights`."""
        return False

    def check(self, target: float) -> None:
        """Refuse a target that cannot be met, before any compute.

        Raises:
            InputError: naming it and what is allowed.
        """
        check_target(target)

    def check_model(self, target: float, shape: ModelShape) -> None:
        """Refuse what the model's shapes do not allow, before any compute.

        Raises:
            InputError: naming the option, its value and what is allowed.
        """

    def allocate(
        self,
        matrices: Sequence[Matrix],
        target: float,
        evidence: SparsityEvidence,
        probe: AllocationProbe | None = None,
        pattern: str = UNSTRUCTURED,
    ) -> Allocated:
        """Decide the sparsity of every matrix, in depth order; `pattern` is only for what a candidate is scored with.

        Raises:
            InputError: the target cannot be met, or evidence is missing.
        """
        raise AssertionError(f"{type(self).__name__} must define allocate")

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        """Why the matrix got its sparsity: a clause with the numbers that decided, read from its evidence."""
        raise AssertionError(f"{type(self).__name__} must define why")


class GriddedAllocation(Allocation):
    """An allocator whose sparsities are rounded to a grid."""

    granularity: float = Field(0.001, ge=1e-6, le=0.1, description="grid that sparsities are rounded to")

    @field_validator("granularity")
    @classmethod
    def _divides_one(cls, value: float) -> float:
        if not math.isclose(1 / value, round(1 / value), rel_tol=1e-9):
            raise ValueError(f"granularity {value} does not divide 1; allowed: 1 / a whole number, such as 0.005")
        return value

    def check(self, target: float) -> None:
        """See `Allocation.check`; also a target above `MOST`."""
        super().check(target)
        if target > MOST:
            raise InputError(
                f"sparsity {target} is more than {MOST}, the most a matrix may get from allocation {self.method}"
            )


def check_target(target: float) -> None:
    if not (math.isfinite(target) and 0 <= target < 1):
        raise InputError(f"sparsity {target} is not possible; allowed: at least 0 and below 1")


def need_probe(probe: AllocationProbe | None, method: str) -> AllocationProbe:
    if probe is None:
        raise InputError(f"allocation {method} reads weights; none were given")
    return probe


def layer_units(matrices: Sequence[Matrix]) -> list[Unit]:
    """One unit a layer, in depth order."""
    layers = sorted({m.layer for m in matrices})
    return [Unit(f"layer {i}", i, tuple(m for m in matrices if m.layer == i)) for i in layers]


def sizes(units: Sequence[Unit]) -> np.ndarray:
    """(n,) parameters, float64."""
    return np.array([u.numel for u in units], dtype=np.float64)


def mean_sparsity(matrices: Sequence[Matrix], sparsity: Mapping[str, float]) -> float:
    """Parameter-weighted."""
    return math.fsum(m.numel * sparsity[m.name] for m in matrices) / sum(m.numel for m in matrices)


def shifted(shares: np.ndarray, size: np.ndarray, target: float) -> np.ndarray:
    """Shares plus one constant, clipped to [0, `MOST`], whose parameter-weighted mean is the target.

    Raises:
        InputError: the target is above `MOST`.
    """
    if target > MOST:
        raise InputError(f"sparsity {target} is more than {MOST}, the most a matrix may get from this allocation")
    zeros = np.zeros_like(size)
    return fill_smooth(
        shares * size, size, zeros, np.full_like(size, MOST), target * size.sum(), curvature=size
    ).density


def round_to_grid(shares: np.ndarray, size: np.ndarray, target: float, steps: int) -> np.ndarray:
    """Multiples k of 1/`steps`, 0 ≤ k < steps, by largest remainder: (n,) int64.

    The parameter-weighted mean differs from the target by less than one step of one unit if that of `shares` is the
    target. A share is moved by less than a step; one that is on the grid already stays.
    """
    exact = np.clip(shares, 0.0, 1.0) * steps
    low = np.minimum(np.floor(exact + 1e-9), steps - 1).astype(np.int64)
    rest = np.where(low + 1 < steps, exact - low, 0.0)
    owed = target * steps * size.sum() - float(low @ size)
    left = []
    for index in np.argsort(-rest, kind="stable"):
        if rest[index] <= 1e-9:
            break
        if size[index] <= owed * (1 + 1e-12):
            low[index] += 1
            owed -= size[index]
        else:
            left.append(index)
    if left:
        nearest = min(left, key=lambda i: abs(owed - size[i]))
        if abs(owed - size[nearest]) < abs(owed):
            low[nearest] += 1
    return low


def on_grid(units: Sequence[Unit], shares: np.ndarray, target: float, granularity: float) -> dict[str, float]:
    """Sparsity by matrix name: the units' shares rounded to multiples of `granularity`."""
    steps = 1 / granularity
    if not math.isclose(steps, round(steps), rel_tol=1e-9):
        raise InputError(f"granularity {granularity} does not divide 1; allowed: 1 / a whole number, such as 0.005")
    counts = round_to_grid(shares, sizes(units), target, round(steps))
    values = (counts / round(steps)).tolist()
    return {m.name: v for unit, v in zip(units, values, strict=True) for m in unit.matrices}


def per_matrix(units: Sequence[Unit], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Evidence by matrix name from rows by unit."""
    return {m.name: {"unit": u.name, **row} for u, row in zip(units, rows, strict=True) for m in u.matrices}


def place_among(allocated: Allocated, name: str, key: str, group: str = "unit") -> tuple[int, int]:
    """(rank of the matrix's `key` among the units, 1 for the largest; number of units).

    Args:
        group: the evidence that matrices of one unit share.
    """
    values = {row[group]: row[key] for row in allocated.evidence.values()}
    own = allocated.evidence[name][key]
    return 1 + sum(v > own for v in values.values()), len(values)


def make_plan(
    method: str, matrices: Sequence[Matrix], allocated: Allocated, target: float, pattern: str = UNSTRUCTURED
) -> SparsityPlan:
    """The plan of an allocation, unstructured or with N:M patterns of one M.

    N:M: sparsities become multiples of 1/M by largest remainder over parameters. Matrices of a layer that got one
    sparsity keep one N, so the mean is exact to one step of one layer (of a matrix where the method tells them apart).

    Raises:
        InputError: the target or the pattern is impossible.
    """
    check_target(target)
    patterns = (
        {m.name: Pattern.unstructured(allocated.sparsity[m.name]) for m in matrices}
        if pattern == UNSTRUCTURED
        else _mixed_patterns(matrices, allocated.sparsity, target, pattern)
    )
    achieved = mean_sparsity(matrices, {name: p.sparsity for name, p in patterns.items()})
    rows = {m.name: {"requested": allocated.sparsity[m.name], **allocated.evidence.get(m.name, {})} for m in matrices}
    summary = {**allocated.summary, "planned_mean": achieved}
    evidence = {"summary": summary, "notes": list(allocated.notes), "matrices": rows}
    return SparsityPlan(method, target, pattern, patterns, evidence)


def _mixed_patterns(
    matrices: Sequence[Matrix], sparsity: Mapping[str, float], target: float, pattern: str
) -> dict[str, Pattern]:
    asked = Pattern.parse(pattern)
    assert asked.m is not None
    units = []
    for unit in layer_units(matrices):
        alike = len({sparsity[m.name] for m in unit.matrices}) == 1
        units += [unit] if alike else [Unit(m.name, m.layer, (m,)) for m in unit.matrices]
    shares = np.array([sparsity[u.matrices[0].name] for u in units])
    zeros = round_to_grid(shares, sizes(units), target, asked.m).tolist()
    found = {
        m.name: Pattern.n_of_m(asked.m - z, asked.m) for u, z in zip(units, zeros, strict=True) for m in u.matrices
    }
    return {m.name: found[m.name] for m in matrices}
