"""`quantization_plan` of a recipe that asks for an average of bits, and `alternatives`, the planner's candidates."""

from __future__ import annotations

from compression_dags.calibration.corpora import Calibration
from compression_dags.calibration.steps import calibration_steps
from compression_dags.planning.identity import MIXED_VERSION, VERSION, bank_identity, mixed_identity
from compression_dags.planning.options import CandidateOptions
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.step import BASE, WEIGHTS, Step

ALTERNATIVES = "alternatives"


def quantization_plan(stage: QuantizeStage) -> Step:
    """The step that chooses a scheme for every group of projections."""
    return Step(
        "quantization_plan",
        MIXED_VERSION,
        mixed_identity(stage),
        (WEIGHTS, "calibration_tokens"),
        "compression_dags.planning.workers:choose_schemes",
        stage,
    )


def planning_steps(calibration: Calibration, options: CandidateOptions) -> tuple[Step, ...]:
    """What `plan` makes of a base model, in order: the calibration data that is read, and `alternatives`."""
    last = alternatives(options)
    return (*(step for step in calibration_steps(calibration) if step.name in last.reads), last)


def alternatives(options: CandidateOptions) -> Step:
    """The step that measures what every layer could become."""
    activations = ("calibration_activations",) if options.sparsities else ()
    return Step(
        ALTERNATIVES,
        VERSION,
        bank_identity(options),
        (BASE, "calibration_tokens", *activations),
        "compression_dags.planning.workers:measure_candidates",
        options,
    )
