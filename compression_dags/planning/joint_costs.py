"""What many changes at once cost: schemes everywhere, by the recipe's own quantizer; layers cut out, and recovered.

Single costs do not add up, quantizers that follow the dense model make up for much of them, and a recovery stage gives
back much of what a cut loses. A plan is no better than these figures, so they are measured, not modelled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_dags.depth.apply import apply_plan
from compression_dags.depth.plan import keep_only
from compression_dags.errors import InputError
from compression_dags.passes.scored_rows import chosen_rows, even_rows
from compression_dags.passes.variant_scoring import Piece
from compression_dags.planning.candidates import recovery_of
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.planning.candidates import CandidateOptions
    from compression_dags.quantization.schemes import QuantizeStage
    from compression_dags.recovery.stage import RecoverStage

#: The recovery of `recover: auto`: of both writers of the stream, at every layer behind the first gap.
AUTO = {"method": "least-squares", "projections": "attention+mlp", "scope": "sweep"}
#: Numbers of layers that are cut out; beyond the last in steps of 2.
COUNTS = (1, 2, 3, 4, 6, 8)
#: Sequences that a quantizer is calibrated on, over those that are measured on.
MORE_ROWS = 4


@dataclass(frozen=True)
class FittedRecovery:
    """A recovery stage, and the calibration tokens that it fits on."""

    options: dict[str, Any]
    stage: RecoverStage
    blocks: TokenBlocks


def recovery_for(source: Checkpoint, options: CandidateOptions, blocks: TokenBlocks) -> FittedRecovery | None:
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
        return FittedRecovery(asked, stage, _enough(stage, source, blocks, options.rows))
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


def counts_of(most: int, recovered: bool) -> list[int]:
    """Numbers of layers to cut out: all, or few where each has to be recovered."""
    every = range(1, most + 1)
    return [k for k in every if not recovered or k in COUNTS or (k > COUNTS[-1] and k % 2 == 0) or k == most]


def cut_sets(
    layers: int, order: Sequence[int], counts: Sequence[int], block_cost: Callable[[int], Sequence[float]]
) -> list[tuple[int, ...]]:
    """Layers to cut out together: of each count the ones that alone cost least, and the block of neighbours that does.

    Args:
        order: layers, the one that alone costs least first.
        block_cost: number of layers → cost of the blocks that start at 0, 1, …
    """
    found = []
    for count in counts:
        costs = block_cost(count)
        first = min(range(layers - count + 1), key=lambda i: costs[i])
        found += [tuple(sorted(order[:count])), tuple(range(first, first + count))]
    return list(dict.fromkeys(found))


def cut_pieces(
    source: Checkpoint,
    gone: Sequence[int],
    recovery: FittedRecovery | None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[Piece]:
    """The model without some layers, recovered if asked for, as pieces of the base model.

    Its checkpoints live on disk while it is made.

    Raises:
        InputError: the recovery changes more than layers.
    """
    plan = keep_only("planned", source.num_layers, [i for i in range(source.num_layers) if i not in gone])
    if recovery is None:
        return [Piece(slot) for slot in plan.slots]
    with tempfile.TemporaryDirectory() as folder:
        student, recovered = apply_plan(source, plan, Path(folder) / "cut"), Path(folder) / "recovered"
        on: dict[str, Any] = {"device": device, "dtype": dtype}
        fitted = recovery.stage.recover(source, student, plan, recovery.blocks, recovered, **on).fitted
    changed = _by_layer(source, fitted, f"recover: {recovery.stage.method}")
    return [Piece(slot, changed.get(position, {})) for position, slot in enumerate(plan.slots)]


def quantized(
    source: Checkpoint,
    stage: QuantizeStage,
    options: CandidateOptions,
    blocks: TokenBlocks,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
) -> Callable[[], Iterator[Piece]]:
    """The model quantized as a recipe will, at one scheme or at a mixture: pieces of the base model, each made when it
    is wanted.
    """
    rows = chosen_rows(blocks, even_rows(blocks, MORE_ROWS * options.rows))
    on: dict[str, Any] = {"device": device, "dtype": dtype, "progress": progress}
    with tempfile.TemporaryDirectory() as folder:
        rounding = stage.quantize(source, Path(folder) / "quantized", blocks=rows, **on).rounding
    names = {f"{name}.weight": name for name in rounding.choices}
    changed = _by_layer(source, {**names, **rounding.changed}, f"quantize: {stage.method}")

    def pieces() -> Iterator[Piece]:
        for layer in range(source.num_layers):
            own = changed.get(layer, {})
            yield Piece(
                layer, {k: rounding.rounded(t).dequantize() if isinstance(t, str) else t for k, t in own.items()}
            )

    return pieces


def _by_layer(source: Checkpoint, tensors: Mapping[str, Any], stage: str) -> dict[int, dict[str, Any]]:
    """Layer → local name → what is given for the tensor."""
    found: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, local = source.architecture.split_name(name)
        if index is None:
            raise InputError(f"{stage} changes {name}; the bank measures changes of layers only")
        found.setdefault(index, {})[local] = tensor
    return found
