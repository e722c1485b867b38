"""What a measured candidate table hangs on: all of its options, and the versions of all that it runs."""

from __future__ import annotations

from typing import Any

from compression_dags.planning.options import (
    AUTO,
    PLANNED,
    CandidateOptions,
    quantizer_stage,
    recovery_of,
    table_options,
)
from compression_dags.quantization.gptq import GPTQ
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.sparsity.pruners.wanda import Wanda
from compression_dags.stage import Stage

#: Code version of a measured table of candidates, and of the plan of mixed bits that is solved from one.
VERSION = "5"
MIXED_VERSION = "4"


def table_versions(options: CandidateOptions) -> dict[str, str]:
    """Method → version, of every method that measures a candidate table with these options; the table's own first."""
    found = {"alternatives": VERSION}
    for stage in _stages(options).values():
        found |= versions_of(stage)
    return found


def bank_identity(options: CandidateOptions) -> dict[str, Any]:
    """What a table's fingerprint holds beside the digests of its inputs: JSON values.

    A changed default of the quantizer, of the recovery, or of what measures single groups changes it.
    """
    stages = {role: _written_out(stage) for role, stage in _stages(options).items()}
    return {"bank": options.model_dump(mode="json"), "stages": stages, "versions": table_versions(options)}


def mixed_identity(stage: QuantizeStage) -> dict[str, Any]:
    """The same of a plan of mixed bits: its table's, and what is solved from it."""
    asked = {"bits": stage.bits, "ignore": list(stage.ignore)}
    found = bank_identity(table_options(stage))
    return {**asked, **found, "versions": {"quantization_plan": MIXED_VERSION, **found["versions"]}}


def versions_of(stage: Stage) -> dict[str, str]:
    """Method → version, of every method that a stage runs."""
    return getattr(stage, "versions", None) or {f"{stage.stage}: {stage.method}": stage.version}


def _stages(options: CandidateOptions) -> dict[str, Stage]:
    """Every stage that a candidate table runs, by what it is for."""
    choice = options.choices()[0]
    found: dict[str, Stage] = {"together": quantizer_stage(options.quantizer, choice)}
    if options.rounding == "gptq":
        found["single groups"] = GPTQ.model_validate({"scheme": choice.scheme, "target": "own"})
    if options.depth and options.recover is not None:
        found["removals"] = recovery_of(AUTO if options.recover == "auto" else options.recover)
    if options.sparsities:
        found["zeros"] = Wanda.model_validate({"sparsity": options.sparsities[0]})
    return found


def _written_out(stage: Stage) -> dict[str, Any]:
    """All options but those that the plan chooses."""
    return {name: value for name, value in stage.options().items() if name not in PLANNED | {"sparsity"}}
