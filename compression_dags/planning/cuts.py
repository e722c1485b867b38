"""What removing layers together costs, before and after recovery.

Single removals do not add up, and a recovery stage gives much of the loss back; both are measured for the 1, 2, …
cheapest layers, and between the measured counts interpolated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression_dags.calibration.scored_rows import chosen_rows, even_rows
from compression_dags.errors import InputError
from compression_dags.merging.apply import apply_plan
from compression_dags.merging.plan import MergePlan, keep_only
from compression_dags.merging.scoring import Piece
from compression_dags.planning.alternatives import recovery_of
from compression_dags.stages import Track, silent

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.merging.recovery import RecoverStage
    from compression_dags.planning.alternatives import BankOptions

#: The recovery of `recover: auto`: of both writers of the stream, at every layer behind the first gap.
AUTO = {"method": "least-squares", "projections": "attention+mlp", "scope": "sweep"}
#: Counts of removed layers that are measured; those beyond 8 in steps of 2.
COUNTS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Recovery:
    """A recovery stage, and the calibration tokens that it fits on."""

    options: dict[str, Any]
    stage: RecoverStage
    blocks: TokenBlocks


def recovery_for(source: Checkpoint, options: BankOptions, blocks: TokenBlocks) -> Recovery | None:
    """What `options.recover` asks for, on as few calibration sequences as the stage accepts.

    Raises:
        InputError: a stage that was asked for does not fit the model, or has too few tokens.
    """
    if options.recover is None:
        return None
    asked = AUTO if options.recover == "auto" else options.recover
    stage = recovery_of(asked)
    try:
        stage.check(source.facts)
        return Recovery(asked, stage, _enough(stage, source, blocks, options.rows))
    except InputError:
        if options.recover == "auto":
            return None
        raise


def _enough(stage: RecoverStage, source: Checkpoint, blocks: TokenBlocks, least: int) -> TokenBlocks:
    """The smallest doubling of `least` sequences that the stage accepts, spread over the calibration set."""
    total = len(blocks.lengths)
    while least < total:
        chosen = chosen_rows(blocks, even_rows(blocks, least))
        try:
            stage.check_tokens(source.facts, least, int(chosen.tokens // least))
            return chosen
        except InputError:
            least *= 2
    stage.check_tokens(source.facts, total, int(blocks.tokens // total))
    return blocks


def cut_costs(
    source: Checkpoint,
    order: Sequence[int],
    cost: Callable[[Iterable[Piece]], float],
    recovery: Recovery | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    track: Track = silent,
) -> tuple[float, ...]:
    """`cost` of the model without the first 1, 2, … layers of `order`, recovered or as it is: one for each count.

    Args:
        cost: of a student, given as pieces of the base model.

    Raises:
        InputError: the recovery changes more than layers.
    """
    every = range(1, len(order) + 1)
    plans = [
        keep_only("planned", source.num_layers, sorted(set(range(source.num_layers)) - {*order[:k]})) for k in every
    ]
    if recovery is None:
        return tuple(cost([Piece(slot) for slot in plan.slots]) for plan in plans)
    counts = [k for k in every if k in COUNTS or (k > COUNTS[-1] and k % 2 == 0) or k == len(order)]
    found = []
    for count in track(counts, "layers removed and recovered"):
        found.append(cost(_recovered(source, plans[count - 1], recovery, device, dtype)))
    return tuple(float(x) for x in np.interp(list(every), counts, found))


def _recovered(source: Checkpoint, plan: MergePlan, recovery: Recovery, device: str, dtype: str) -> list[Piece]:
    """The recovered student as pieces of the base model; its checkpoints live on disk while it is made."""
    with tempfile.TemporaryDirectory() as folder:
        student, recovered = apply_plan(source, plan, Path(folder) / "cut"), Path(folder) / "recovered"
        on: dict[str, Any] = {"device": device, "dtype": dtype}
        fitted = recovery.stage.recover(source, student, plan, recovery.blocks, recovered, **on).fitted
    changed: list[dict[str, Tensor]] = [{} for _ in plan.slots]
    for name, tensor in fitted.items():
        index, local = source.architecture.split_name(name)
        if index is None:
            raise InputError(
                f"recover: {recovery.stage.method} changes {name}; the bank measures changes of layers only"
            )
        changed[index][local] = tensor
    return [Piece(slot, tensors) for slot, tensors in zip(plan.slots, changed, strict=True)]
