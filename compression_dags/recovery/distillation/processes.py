"""Groups of a distillation shared among processes, one GPU each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from compression_dags.recovery.distillation.run import DistillRun


def in_processes(
    run: DistillRun, groups: list[int], order: np.ndarray, child: Callable[..., dict[str, np.ndarray]]
) -> dict[str, Tensor]:
    """The trained tensors of groups dealt out to processes, each on the next GPU.

    Args:
        child: trains a share of the groups in a process of its own, from the checkpoints that it reads itself.
    """
    workers = min(run.options.workers, len(groups))
    shares = [groups[i::workers] for i in range(workers)]
    own = torch.device(run.device)
    gpus = torch.cuda.device_count() if own.type == "cuda" else 0
    devices = [f"cuda:{((own.index or 0) + i) % gpus}" if gpus else run.device for i in range(workers)]
    where = (str(run.teacher_checkpoint.path), str(run.student_checkpoint.path))
    found: dict[str, Tensor] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(child, run.options, run.plan, where, device, run.dtype, share, order)
            for share, device in zip(shares, devices, strict=True)
        ]
        for job in jobs:
            found |= {name: torch.from_numpy(array) for name, array in job.result().items()}
    return found
