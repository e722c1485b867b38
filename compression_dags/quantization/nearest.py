"""Matrices that read one input, scaled and rounded to nearest."""

from __future__ import annotations

from torch import Tensor

from compression_dags.quantization.formats import Choice
from compression_dags.quantization.rounding_pass import RoundedGroup, as_bytes
from compression_dags.solvers.rounding import Rounded, find_scales, round_codes


def nearest_group(
    weights: dict[str, Tensor],
    choice: Choice,
    columns: Tensor | None,
    shares: dict[str, Tensor] | None = None,
) -> RoundedGroup:
    """W diag(s) of matrices (out_i, in) rounded to nearest, with the ranges of their groups times `shares`."""

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
