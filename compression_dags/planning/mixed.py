"""Mixed bits: a scheme for every group of projections, so that the weights take a given number of bits on average.

Sensitivity is KL(base ‖ changed) on calibration text with one group of one layer rounded (by GPTQ; to nearest for
`rtn`); the allocation is the exact optimum of their sum (`planning/budget_solver.py`). Matrices of one input share a
scheme, as engines that fuse query, key and value, or gate and up, require.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compression_dags.errors import InputError
from compression_dags.planning.bounds import check_bits
from compression_dags.planning.budget_solver import solve
from compression_dags.planning.candidate_table import measure_bank
from compression_dags.planning.candidates import label_of
from compression_dags.planning.options import table_options
from compression_dags.planning.recipe_writer import chosen_schemes
from compression_dags.provenance.decisions import Decision
from compression_dags.provenance.wording import number
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.scheme_plan import SchemePlan
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.planning.candidates import Candidate
    from compression_dags.quantization.stage import QuantizeStage


def plan_schemes(
    stage: QuantizeStage,
    source: Checkpoint,
    blocks: TokenBlocks,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
) -> tuple[SchemePlan, list[Decision]]:
    """The schemes that `stage.bits` asks for, and a row for every group.

    Raises:
        InputError: fewer bits than the smallest candidate takes.
    """
    if stage.bits is None:
        raise InputError(f"quantize: {stage.method} asks for no average of bits")
    check_bits(stage, source.shape)
    table = measure_bank(source, blocks, table_options(stage), device=device, dtype=dtype, progress=progress)
    solution = solve(table, "bits", stage.bits)
    allowed, architecture = stage.choices(source.shape), source.architecture
    choices, rows = {}, []
    tried = {(a.layer, a.group): [] for a in table.alternatives}
    for a in table.alternatives:
        tried[a.layer, a.group].append(a)
    for (layer, group), choice in chosen_schemes(solution, table).items():
        names = [architecture.layer_prefix(layer) + p for p in architecture.group(group)]
        columns = {source.tensors[f"{name}.weight"].shape[1] for name in names}.pop()
        fitted = choice.fitted(columns) if choice is not None else None
        choices |= {name: fitted for name in names if fitted and name in allowed}
        costs = {a.label: a.cost for a in tried[layer, group]}
        value = next(a.cost for a in tried[layer, group] if a.choice == choice)
        action = "keep" if choice is None else "quantize"
        rows.append(
            Decision(
                "quantize",
                stage.method,
                len(rows),
                f"layer {layer} {group}",
                action,
                [layer],
                value,
                "KL with this alone (nats a token)",
                _reason(stage.bits, choice, columns, tried[layer, group]),
                {"scheme": fitted.scheme if fitted else None, "costs": costs},
            )
        )
    return SchemePlan(choices, solution.bits, solution.cost), rows


def _reason(bits: float, choice: Choice | None, columns: int, tried: list[Candidate]) -> str:
    """Why a group got its scheme: what it loses alone, and what the next smaller and the next larger scheme would."""
    own = next(a for a in tried if a.choice == choice)
    stored = choice and choice.fitted(columns)
    smaller = sorted((a for a in tried if a.bytes < own.bytes), key=lambda a: a.bytes)[-1:]
    larger = sorted((a for a in tried if a.bytes > own.bytes and a.choice), key=lambda a: a.bytes)[:1]
    beside = [f"{a.label} {number(a.cost)}" for a in (*smaller, *larger)]
    alone = ", ".join([f"alone it loses {number(own.cost)} nats", *beside])
    what = "kept as it is" if stored is None else f"quantized to {label_of(stored)}"
    if choice is not None and stored != choice:
        what += f" for {label_of(choice)}, as {choice.group_size} does not divide its {columns} inputs"
    return f"{what}: part of the least total loss at {number(bits)} bits a weight ({alone})"
