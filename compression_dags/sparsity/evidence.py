"""What an allocator reads, for the weights as they are: statistics, redundancy, weights, and a loss for candidates."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.statistics import load_statistics
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.errors import InputError
from compression_dags.passes.scored_rows import chosen_rows, stream_loss
from compression_dags.similarity.redundancy import read_redundancy
from compression_dags.similarity.redundancy_tables import compute_redundancy
from compression_dags.sparsity.allocation import Allocation, SparsityEvidence, SparsityPlan
from compression_dags.stage import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.sparsity.stage import SparsifyStage


def stored_evidence(
    source: Checkpoint, activations: Path | None = None, redundancy: Path | None = None
) -> SparsityEvidence:
    """From the artifacts of the calibration pass, which describe `source` itself.

    Args:
        activations: directory of `calibration_activations`.
        redundancy: directory of `similarity_redundancy`.
    """
    return SparsityEvidence(
        source.architecture,
        load_statistics(activations) if activations else {},
        read_redundancy(redundancy) if redundancy else None,
    )


def fresh_evidence(
    source: Checkpoint,
    allocation: Allocation,
    blocks: TokenBlocks,
    *,
    samples: int = 2048,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
) -> SparsityEvidence:
    """By a calibration pass of its own: weights that an earlier stage changed have no stored one.

    Args:
        samples, seed: of the recipe's calibration: how many tokens' features are compared, and which.
    """
    if not (allocation.needs or allocation.reads_statistics):
        return SparsityEvidence(source.architecture)
    stream = DecoderStream(source, device=device, dtype=dtype)
    found = profile_activations(stream, blocks, samples=samples, seed=seed, progress=progress)
    stream.close()
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder))
        redundancy = compute_redundancy(Path(folder), device) if "redundancy" in allocation.needs else None
        return SparsityEvidence(source.architecture, load_statistics(Path(folder)), redundancy)


class PruneProbe:
    """Weights of one model, and the loss of its pruned forms on calibration sequences kept apart.

    A candidate is pruned by the recipe's own pruner with `fit_rows` sequences and scored on `held_rows` others.

    Args:
        stage: the recipe's pruner.
        blocks: the calibration set; not needed for weights alone.

    Raises:
        InputError: too few sequences to hold any out.
    """

    def __init__(
        self,
        stage: SparsifyStage,
        source: Checkpoint,
        blocks: TokenBlocks | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        fit_rows: int = 32,
        held_rows: int = 16,
    ):
        self.stage, self.source, self.device, self.dtype = stage, source, device, dtype
        self.blocks, self.fit_rows, self.held_rows = blocks, fit_rows, held_rows
        if blocks is not None and len(blocks.lengths) < 2:
            raise InputError("allocation: a calibration set of one sequence leaves none to score candidates on")

    def weights(self, name: str) -> Tensor:
        """Weight (rows, columns) of a matrix, on the device."""
        return self.source.tensor(f"{name}.weight").to(self.device)

    def held_out_loss(self, plan: SparsityPlan) -> float:
        """Mean next-token loss (nats) of the model pruned by `plan`; rows at the end of the calibration set."""
        if self.blocks is None:
            raise InputError("allocation: scoring a candidate needs calibration tokens")
        total = len(self.blocks.lengths)
        held = min(self.held_rows, max(1, total // 4))
        fit = chosen_rows(self.blocks, range(min(self.fit_rows, total - held)))
        with tempfile.TemporaryDirectory() as folder:
            pruned = self.stage.sparsify(
                self.source, plan, fit, Path(folder) / "candidate", device=self.device, dtype=self.dtype
            )
            stream = DecoderStream(pruned.checkpoint, device=self.device, dtype=self.dtype)
            loss = stream_loss(stream, chosen_rows(self.blocks, range(total - held, total)))
            stream.close()
        return loss
