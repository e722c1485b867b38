"""One decoder layer for all batches at once, stopped before chosen modules: each projection runs once, pruned.

A batch's forward runs in a thread of its own that waits at every stop until all batches are there; then the weights
behind the stop may change, and the batches go on one after another. Only one thread runs at a time and always in batch
order, so the result does not depend on timing. This needs no map of any architecture's stages: whatever a frame of the
real forward holds at a stop is what stays in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from compression_dags.errors import IntegrityError


class _Cancelled(BaseException):
    """Ends a waiting thread after another one failed."""


class LockstepForward:
    """Runs `forward(i)` for i in range(count) in step.

    Args:
        forward: output of the layer for batch i; called in a thread under inference mode.
        stops: modules before which every batch waits, in the order the forward reaches them; each batch reaches one
            of a stop's modules.
        seen: called with (stop, batch, *args, **kwargs), the arguments being the module's, when a batch reaches a
            stop; in the batch's thread.
        ready: called with the stop when all batches wait there, in the caller's thread.
    """

    def __init__(
        self,
        count: int,
        forward: Callable[[int], Tensor],
        stops: Sequence[Sequence[nn.Module]],
        seen: Callable[..., None],
        ready: Callable[[int], None],
    ):
        self.count, self.forward, self.stops, self.seen, self.ready = count, forward, stops, seen, ready
        self._go = [threading.Semaphore(0) for _ in range(count)]
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.turn, self._cancelled = 0, False

    def run(self) -> list[Tensor]:
        """Outputs, by batch.

        Raises:
            IntegrityError: a batch ended or stopped elsewhere than the others.
        """
        hooks = [
            m.register_forward_pre_hook(self._hook(s), with_kwargs=True)
            for s, alike in enumerate(self.stops)
            for m in alike
        ]
        threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(self.count)]
        # cuDNN's attention plans are kept by thread: every thread here would build its own again (50 ms each).
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        for thread in threads:
            thread.start()
        try:
            for stop in range(len(self.stops)):
                for batch in range(self.count):
                    self._advance(batch, ("stop", stop))
                self.ready(stop)
            return [self._advance(batch, ("end", None)) for batch in range(self.count)]
        finally:
            self._cancelled = True
            for semaphore in self._go:
                semaphore.release()
            for thread in threads:
                thread.join()
            for hook in hooks:
                hook.remove()
            torch.backends.cuda.enable_cudnn_sdp(cudnn)

    def _advance(self, batch: int, expected: tuple[str, Any]) -> Any:
        """Let one batch run to its next stop, or to its end."""
        self.turn = batch
        self._go[batch].release()
        kind, value = self._events.get()
        if kind == "error":
            raise value
        if kind != expected[0] or (kind == "stop" and value != expected[1]):
            raise IntegrityError(f"batch {batch} reached {kind} {value} where {expected} was expected")
        return value

    def _work(self, batch: int) -> None:
        self._go[batch].acquire()
        if self._cancelled:
            return
        try:
            with torch.inference_mode():
                self._events.put(("end", self.forward(batch)))
        except _Cancelled:
            pass
        except BaseException as error:
            self._events.put(("error", error))

    def _hook(self, stop: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = self.turn
            self.seen(stop, batch, *args, **kwargs)
            self._events.put(("stop", stop))
            self._go[batch].acquire()
            if self._cancelled:
                raise _Cancelled

        return hook
