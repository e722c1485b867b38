"""The lease of a device: with a stand-in for CUDA that fails like the real one, and between two processes."""

import contextlib
import errno
import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
import torch

from compression_dags.errors import InputError
from compression_dags.resources import accelerator, memory
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.memory import peak_memory


class Cuda:
    """Stands in for `torch.cuda`: what reads or changes a device's state fails before `init`, as in a new process."""

    def __init__(self, devices: int = 1, peak: int = 0):
        self.devices, self.peak = devices, peak
        self.initialized, self.current = False, 0
        self.calls: list[str] = []

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.devices

    def init(self) -> None:
        self.initialized = True

    def is_initialized(self) -> bool:
        return self.initialized

    def _use(self, call: str) -> None:
        if not self.initialized:
            raise RuntimeError("Invalid device argument 0: did you call init?")
        self.calls.append(call)

    @contextlib.contextmanager
    def device(self, index: int):
        self._use("device")
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def reset_peak_memory_stats(self, index: int) -> None:
        self._use("reset")

    def max_memory_allocated(self, index: int) -> int:
        self._use("peak")
        return self.peak

    def empty_cache(self) -> None:
        self._use("empty")


@pytest.fixture
def cuda(monkeypatch):
    def put(**options) -> Cuda:
        found = Cuda(**options)
        monkeypatch.setattr(torch, "cuda", found)
        monkeypatch.setattr(accelerator, "_cuda_visible", lambda: True)
        return found

    return put


@contextlib.contextmanager
def another_process(folder: Path, index: int = 0):
    """Another process that leases a device; gives what kills it and its id. It is killed at the end."""
    read, write = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            with accelerator._first_free(folder, [index]):
                os.write(write, b"held")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(read, 4) == b"held"
    dead: list[int] = []

    def kill() -> None:
        if not dead:
            os.kill(holder, signal.SIGKILL)
            dead.append(os.waitpid(holder, 0)[0])

    try:
        yield kill, holder
    finally:
        kill()
        os.close(read)
        os.close(write)


def test_a_lease_initialises_cuda_before_it_uses_it(cuda, tmp_path):
    found = cuda(devices=2)
    with Accelerator(home=str(tmp_path), device="cuda:1").lease() as device:
        assert (device.name, device.dtype) == ("cuda:1", "bfloat16")
        assert found.current == 1  # kernels are launched on the current device
    assert found.calls == ["device", "reset", "peak", "empty"] and found.current == 0


def test_a_failure_gives_the_device_and_its_memory_back(cuda, tmp_path):
    found = cuda()
    leasing = Accelerator(home=str(tmp_path))
    with pytest.raises(ZeroDivisionError), leasing.lease():
        raise ZeroDivisionError
    assert found.calls[-1] == "empty" and found.current == 0
    with (tmp_path / "locks" / "cuda-0.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_unknown_device_is_refused_before_anything_runs(cuda, tmp_path):
    cuda(devices=2)
    for asked in ("cuda:2", "cuda:9"):
        for use in (Accelerator.check, lambda a: a.lease().__enter__()):
            with pytest.raises(InputError, match=f"device '{asked}' asked for, but torch sees 2: cuda:0 to cuda:1"):
                use(Accelerator(home=str(tmp_path), device=asked))
    for asked in ("3", "cuda:", "cuda:-1", "cuda:²", "gpu", "cuda:0 "):
        with pytest.raises(InputError, match="is unknown; allowed: auto, cpu, cuda, cuda:N"):
            Accelerator(home=str(tmp_path), device=asked).check()
    Accelerator(home=str(tmp_path), device="cuda:1").check()


def test_one_of_two_devices_is_free(cuda, tmp_path):
    cuda(devices=2)
    with another_process(tmp_path / "locks"), Accelerator(home=str(tmp_path)).lease() as device:
        assert device.name == "cuda:1"


def test_a_wait_says_for_what_and_ends_with_its_holder(cuda, tmp_path, monkeypatch):
    cuda()
    said: list[str] = []
    monkeypatch.setattr(accelerator.logger, "info", lambda text, *values: said.append(text % values))
    lock = tmp_path / "locks" / "cuda-0.lock"
    with another_process(lock.parent) as (kill, holder):
        waits = iter([lambda: None, kill])
        monkeypatch.setattr(accelerator, "time", SimpleNamespace(sleep=lambda _: next(waits)()))
        with Accelerator(home=str(tmp_path)).lease() as device:
            assert device.name == "cuda:0" and lock.read_text() == str(os.getpid())
    assert said == [f"waiting for a device: cuda:0 is held by process {holder} ({lock})"]


def test_a_wait_can_be_interrupted(cuda, tmp_path):
    """Also inside an asset: Dagster holds interrupts back, but not while a step's own code runs."""
    cuda()

    @dg.op
    def wants_a_device():
        with Accelerator(home=str(tmp_path)).lease():
            raise AssertionError("the device is held by another process")

    @dg.job
    def waiting():
        wants_a_device()

    with another_process(tmp_path / "locks"):
        threading.Thread(target=_interrupt_when_waiting, args=(tmp_path,), daemon=True).start()
        with pytest.raises((KeyboardInterrupt, dg.DagsterExecutionInterruptedError)):
            waiting.execute_in_process()


def _interrupt_when_waiting(home: Path) -> None:
    waiting = threading.main_thread()
    while "_first_free" not in _functions(waiting.ident):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def _functions(thread: int | None) -> set[str]:
    frame, names = sys._current_frames().get(thread or 0), set()
    while frame:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_a_lock_that_cannot_be_taken_is_no_wait(cuda, tmp_path, monkeypatch):
    cuda()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(accelerator.fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"cuda-0\.lock cannot be locked \(No locks available\); choose another"):
        Accelerator(home=str(tmp_path)).lease().__enter__()


# -- peak memory -------------------------------------------------------------------------------------------------------


def test_a_peak_is_of_its_own_piece_of_work(cuda, tmp_path):
    found = cuda(peak=300 * 2**20)
    with peak_memory() as large:
        block = bytearray(200 * 2**20)
        with peak_memory() as inner, Accelerator(home=str(tmp_path)).lease():
            pass
        del block
    found.peak = 100 * 2**20
    with peak_memory() as small, Accelerator(home=str(tmp_path)).lease():
        pass
    assert (large.device_mb, inner.device_mb, small.device_mb) == (300, 300, 100)
    assert large.host_mb >= inner.host_mb > 200
    found.peak = 900 * 2**20
    with Accelerator(home=str(tmp_path)).lease():  # outside of any measured work
        pass
    assert large.device_mb == 300


def test_pieces_of_work_within_one_lease_have_peaks_of_their_own(cuda, tmp_path):
    """As evaluations have: the model stays on the device from one task to the next."""
    found = cuda(peak=500 * 2**20)
    with Accelerator(home=str(tmp_path)).lease():
        with peak_memory() as first:
            found.peak = 700 * 2**20
        with peak_memory() as second:
            assert found.calls[-1] == "reset"
            found.peak = 200 * 2**20
    assert (first.device_mb, second.device_mb) == (700, 200)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps its high-water mark")
def test_a_later_peak_forgets_an_earlier_one():
    with peak_memory() as large:
        block = bytearray(300 * 2**20)
        block[:: 2**12] = b"x" * len(block[:: 2**12])
        del block
    with peak_memory() as small:
        pass
    assert small.host_mb < large.host_mb - 200


def test_a_process_that_cannot_forget_still_has_a_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "none")
    with peak_memory() as peak:
        pass
    assert peak.host_mb > 10
