"""What a sparsity plan hangs on, beside the digests of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compression_dags.calibration.statistics import VERSION as PASS
from compression_dags.similarity.redundancy import VERSION as REDUNDANCY

if TYPE_CHECKING:
    from compression_dags.sparsity.stage import SparsifyStage


def plan_identity(stage: SparsifyStage, reads: Sequence[str], samples: int, seed: int) -> dict[str, Any]:
    """What a sparsity plan's fingerprint holds beside the digests of its inputs: JSON values.

    An allocation that prunes to compare candidates hangs on the pruner, its options and its version. Evidence from a
    pass of the plan's own hangs on that pass: the tokens that are sampled, and its version.

    Args:
        reads: `SparsifyStage.plan_reads`.
    """
    allocation = stage.allocation
    found: dict[str, Any] = dict(stage.plan_options())
    found["versions"] = {f"allocation: {allocation.method}": allocation.version}
    if allocation.measures:
        found["versions"] |= {f"sparsify: {stage.method}": stage.version}
    if "calibration_tokens" in reads and (allocation.needs or allocation.reads_statistics):
        found["evidence"] = {"samples": samples, "seed": seed}
        found["versions"] |= {"calibration_activations": PASS}
        found["versions"] |= {"similarity_redundancy": REDUNDANCY} if "redundancy" in allocation.needs else {}
    return found
