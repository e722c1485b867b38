"""What budgets a model allows, from the shapes of its tensors alone: nothing is measured, torch is not imported.

The sizes are those of the candidates, so that a budget that passes here is one that the solver can meet. Where layers
differ in size the least is a lower bound: which layers may go together is decided by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression_dags.architectures.uniformity import refuse_unlike
from compression_dags.errors import InputError
from compression_dags.planning.candidates import Candidate, CandidateTable, Shapes, candidates, empty_table, removable
from compression_dags.planning.options import CandidateOptions, quantizer_stage, recovery_of, table_options

if TYPE_CHECKING:
    from compression_dags.architectures import ModelShape
    from compression_dags.calibration.corpora import Calibration
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.quantization.stage import QuantizeStage

Measure = Literal["bytes", "parameters", "bits"]


@dataclass(frozen=True)
class Limits:
    """Least and most of one measure.

    Attributes:
        least: what the smallest plan takes.
        most: what the model takes as it is; a budget lies below.
        fixed: of it, what no plan touches (embeddings, head, final norm).
        gone: layers that the smallest plan removes, of `layers`.
    """

    measure: Measure
    least: float
    most: float
    fixed: int
    gone: int
    layers: int

    def check(self, budget: float) -> None:
        """Refuse a budget that no plan meets, or that the model meets as it is.

        Raises:
            InputError: with the least and the most.
        """
        if budget < self.least or not budget < self.most:
            raise InputError(self.refusal(budget))

    def refusal(self, budget: float) -> str:
        """Why there is no plan of this size, with the least and the most."""
        bits = self.measure == "bits"
        asked = f"{budget:g} bits" if bits else f"{budget:,.0f} {self.measure}"
        least = f"{_up(self.least):.9g}" if bits else f"{self.least:,.0f}"
        most = f"{self.most:.4g}" if bits else f"{self.most:,.0f}"
        if self.least >= self.most:
            remedy = "allow depth, or give sparsities" if self.measure == "parameters" else "give smaller schemes"
            return f"{asked}: the model has {most}, and nothing that may be chosen takes any away; {remedy}"
        if budget >= self.most:
            return f"{asked}: the model has {most} as it is; a budget lies below that, and is {least} or more"
        if bits:
            return f"{asked}: the least that these schemes allow is {least}; the weights as they are take {most}"
        cut = f"{self.gone} of {self.layers} layers removed" if self.gone else "no layer removed"
        rest = "smallest schemes" if self.measure == "bytes" else "most zeros that may be chosen"
        known = f"{least} is the least" if budget < self.least else "the layers that may go together it takes more"
        return (
            f"{asked}: no plan is that small. Embeddings, head and final norm take {self.fixed:,}, and with {cut} and "
            f"the {rest} {known}; the model as it is has {most}"
        )


def _up(value: float) -> float:
    """Rounded up to four decimals, so that what is shown is allowed."""
    return math.ceil(value * 1e4 - 1e-6) / 1e4


def limits_of(source: Shapes, options: CandidateOptions) -> dict[Measure, Limits]:
    """Least and most of every measure, for the candidates that `options` ask for."""
    table = empty_table(source, candidates(source, options, merges=False))
    return {
        m: limits_in(table, table.alternatives, m, removable(options, table.layers))
        for m in ("bytes", "parameters", "bits")
    }


def limits_in(table: CandidateTable, alternatives: Iterable[Candidate], measure: Measure, gone: int) -> Limits:
    """The same for some candidates of a table, of which `gone` layers may go."""
    if measure == "bits":
        gone = 0
    staying = [a for a in alternatives if not a.gone and (a.kind == "quantize" or measure != "bits")]
    least, dense = _by_layer(staying, measure), _by_layer((a for a in table.alternatives if a.is_dense), measure)
    kept = sorted(least)[: table.layers - gone]
    total, whole = sum(kept), sum(dense)
    if measure == "bits":
        of = lambda size: 8 * (size - table.norm_bytes) / max(1, table.projections)  # noqa: E731
        return Limits(measure, of(total), of(whole), 0, 0, table.layers)
    fixed = table.fixed_bytes if measure == "bytes" else table.fixed_parameters
    return Limits(measure, fixed + total, fixed + whole, fixed, gone, table.layers)


def _by_layer(alternatives: Iterable[Candidate], measure: Measure) -> list[int]:
    """The least size of every layer: its groups' smallest together, or the smallest of the layer as a whole."""
    groups: dict[int, dict[str | None, int]] = {}
    for a in alternatives:
        own, size = groups.setdefault(a.layer, {}), a.parameters if measure == "parameters" else a.bytes
        own[a.group] = min(own.get(a.group, size), size)
    return [min(_ways(own)) for own in groups.values()]


def _ways(own: dict[str | None, int]) -> list[int]:
    """Sizes of one layer: as a whole (None), and group by group."""
    parts = [size for group, size in own.items() if group is not None]
    return ([own[None]] if None in own else []) + ([sum(parts)] if parts else [])


def check_plan(
    source: Checkpoint, options: CandidateOptions, calibration: Calibration, budgets: Iterable[tuple[Measure, float]]
) -> None:
    """Refuse what cannot be planned for a model, before anything is measured.

    Raises:
        InputError: a budget out of reach, a quantizer or a recovery stage that does not fit, too few tokens for it.
    """
    shape = source.stated_shape
    refuse_unlike(shape, "a plan of mixed schemes, zeros and layers", "name a scheme and the layers to drop yourself")
    for choice in options.choices():
        quantizer_stage(options.quantizer, choice).check(shape)
    if options.depth and isinstance(options.recover, dict):
        stage = recovery_of(options.recover)
        stage.check(shape)
        context = int(shape.config.get("max_position_embeddings") or calibration.length)
        measured = min(options.rows, calibration.sequences)
        unseen = calibration.sequences - measured
        fitting = unseen if unseen >= measured else calibration.sequences
        stage.check_tokens(shape, fitting, min(calibration.length, context))
    found = limits_of(Shapes.of(source), options)
    for measure, budget in budgets:
        found[measure].check(budget)


def check_bits(stage: QuantizeStage, shape: ModelShape) -> None:
    """Refuse an average of bits that no mixture of the stage's schemes has on this model.

    Facts without the shapes of tensors are let pass.

    Raises:
        InputError: with the least and the most.
    """
    if stage.bits is None or not shape.tensors:
        return
    refuse_unlike(shape, "quantize: bits", "give one scheme and overrides")
    found = limits_of(Shapes(shape.architecture, shape.tensors, shape.layers), table_options(stage))["bits"]
    try:
        found.check(stage.bits)
    except InputError as error:
        raise InputError(
            f"quantize: {stage.method}: {error}; candidates: {', '.join((stage.scheme, *stage.candidates))}"
        ) from None
