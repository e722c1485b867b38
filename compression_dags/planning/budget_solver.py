"""The best plan for a budget, exactly: a mixed integer program over the candidate table (scipy's HiGHS).

    min  Σ cost_a x_a
    s.t. every part of the model is decided by exactly one candidate, at most one of them drops layers,
         no more layers go than the largest cut that was measured,   Σ size_a x_a ≤ budget,   x ∈ {0, 1}

Costs at a scheme are scaled by what all parts at that scheme cost together over the sum of their own; layers that are
dropped together were measured together. A mixture of schemes is taken at what mixtures of about its size were measured
to cost over what they promised, and only if it is then clearly better than one scheme everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from compression_dags.errors import InputError, IntegrityError
from compression_dags.planning.bounds import Measure, limits_in
from compression_dags.planning.candidates import Candidate, CandidateTable

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

#: A mixture must cost less than this share of one scheme everywhere, all layers kept, which was measured as a whole
#: (with a cut beside it, it is a sum like the mixture, and they are compared as they are). Two runs of one mixture on
#: SmolLM2, whose targets differed in the last bits, cost 0.209 and 0.142 nats: below a quarter is within that noise.
CLEARLY = 0.75
#: Schemes whose sizes differ by less (a group size) are one where mixtures are to be measured.
CLOSE = 1.05
#: By how much HiGHS may miss a constraint.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Solution:
    """The candidates to take, in the order of the layers.

    Attributes:
        cost: predicted KL(base ‖ compressed), nats a token.
        bytes, parameters: of all tensors, exact; a file adds its header.
        bits: stored bits of the projections left, over their weights.
        dense_bytes: of the base model.
    """

    taken: tuple[Candidate, ...]
    cost: float
    bytes: int
    parameters: int
    bits: float
    dense_bytes: int
    removed: int

    @property
    def labels(self) -> set[str]:
        """What is done to projections."""
        return {a.label for a in self.taken if not a.gone}


def solve(table: CandidateTable, measure: Measure, budget: float) -> Solution:
    """The plan with the least predicted KL whose size is at most `budget`.

    Args:
        budget: bytes of all weights, parameters of the whole model, or average bits of the projections' weights.

    Raises:
        InputError: no plan of the candidate table is that small.
    """
    alive = [a for a in table.alternatives if a.usable]
    if measure == "bits":
        alive = [a for a in alive if a.kind == "quantize"]  # bits are of the weights; depth is another knob
    limits = limits_in(table, alive, measure, table.most_removed)
    mixed = _program(table, alive, measure, budget) if budget >= limits.least else None
    if mixed is None:
        raise InputError(limits.refusal(budget))
    if not table.mixtures or len(mixed.labels) < 2:
        return mixed
    dearer = _program(table, alive, measure, budget, _over_promised(table, mixed.bits))
    depth = [a for a in alive if a.kind == "drop"]
    same = [[a for a in own if a.kind == "quantize" and np.isfinite(a.cost)] for own in table.uniform().values()]
    pure = [_program(table, [*own, *_left(table, own), *depth], measure, budget) for own in same if own]
    fair = [(s.cost * (1 if s.removed else CLEARLY), s) for s in pure if s]
    fair += [(dearer.cost, dearer)] if dearer else []
    return min(fair, key=lambda pair: pair[0])[1]


def mixture_sizes(table: CandidateTable) -> list[float]:
    """Bits a weight at which mixtures are worth measuring: those of the schemes between the smallest and the largest,
    and between every two neighbours their geometric mean."""
    bits = [_bits(table, own) for own in table.uniform().values() if own[0].kind == "quantize"]
    bits = sorted(b for b in bits if b < 8 * dense_itemsize(table))
    bits = [b for a, b in itertools.pairwise([0.0, *bits]) if b > CLOSE * a]
    between = [float(np.sqrt(a * b)) for a, b in itertools.pairwise(bits)]
    return sorted([*bits[1:-1], *between])


def _bits(table: CandidateTable, own: list[Candidate]) -> float:
    """Stored bits a weight of one scheme everywhere."""
    return 8 * (sum(a.bytes for a in (*own, *_left(table, own))) - table.norm_bytes) / table.projections


def _left(table: CandidateTable, own: list[Candidate]) -> list[Candidate]:
    """What these do not decide, as it is: groups that the quantizer ignores."""
    decided = {cell for a in own for cell in a.cells(table.groups)}
    return [a for a in table.alternatives if a.is_dense and decided.isdisjoint(a.cells(table.groups))]


def _over_promised(table: CandidateTable, bits: float) -> float:
    """Measured over promised cost of mixtures of about this size; 1 for a single scheme at either end."""
    ends = [_bits(table, own) for own in table.uniform().values() if own[0].kind == "quantize"]
    known = {min(ends): 1.0, max(ends): 1.0} | {b: kl / cost for b, cost, kl in table.mixtures if cost > 0}
    at = sorted(known)
    return float(np.interp(bits, at, [known[b] for b in at]))


def _program(
    table: CandidateTable, alive: list[Candidate], measure: Measure, budget: float, mixing: float = 1.0
) -> Solution | None:
    """The cheapest of these candidates, those of schemes at `mixing` times their cost; None if nothing fits."""
    sizes, limit = _sizes(table, alive, measure, budget)
    costs = np.array([a.cost * _scale(table, a) * (mixing if a.kind == "quantize" else 1) for a in alive])
    scale = max(1.0, float(np.max(sizes)))  # HiGHS' tolerances are absolute
    structure = _structure(table, alive)
    for spared in (0.0, 2 * TOLERANCE):  # a plan within the tolerance above the limit is asked for once more, below it
        size = LinearConstraint(sizes[None] / scale, -np.inf, limit / scale - spared)
        with _silent_solver():
            found = milp(
                costs,
                integrality=np.ones(len(alive)),
                bounds=Bounds(0, 1),
                constraints=[*structure, size],
                options={"mip_rel_gap": 0.0},
            )
        if found.status == 2 or found.x is None:
            return None
        if float(sizes[found.x > 0.5].sum()) <= limit * (1 + 1e-9):
            taken = tuple(a for a, x in zip(alive, found.x, strict=True) if x > 0.5)
            return _solution(table, taken, float(found.fun))
    raise IntegrityError(f"the solver returned a plan over the budget of {budget:g} {measure}")


def _structure(table: CandidateTable, alive: list[Candidate]) -> list[LinearConstraint]:
    """Every part decided once, at most one cut, and no more layers gone than the largest cut."""
    cells = {cell: i for i, cell in enumerate((n, g) for n in range(table.layers) for g in table.groups)}
    rows, columns = zip(*((cells[c], j) for j, a in enumerate(alive) for c in a.cells(table.groups)), strict=True)
    cover = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(cells), len(alive)))
    drops = np.array([a.kind == "drop" for a in alive], dtype=float)
    gone = np.array([len(a.gone) for a in alive], dtype=float)
    limits = [LinearConstraint(gone[None], 0, table.most_removed)] if gone.any() else []
    return [LinearConstraint(cover, 1, 1), LinearConstraint(drops[None], 0, 1), *limits]


@contextlib.contextmanager
def _silent_solver() -> Iterator[None]:
    """Standard output goes nowhere: HiGHS prints a line there at some budgets, whatever its options say."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _scale(table: CandidateTable, a: Candidate) -> float:
    return 1.0 if a.gone else table.scale(a.label)


