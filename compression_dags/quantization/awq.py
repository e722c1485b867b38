"""AWQ (Lin et al., MLSys 2024): channels that matter are scaled up before rounding; then ranges are clipped.

Both searches need only H = Σ x xᵀ of the inputs: the error of the outputs is ‖ΔW X‖² = tr(ΔW H ΔWᵀ), so no activation
is kept and no layer is run for a candidate. Candidates are scored on a group's own outputs (the paper runs the block).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compression_dags.provenance.wording import number
from compression_dags.quantization.schemes import QuantizeStage
from compression_dags.stage import StatisticKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compression_dags.passes.input_sums import InputSums
    from compression_dags.quantization.formats import Choice
    from compression_dags.quantization.rounding_pass import RoundedGroup
    from compression_dags.quantization.smoothing import Fold
    from compression_dags.solvers.rounding import Rounded


class AWQ(QuantizeStage):
    """Scale the inputs by s = rms(x)^α, with or without / mean|w|^(1 − α), α by grid search on the output error; clip
    every group's range likewise; round to nearest.

    s folds into the norm before, or into the rows of the projection before. α = 0 is RTN: the output error on the
    calibration tokens is never larger. Where rounding to nearest loses less than `least_error` nothing is searched:
    what is left to gain at 8 bits is below what calibration text tells of other text.
    """

    version: ClassVar[str] = "2"
    statistic: ClassVar[StatisticKind] = "hessian"
    method: Literal["awq"] = "awq"
    grid: int = Field(20, ge=1, le=200, description="values of α tried, from 0 to 1")
    duo: Literal["both", "on", "off"] = Field("both", description="divide s by mean|w|^(1 − α): with, without, both")
    clip: bool = Field(True, description="search a smaller range for every group of weights; never for query and key")
    least_clip: float = Field(0.5, gt=0, le=1, description="smallest share of a range that is tried")
    clip_grid: int = Field(11, ge=2, le=200, description="shares tried, from 1 down")
    least_error: float = Field(
        0.02, ge=0, le=1, description="‖(W − Ŵ)X‖ / ‖WX‖ of rounding to nearest below which a group is left at that"
    )

    def remark(self, evidence: Mapping[str, Any]) -> str:
        if "search" in evidence:
            return f"rounding to nearest loses less than {number(self.least_error)}, so nothing was searched"
        if "smoothed" in evidence:
            return "inputs stay unscaled, as nothing before takes the factors"
        scaled = f"α {number(evidence['alpha'])}{' with weights' if evidence['duo'] else ''}"
        return (
            f"{scaled} had the least output error"
            if evidence["alpha"]
            else "α 0 (no scaling) had the least output error"
        )

    def round_folded(
        self, weights: dict[str, Tensor], seen: InputSums, choice: Choice, label: str, fold: Fold | None
    ) -> RoundedGroup:
        import torch

        from compression_dags.solvers.hessian import energy

        assert seen.hessian is not None
        seen.hessian.require_finite(label)
        hessian, stack = seen.hessian.matrix, torch.cat([w.float() for w in weights.values()])
        stored = next(iter(weights.values())).dtype
        nearest = self._rounded(weights, hessian, choice, None, clip=False)
        if nearest[1] <= self.least_error**2 * float(energy(stack, hessian)):
            for _, evidence in nearest[0].found.values():
                evidence |= {"alpha": 0.0, "search": f"no: rounding to nearest loses less than {self.least_error:g}"}
            return nearest[0]
        columns, facts = self._search(stack, hessian, seen.tokens, choice, stored, fold)
        best = self._rounded(weights, hessian, choice, columns, self.clip)
        if columns is not None and self.clip:  # clipping may make up for what scaling brings
            plain = self._rounded(weights, hessian, choice, None, self.clip)
            if plain[1] < best[1]:
                best, facts = plain, {"alpha": 0.0, "duo": False}
        for _, evidence in best[0].found.values():
            evidence |= facts
        return best[0]

    def _rounded(
        self, weights: dict[str, Tensor], hessian: Tensor, choice: Choice, columns: Tensor | None, clip: bool
    ) -> tuple[RoundedGroup, float]:
        """The group with these factors, clipped or not, and its output error ‖ΔW X‖²."""
        import torch

        from compression_dags.solvers.hessian import energy

        moved = hessian if columns is None else hessian / torch.outer(columns, columns)
        shares: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if clip and not name.endswith(("q_proj", "k_proj")):
                scaled = weight.float() if columns is None else weight.float() * columns
                shares[name] = self._clipped(scaled, moved, choice, weight.dtype)
        group, total = nearest_group(weights, choice, columns, shares), 0.0
        for name, weight in weights.items():
            rounded, evidence = group.found[name]
            left = rounded.dequantize() if columns is None else rounded.dequantize() / columns
            whole, lost = energy(weight.float(), hessian), energy(left - weight.float(), hessian)
            evidence["output_error"] = float((lost / whole).clamp(min=0).sqrt()) if whole > 0 else 0.0
            if name in shares:
                evidence["mean_clip"] = float(shares[name].double().mean())
            total += float(lost)
        return group, total

    def _search(
        self, stack: Tensor, hessian: Tensor, tokens: int, choice: Choice, stored: Any, fold: Fold | None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The best s (in,) of the grid, or None for s = 1, and what the ledger says of it."""
        import torch

        from compression_dags.solvers.hessian import energy
        from compression_dags.solvers.rounding import Rounded, find_scales, round_codes

        if fold is None:
            return None, {"alpha": 0.0, "smoothed": "no: nothing before it takes the factors"}

        def lost(columns: Tensor | None) -> float:
            scaled = stack if columns is None else stack * columns
            scales = find_scales(scaled, choice.grid(), stored=stored)
            off = Rounded(round_codes(scaled, scales), scales).dequantize() - scaled
            return float(energy(off if columns is None else off / columns, hessian))

        rms = fold.even(hessian.diagonal().double() / max(1, tokens)).clamp(min=0).sqrt().float()
        mean = fold.even(stack.abs().mean(0))
        best, columns, facts = lost(None), None, {"alpha": 0.0, "duo": False}
        for duo in {"both": (False, True), "on": (True,), "off": (False,)}[self.duo]:
            for alpha in torch.linspace(0, 1, self.grid + 1)[0 if duo else 1 :].tolist():
                tried = rms.pow(alpha) / (mean.pow(1 - alpha) if duo else 1)
                tried = torch.where((rms > 0) & (mean > 0), tried, torch.ones_like(tried)).clamp(min=1e-4)
                tried = fold.exact(tried / (tried.max() * tried.min()).sqrt())
                error = lost(tried)
                if error < best:
                    best, columns, facts = error, tried, {"alpha": round(alpha, 6), "duo": duo}
        return columns, facts

    def _clipped(self, weight: Tensor, hessian: Tensor, choice: Choice, stored: Any) -> Tensor:
        """(rows, groups) float32 share of every group's range, by the error of its own inputs' outputs; 1 everywhere
        if that is better over all inputs together."""
        import torch

        from compression_dags.solvers.hessian import energy
        from compression_dags.solvers.rounding import Rounded, find_scales, round_codes

        def off(share: Tensor | float) -> Tensor:
            scales = find_scales(weight, choice.grid(), stored=stored, share=share)
            return Rounded(round_codes(weight, scales), scales).dequantize() - weight

        size = choice.group_size or weight.shape[1]
        blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])
        ones = torch.ones(len(weight), len(blocks), device=weight.device)
        best, shares = torch.full_like(ones, torch.inf), ones.clone()
        for share in torch.linspace(1, self.least_clip, self.clip_grid).tolist():
            parts = off(share).unflatten(1, (-1, size)).transpose(0, 1)  # (groups, rows, size)
            error = (torch.bmm(parts, blocks) * parts).sum(-1).T
            shares = torch.where(error < best, share, shares)
            best = torch.minimum(best, error)
        return shares if energy(off(shares), hessian) < energy(off(1.0), hessian) else ones


def nearest_group(
    weights: dict[str, Tensor],
    choice: Choice,
    columns: Tensor | None,
    shares: dict[str, Tensor] | None = None,
) -> RoundedGroup:
    """W diag(s) of matrices (out_i, in) rounded to nearest, with the ranges of their groups times `shares`."""
    from compression_dags.quantization.rounding_pass import RoundedGroup, as_bytes
    from compression_dags.solvers.rounding import Rounded, find_scales, round_codes

    def rounded(name: str, rows: Tensor | None = None) -> Rounded:
        weight = weights[name].float()
        weight = weight if columns is None else weight * columns
        weight = weight if rows is None else weight / rows[:, None]
        share = (shares or {}).get(name, 1.0)
        scales = find_scales(weight, choice.grid(), name, weights[name].dtype, share)
        return Rounded(as_bytes(round_codes(weight, scales), choice.format.kind), scales)

    def error(name: str, found: Rounded) -> float:
        return found.relative_error(weights[name].float() if columns is None else weights[name].float() * columns)

    made = {name: rounded(name) for name in weights}
    return RoundedGroup({n: (r, {"weight_error": error(n, r)}) for n, r in made.items()}, columns, rounded)
