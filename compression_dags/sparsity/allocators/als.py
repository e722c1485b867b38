"""ALS (Li et al., NeurIPS 2024, "Adaptive Layer Sparsity for LLMs via Activation Correlation Assessment").

    RM  →  ρ_i = Σ_{j≠i} RM_ij  →  ω_i = exp(−ρ_i / μ)  →  c_i = mean_{j≥i} ω_j
        →  max Σ c_i d_i  with  Σ p_i d_i = (1 − S) Σ p_i  and  1 − high ≤ d_i ≤ 1 − low

for densities d = 1 − sparsity and parameter counts p. There is no released code. Read as printed, q is the sparsity,
and then every q goes to its upper bound. The method it comes from (OMPQ) has the retained share there, so d is meant.

* ω is about e^−30, where solvers' absolute tolerances fail (SLSQP returns its start, HiGHS leaves budget unspent): all
  is kept in logarithms and the program, a fractional knapsack, is solved exactly (`knapsack.py`). Its solution has
  nearly every unit at a bound. `smooth` adds −λ ‖d − d̄‖², as the same group's DSA does, with c scaled to at most 1.
* `objective: printed` is Σ c d: units compete by c/p and small matrices win; `parameters` is Σ c p d.
* `mu`: `one` is the original ω; `row` (as printed) is the mean of row i of RM; `global` the mean of all.
* `level: module-joint` is one program over all matrices, `hierarchical` one over layers, then one within each layer.
* With `feature: in`, projections that share an input tie but for their place in the suffix mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from compression_dags.errors import InputError
from compression_dags.provenance.wording import number
from compression_dags.similarity.redundancy import rho
from compression_dags.sparsity.allocation import (
    UNSTRUCTURED,
    Allocated,
    AllocationProbe,
    GriddedAllocation,
    Matrix,
    SparsityEvidence,
    Unit,
    check_target,
    layer_units,
    need_probe,
    on_grid,
    per_matrix,
    sizes,
)
from compression_dags.sparsity.knapsack import fill_greedy, fill_smooth

Bounds = tuple[float, float]
#: Bounds that follow from a spread stay within these.
_WIDEST: Bounds = (0.0, 0.95)
_DECADES = 12
#: Names of the programs that are not within a layer.
_OUTER = {"all", "layers"}


@dataclass(frozen=True)
class Importance:
    """(n,) each; logarithms are natural."""

    matrix: np.ndarray
    rho: np.ndarray
    mu: np.ndarray
    log_omega: np.ndarray
    log_c: np.ndarray


class ALS(GriddedAllocation):
    """Adaptive layer sparsity: units that hold little of what others hold keep more, by an exact linear program."""

    needs: ClassVar[tuple[str, ...]] = ("redundancy",)

    method: Literal["als"] = "als"
    rm: Literal["paper", "cka", "cka-debiased"] = Field("cka-debiased", description="redundancy metric")
    feature: Literal["in", "out", "gate"] = Field("in", description="what is compared")
    feature_norm: bool = Field(True, description="scale every token's features to length 1")
    weight_norm: bool = Field(False, description="weigh every term of ρ by the norm of that module's weights")
    mu: Literal["one", "row", "global"] = Field("row", description="temperature of ω = exp(−ρ/μ)")
    weight: Literal["suffix", "own"] = Field("suffix", description="c_i: mean of ω over i and what follows, or own ω")
    level: Literal["layer", "module-joint", "hierarchical"] = "hierarchical"
    bounds: Bounds | None = Field(None, description="least and largest sparsity of a layer (or matrix, module-joint)")
    spread: float = Field(0.2, gt=0, lt=1, description="without bounds: the target ± this")
    inner_bounds: Bounds | None = Field(None, description="hierarchical: of a matrix within its layer")
    inner_spread: float = Field(0.1, gt=0, lt=1, description="without inner_bounds: the layer's sparsity ± this")
    granularity: float = Field(0.005, ge=1e-6, le=0.1, description="grid that sparsities are rounded to")
    objective: Literal["parameters", "printed"] = Field("parameters", description="Σ c p d, or Σ c d as printed")
    solver: Literal["greedy", "smooth"] = "greedy"
    anchor: float = Field(1.0, gt=0, description="smooth: λ, beside c scaled to at most 1")

    @property
    def reads_weights(self) -> bool:
        return self.weight_norm

    @model_validator(mode="after")
    def _sound(self) -> ALS:
        for name, bounds in (("bounds", self.bounds), ("inner_bounds", self.inner_bounds)):
            if bounds and not 0 <= bounds[0] <= bounds[1] < 1:
                raise ValueError(f"{name} {list(bounds)} must satisfy 0 ≤ low ≤ high < 1")
        if self.feature == "gate" and self.level != "layer":
            raise ValueError("feature gate exists once a layer: it needs level layer")
        return self

    def check(self, target: float) -> None:
        check_target(target)
        low, high = self.outer_bounds(target)
        if not low - 1e-12 <= target <= high + 1e-12:
            raise InputError(f"als: sparsity {target} is outside the bounds {low:g} to {high:g}: no plan can meet it")
        if self.level == "hierarchical" and self.inner_bounds:
            inner = self.inner_bounds
            if inner[0] > low + 1e-12 or inner[1] < high - 1e-12:
                raise InputError(
                    f"als: inner_bounds {list(inner)} must include the bounds of layers, {low:g} to {high:g}"
                )

    def outer_bounds(self, target: float) -> Bounds:
        """Least and largest sparsity of a layer, or of a matrix in the joint program."""
        return self.bounds or _around(target, self.spread)

    def allocate(
        self,
        matrices: Sequence[Matrix],
        target: float,
        evidence: SparsityEvidence,
        probe: AllocationProbe | None = None,
        pattern: str = UNSTRUCTURED,
    ) -> Allocated:
        self.check(target)
        problem = _Problem(self, evidence, probe)
        if self.level == "module-joint":
            units = module_units(matrices)
            shares = problem.solve("all", "module", units, target, self.outer_bounds(target))
        else:
            units = layer_units(matrices)
            shares = problem.solve("layers", "layer", units, target, self.outer_bounds(target))
        if self.level == "hierarchical":
            inner = [(module_units(u.matrices), float(s)) for u, s in zip(units, shares, strict=True)]
            found = [
                problem.solve(f"layer {of[0].layer}", "module", of, share, self._inner(share)) for of, share in inner
            ]
            units, shares = [u for of, _ in inner for u in of], np.concatenate(found)
        rows = [problem.rows[u.name] for u in units]
        if self.level == "hierarchical":
            rows = [{**row, "layer": problem.rows[f"layer {u.layer}"]} for u, row in zip(units, rows, strict=True)]
        sparsity = on_grid(units, shares, target, self.granularity)
        summary = {"programs": problem.programs, "granularity": self.granularity}
        return Allocated(sparsity, per_matrix(units, rows), summary, problem.notes())

    def why(self, matrix: Matrix, allocated: Allocated, target: float) -> str:
        row = allocated.evidence[matrix.name]
        sides = {"most": "its lower bound", "least": "its upper bound", "between": "between its bounds"}

        def said(unit: dict[str, Any]) -> str:
            low, high = map(number, unit["bounds"])
            return f"{sides[unit['density_at']]} ({low} to {high}) by log importance {number(unit['log_c'])}"

        if self.level == "layer":
            return f"its layer, of redundancy ρ {number(row['rho'])}, is at {said(row)}"
        own = f"it, of redundancy ρ {number(row['rho'])}, is at {said(row)}"
        if self.level == "module-joint":
            return own
        layer = row["layer"]
        return f"{own}, around its layer's {number(layer['share'])}, itself at {sides[layer['density_at']]}"

    def _inner(self, share: float) -> Bounds:
        return self.inner_bounds or _around(share, self.inner_spread)


def _around(target: float, spread: float) -> Bounds:
    """The target ± spread, no wider than `_WIDEST` unless the target itself is outside."""
    return min(target, max(_WIDEST[0], target - spread)), max(target, min(_WIDEST[1], target + spread))


def module_units(matrices: Sequence[Matrix]) -> list[Unit]:
    """One unit a matrix, in the order given; all experts of a layer are one, as they read one input."""
    grouped: dict[tuple[int, str], list[Matrix]] = {}
    for m in matrices:
        grouped.setdefault((m.layer, m.expert_block or m.local), []).append(m)
    return [
        Unit(f"{layer}.{local}", layer, tuple(of)) if len(of) > 1 else Unit(of[0].name, layer, tuple(of))
        for (layer, local), of in grouped.items()
    ]


class _Problem:
    """The programs of one allocation, and what they leave in the ledger."""

    def __init__(self, options: ALS, evidence: SparsityEvidence, probe: AllocationProbe | None):
        if evidence.redundancy is None:
            raise InputError("als needs the redundancy tables of the calibration pass; none were given")
        self.options, self.evidence, self.probe = options, evidence, probe
        self.redundancy = evidence.redundancy
        self.rows: dict[str, dict[str, Any]] = {}
        self.programs: dict[str, dict[str, Any]] = {}
        self._norms: dict[str, float] = {}

    def solve(self, name: str, level: str, units: Sequence[Unit], target: float, bounds: Bounds) -> np.ndarray:
        """(n,) sparsity of every unit, before rounding."""
        found = self._importance(level, units)
        low, high = 1 - bounds[1], 1 - bounds[0]
        density, price = self._fill(found.log_c, sizes(units), low, high, 1 - target)
        sides = ["most" if d >= high - 1e-9 else "least" if d <= low + 1e-9 else "between" for d in density]
        self.programs[name] = {
            "target": target,
            "bounds": list(bounds),
            "units": [u.name for u in units],
            "rm": np.round(found.matrix, 6).tolist(),
            "log_price": price if math.isfinite(price) else None,
            "forced_uniform": min(abs(target - b) for b in bounds) < 1e-9,
            "decades": float(found.log_c.max() - found.log_c.min()) / math.log(10),
            "at_least_sparsity": sides.count("most"),
            "at_most_sparsity": sides.count("least"),
        }
        for i, unit in enumerate(units):
            self.rows[unit.name] = {
                "rho": float(found.rho[i]),
                "mu": float(found.mu[i]),
                "log_omega": float(found.log_omega[i]),
                "log_c": float(found.log_c[i]),
                "share": float(1 - density[i]),
                "bounds": list(bounds),
                "density_at": sides[i],
            }
        return 1 - density

    def _fill(
        self, log_c: np.ndarray, size: np.ndarray, low: float, high: float, density: float
    ) -> tuple[np.ndarray, float]:
        size = size / size.mean()
        least, most = np.full_like(size, low), np.full_like(size, high)
        weighted = self.options.objective == "parameters"
        budget = density * size.sum()
        if self.options.solver == "greedy":
            found = fill_greedy(log_c + np.log(size) if weighted else log_c, size, least, most, budget)
            return found.density, found.log_price
        value = np.exp(log_c - log_c.max()) * (size if weighted else 1.0)
        curvature = size if weighted else 1.0
        found = fill_smooth(
            value, size, least, most, budget, centre=density, strength=self.options.anchor, curvature=curvature
        )
        return found.density, found.log_price

    def notes(self) -> tuple[str, ...]:
        """What a reader must see of the programs: one sentence each, those within layers counted."""
        found = []
        inner = [p for name, p in self.programs.items() if name not in _OUTER]
        for name in _OUTER & self.programs.keys():
            outer = self.programs[name]
            if outer["forced_uniform"]:
                low, high = outer["bounds"]
                target = outer["target"]
                found.append(f"sparsity {target:g} equals a bound ({low:g} to {high:g}): allocation forced uniform")
            if outer["decades"] > _DECADES:
                found.append(f"c of {name} spans {outer['decades']:.0f} decades: only its order matters")
        if forced := sum(p["forced_uniform"] for p in inner):
            found.append(f"{forced} of {len(inner)} layers sit at a bound of their matrices: uniform within them")
        if wide := sum(p["decades"] > _DECADES for p in inner):
            found.append(f"c spans more than {_DECADES} decades within {wide} of {len(inner)} layers")
        return tuple(found)

    def _importance(self, level: str, units: Sequence[Unit]) -> Importance:
        options = self.options
        labels, table = self.redundancy.table(level, options.feature, options.rm, options.feature_norm)
        place = {label: i for i, label in enumerate(labels)}
        rows = [self._row(place, u, level) for u in units]
        matrix = table[np.ix_(rows, rows)]
        weights = self._weights(units) if options.weight_norm else None
        held = rho(matrix, weights)
        mean = (held + (np.ones(len(units)) if weights is None else weights)) / len(units)
        mu = {"one": np.ones_like(mean), "row": mean, "global": np.full_like(mean, mean.mean())}[options.mu]
        log_omega = -held / mu
        return Importance(
            matrix, held, mu, log_omega, suffix_mean(log_omega) if options.weight == "suffix" else log_omega
        )

    def _row(self, place: dict[str, int], unit: Unit, level: str) -> int:
        matrix = unit.matrices[0]
        if level == "layer":
            label = str(unit.layer)
        else:
            own = matrix.local if self.options.feature == "out" else self._input_of(unit)
            label = f"{unit.layer}.{own}"
        if label not in place:
            raise InputError(
                f"als: the calibration pass recorded no features ({self.options.feature}) of {unit.name}; "
                "use feature in, or level layer"
            )
        return place[label]

    def _input_of(self, unit: Unit) -> str | None:
        return next((g for g in map(self.evidence.input_of, unit.matrices) if g), None)

    def _weights(self, units: Sequence[Unit]) -> np.ndarray:
        """(n,) Frobenius norm of every unit's weights over their mean."""
        probe = need_probe(self.probe, "als with weight_norm")
        for m in (m for u in units for m in u.matrices):
            if m.name not in self._norms:
                self._norms[m.name] = float(probe.weights(m.name).float().norm())
        norms = np.array([math.hypot(*(self._norms[m.name] for m in u.matrices)) for u in units])
        if not (np.isfinite(norms).all() and norms.mean() > 0):
            raise InputError("als: weight_norm needs weights that are finite and not all 0")
        return norms / norms.mean()


def suffix_mean(log_omega: np.ndarray) -> np.ndarray:
    """log of mean_{j≥i} ω_j, without leaving logarithms."""
    total = np.logaddexp.accumulate(log_omega[::-1])[::-1]
    return total - np.log(np.arange(len(log_omega), 0, -1))
