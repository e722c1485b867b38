"""Copies of what a pass made, from the device to host memory, while the device goes on with the next matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class HostCopies:
    """Copies land one after another, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._carrier = ThreadPoolExecutor(1, thread_name_prefix="host-copies")
        self._leaving: list[Future[None]] = []

    def take(self, tensors: Sequence[Tensor], land: Callable[[list[Tensor]], None]) -> None:
        """Call `land` with the tensors in host memory: at once if they are there, else in another thread, later."""
        device = next((t.device for t in tensors if t.is_cuda), None)
        if device is None:
            land([t.contiguous() for t in tensors])
            return
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        self._leaving.append(self._carrier.submit(self._carry, device, done, tensors, land))

    @staticmethod
    def _carry(
        device: torch.device, done: torch.cuda.Event, tensors: Sequence[Tensor], land: Callable[[list[Tensor]], None]
    ) -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            done.wait()
            # through pinned memory, which the allocator keeps for the next: a pageable copy is ten times slower
            near = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            torch.cuda.current_stream().synchronize()
            land([t.clone(memory_format=torch.contiguous_format) for t in near])

    def settle(self) -> None:
        """Wait until everything has landed; what failed there is raised here."""
        for copy in self._leaving:
            copy.result()
        self._leaving.clear()

    def close(self) -> None:
        self.settle()
        self._carrier.shutdown()