def _sizes(table: CandidateTable, alive: list[Candidate], measure: Measure, budget: float) -> tuple[np.ndarray, float]:
    """Size of every candidate and the limit on their sum, in units of the measure."""
    if measure == "parameters":
        return np.array([float(a.parameters) for a in alive]), budget - table.fixed_parameters
    sizes = np.array([float(a.bytes) for a in alive])
    if measure == "bytes":
        return sizes, budget - table.fixed_bytes
    return sizes, budget * table.projections / 8 + table.norm_bytes


def dense_itemsize(table: CandidateTable) -> int:
    """Bytes a weight of the base model's projections."""
    dense = sum(a.bytes for a in table.alternatives if a.kind == "quantize" and a.choice is None)
    return round(dense / table.projections)


def _solution(table: CandidateTable, taken: tuple[Candidate, ...], cost: float) -> Solution:
    taken = tuple(sorted(taken, key=lambda a: (a.layer, table.groups.index(a.group) if a.group else -1)))
    dense = [a for a in table.alternatives if a.is_dense]
    total = table.fixed_bytes + sum(a.bytes for a in taken)
    parameters = table.fixed_parameters + sum(a.parameters for a in taken)
    removed = sum(len(a.gone) for a in taken)
    left = table.norm_bytes * (table.layers - removed) / table.layers
    weights = table.projections * (table.layers - removed) / table.layers
    bits = 8 * (total - table.fixed_bytes - left) / max(1.0, weights)
    whole = table.fixed_bytes + sum(a.bytes for a in dense)
    return Solution(taken, cost, total, parameters, bits, whole, removed)
