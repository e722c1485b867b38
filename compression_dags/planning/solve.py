"""The best plan for a budget, exactly: a mixed integer program over the bank (scipy's HiGHS).

    min  Σ cost_a x_a
    s.t. every part of the model is decided by exactly one alternative, at most one of them drops layers,
         Σ size_a x_a ≤ budget,   x ∈ {0, 1}

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
from typing import Literal

import numpy as np

from compression_dags.errors import InputError, IntegrityError
from compression_dags.planning.alternatives import Alternative, Bank

Measure = Literal["bytes", "parameters", "bits"]
#: A mixture must cost less than this share of one scheme everywhere, all layers kept, which was measured as a whole
#: (with a cut beside it, it is a sum like the mixture, and they are compared as they are). Two runs of one mixture on
#: SmolLM2, whose targets differed in the last bits, cost 0.209 and 0.142 nats: below a quarter is within that noise.
CLEARLY = 0.75
#: Schemes whose sizes differ by less (a group size) are one where mixtures are to be measured.
CLOSE = 1.05


@dataclass(frozen=True)
class Solution:
    """The alternatives to take, in the order of the layers.

    Attributes:
        cost: predicted KL(base ‖ compressed), nats a token.
        bytes, parameters: of all tensors, exact; a file adds its header.
        bits: stored bits of the projections left, over their weights.
        dense_bytes: of the base model.
    """

    taken: tuple[Alternative, ...]
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


def solve(bank: Bank, measure: Measure, budget: float) -> Solution:
    """The plan with the least predicted KL whose size is at most `budget`.

    Args:
        budget: bytes of all weights, parameters of the whole model, or average bits of the projections' weights.

    Raises:
        InputError: no plan of the bank is that small.
    """
    alive = [a for a in bank.alternatives if a.alive]
    if measure == "bits":
        alive = [a for a in alive if a.kind == "quantize"]  # bits are of the weights; depth is another knob
    mixed = _program(bank, alive, measure, budget)
    if mixed is None:
        raise InputError(_too_small(bank, alive, measure, budget))
    if not bank.mixtures or len(mixed.labels) < 2:
        return mixed
    dearer = _program(bank, alive, measure, budget, _over_promised(bank, mixed.bits))
    depth = [a for a in alive if a.kind == "drop"]
    same = [[a for a in own if a.kind == "quantize" and np.isfinite(a.cost)] for own in bank.uniform().values()]
    pure = [_program(bank, [*own, *depth], measure, budget) for own in same if own]
    fair = [(s.cost * (1 if s.removed else CLEARLY), s) for s in pure if s]
    fair += [(dearer.cost, dearer)] if dearer else []
    return min(fair, key=lambda pair: pair[0])[1]


def mixture_sizes(bank: Bank) -> list[float]:
    """Bits a weight at which mixtures are worth measuring: those of the schemes between the smallest and the largest,
    and between every two neighbours their geometric mean."""
    bits = [_bits(bank, own) for own in bank.uniform().values() if own[0].kind == "quantize"]
    bits = sorted(b for b in bits if b < 8 * dense_itemsize(bank))
    bits = [b for a, b in itertools.pairwise([0.0, *bits]) if b > CLOSE * a]
    between = [float(np.sqrt(a * b)) for a, b in itertools.pairwise(bits)]
    return sorted([*bits[1:-1], *between])


def _bits(bank: Bank, own: list[Alternative]) -> float:
    """Stored bits a weight of one scheme everywhere."""
    dense = [a for a in bank.alternatives if a.kind == "quantize" and a.choice is None]
    norms = sum(a.bytes for a in dense) - bank.projections * dense_itemsize(bank)
    return 8 * (sum(a.bytes for a in own) - norms) / bank.projections


def _over_promised(bank: Bank, bits: float) -> float:
    """Measured over promised cost of mixtures of about this size; 1 for a single scheme at either end."""
    ends = [_bits(bank, own) for own in bank.uniform().values() if own[0].kind == "quantize"]
    known = {min(ends): 1.0, max(ends): 1.0} | {b: kl / cost for b, cost, kl in bank.mixtures if cost > 0}
    at = sorted(known)
    return float(np.interp(bits, at, [known[b] for b in at]))


def _program(
    bank: Bank, alive: list[Alternative], measure: Measure, budget: float, mixing: float = 1.0
) -> Solution | None:
    """The cheapest of these alternatives, those of schemes at `mixing` times their cost; None if nothing fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes, limit = _sizes(bank, alive, measure, budget)
    costs = [a.cost * _scale(bank, a) * (mixing if a.kind == "quantize" else 1) for a in alive]
    cells = {cell: i for i, cell in enumerate((n, g) for n in range(bank.layers) for g in bank.groups)}
    rows, columns = zip(*((cells[c], j) for j, a in enumerate(alive) for c in a.cells(bank.groups)), strict=True)
    cover = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(cells), len(alive)))
    drops = np.array([a.kind == "drop" for a in alive], dtype=float)
    scale = max(1.0, float(np.max(sizes)))  # HiGHS' tolerances are absolute
    with _silent_solver():
        found = milp(
            np.array(costs),
            integrality=np.ones(len(alive)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(cover, 1, 1),
                LinearConstraint(sizes[None] / scale, -np.inf, limit / scale),
                LinearConstraint(drops[None], 0, 1),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if found.status == 2 or found.x is None:
        return None
    taken = tuple(a for a, x in zip(alive, found.x, strict=True) if x > 0.5)
    solution = _solution(bank, taken, float(found.fun))
    if float(sum(s for s, x in zip(sizes, found.x, strict=True) if x > 0.5)) > limit * (1 + 1e-9):
        raise IntegrityError(f"the solver returned a plan over the budget of {budget:g} {measure}")
    return solution


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


def _scale(bank: Bank, a: Alternative) -> float:
    return 1.0 if a.gone else bank.scale(a.label)


def _sizes(bank: Bank, alive: list[Alternative], measure: Measure, budget: float) -> tuple[np.ndarray, float]:
    """Size of every alternative and the limit on their sum, in units of the measure."""
    if measure == "parameters":
        return np.array([float(a.parameters) for a in alive]), budget - bank.fixed_parameters
    sizes = np.array([float(a.bytes) for a in alive])
    if measure == "bytes":
        return sizes, budget - bank.fixed_bytes
    dense = [a for a in bank.alternatives if a.kind == "quantize" and a.choice is None]
    norms = sum(a.bytes for a in dense) - bank.projections * dense_itemsize(bank)
    return sizes, budget * bank.projections / 8 + norms


def dense_itemsize(bank: Bank) -> int:
    """Bytes a weight of the base model's projections."""
    dense = sum(a.bytes for a in bank.alternatives if a.kind == "quantize" and a.choice is None)
    return round(dense / bank.projections)


def _solution(bank: Bank, taken: tuple[Alternative, ...], cost: float) -> Solution:
    taken = tuple(sorted(taken, key=lambda a: (a.layer, bank.groups.index(a.group) if a.group else -1)))
    dense = {(a.layer, a.group): a for a in bank.alternatives if a.kind == "quantize" and a.choice is None}
    norms = sum(a.bytes for a in dense.values()) - bank.projections * dense_itemsize(bank)
    total = bank.fixed_bytes + sum(a.bytes for a in taken)
    parameters = bank.fixed_parameters + sum(a.parameters for a in taken)
    removed = sum(len(a.gone) for a in taken)
    left = norms * (bank.layers - removed) / bank.layers
    weights = bank.projections * (bank.layers - removed) / bank.layers
    bits = 8 * (total - bank.fixed_bytes - left) / max(1.0, weights)
    whole = bank.fixed_bytes + sum(a.bytes for a in dense.values())
    return Solution(taken, cost, total, parameters, bits, whole, removed)


def _too_small(bank: Bank, alive: list[Alternative], measure: Measure, budget: float) -> str:
    """What the least budget is, by the same program with the cost replaced by the size."""
    sizes, _ = _sizes(bank, alive, measure, budget)
    least: dict[tuple[int, str], float] = {}
    for a, size in zip(alive, sizes, strict=True):
        if not a.gone:
            for cell in a.cells(bank.groups):
                share = size / len(a.cells(bank.groups))
                least[cell] = min(least.get(cell, np.inf), float(share))
    floor = sum(least.values())
    if measure == "bits":
        norms = sum(a.bytes for a in alive if a.choice is None) - bank.projections * dense_itemsize(bank)
        return f"{budget:g} bits: the least that these schemes allow is {8 * (floor - norms) / bank.projections:.4g}"
    fixed = bank.fixed_bytes if measure == "bytes" else bank.fixed_parameters
    most = bank.most_removed
    at_least = fixed + floor * (bank.layers - most) / bank.layers
    return (
        f"{budget:,.0f} {measure}: no plan is that small. Embeddings, head and final norm take {fixed:,}, and with "
        f"{most} of {bank.layers} layers removed and the smallest schemes about {at_least:,.0f} is the least"
    )
