"""What only a GPU runs: streams and pinned copies, fused modules, kernels on another device, leases of processes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_calibration import random_blocks
from test_gptq import problem as rounding_problem
from test_sweep import problem as pruning_problem

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan
from compression_dags.depth.plan import MergePlan, PlannedLayer
from compression_dags.errors import InputError
from compression_dags.passes.host_copies import HostCopies
from compression_dags.recovery.distillation.options import DistillMP
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.memory import peak_memory
from compression_dags.solvers.factor import inverse_factor
from compression_dags.solvers.grids import Grid
from compression_dags.solvers.patterns import Pattern
from compression_dags.solvers.round_sweep import round_sweep
from compression_dags.solvers.sweep import Rows, prune_sweep
from models import FAMILIES

pytestmark = pytest.mark.gpu
SECOND = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


# -- the streamed pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_is_the_cpus(tiny_model, family, resident):
    """Layers prefetched through pinned memory on a stream of their own; norms and rotary embedding by kernels."""
    checkpoint, blocks = Checkpoint(tiny_model(family)), random_blocks(rows=5, length=40, lengths=[40, 7, 33, 40, 12])
    near = profile_activations(DecoderStream(checkpoint, resident=resident), blocks)
    far = profile_activations(DecoderStream(checkpoint, device="cuda", resident=resident, batch_size=2), blocks)
    torch.testing.assert_close(far.hidden, near.hidden, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(far.block_influence, near.block_influence, rtol=1e-3, atol=1e-5)
    assert far.norms.keys() == near.norms.keys()
    for name, norm in near.norms.items():
        torch.testing.assert_close(far.norms[name], norm, rtol=1e-3, atol=1e-5)


def test_copies_to_the_host_land_whole_and_in_order():
    copies, landed = HostCopies(), []
    made = []
    for index in range(20):
        a = torch.randn(600, 600, device="cuda")
        for _ in range(5):
            a = a @ a / a.norm()  # still under way when the copy is asked for
        made.append(a)
        copies.take([a.T, a[::2]], lambda near, index=index: landed.append((index, *near)))
    copies.settle()
    assert [index for index, *_ in landed] == list(range(20))
    for (_, across, some), a in zip(landed, made, strict=True):
        assert across.is_contiguous() and across.device.type == "cpu"
        assert torch.equal(across, a.T.cpu()) and torch.equal(some, a[::2].cpu())

    def fail(near: list[torch.Tensor]) -> None:
        raise ZeroDivisionError

    copies.take([made[0]], fail)
    with pytest.raises(ZeroDivisionError):
        copies.close()


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=SECOND)])
def test_sweeps_on_a_leased_device_are_the_cpus(device, tmp_path):
    """Also on a device that is not the first: kernels are launched on the current one."""
    weight, hessian, _ = pruning_problem(rows=200, d=384, tokens=4000, dtype=torch.float32)
    parts = [Rows(0, 120, Pattern.n_of_m(2, 4)), Rows(120, 200, Pattern.n_of_m(2, 4))]
    near = prune_sweep(weight, inverse_factor(hessian), parts)
    values, second_moment, _ = rounding_problem(rows=200, d=384)
    values, second_moment = values.float(), second_moment.float()
    grid, rows = Grid("int", 4, 64), [(0, 120), (120, 200)]
    rounded = round_sweep(values, inverse_factor(second_moment), grid, rows, stored=torch.float32)
    with Accelerator(home=str(tmp_path), device=device).lease() as leased:
        far = prune_sweep(weight.to(leased.name), inverse_factor(hessian.to(leased.name)), parts)
        factor = inverse_factor(second_moment.to(leased.name))
        on_gpu = round_sweep(values.to(leased.name), factor, grid, rows, stored=torch.float32)
    assert str(far.weight.device) == device and (far.mask.cpu() == near.mask).float().mean() > 0.99
    assert float(far.error.sum()) == pytest.approx(float(near.error.sum()), rel=1e-2)
    same = torch.cat([a.codes.cpu() == b.codes for a, b in zip(on_gpu.parts, rounded.parts, strict=True)])
    assert same.float().mean() > 0.98
    assert float(on_gpu.error.sum()) == pytest.approx(float(rounded.error.sum()), rel=2e-2)


# -- processes ---------------------------------------------------------------------------------------------------------

HOLD = """
import logging, signal, sys, torch
from compression_dags.resources.accelerator import Accelerator
logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("compression_dags").setLevel("INFO")
with Accelerator(home=sys.argv[1], device="cuda:0").lease() as device:
    block = torch.ones(2**20, device=device.name)
    print("leased", float(block.sum()), flush=True)
    signal.pause()
"""


def started(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-c", HOLD, str(home)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_a_fresh_process_waits_for_the_device_and_gets_it_when_its_holder_dies(tmp_path):
    first = started(tmp_path)
    try:
        assert said(first) == f"leased {2.0**20}"
        second = started(tmp_path)
        try:
            lock = tmp_path / "locks" / "cuda-0.lock"
            assert said(second) == f"waiting for a device: cuda:0 is held by process {first.pid} ({lock})"
            first.send_signal(signal.SIGKILL)
            assert said(second) == f"leased {2.0**20}" and lock.read_text() == str(second.pid)
            third = started(tmp_path)
            assert said(third).startswith("waiting for a device")
            third.send_signal(signal.SIGINT)
            assert third.wait(60) != 0
        finally:
            second.kill()
            second.wait()
    finally:
        first.kill()
        first.wait()


def test_a_lease_measures_its_own_peak_and_returns_its_memory(tmp_path):
    leasing = Accelerator(home=str(tmp_path), device="cuda:0")
    with peak_memory() as large, pytest.raises(ZeroDivisionError), leasing.lease() as device:
        block = torch.empty(2**28, device=device.name)
        del block
        raise ZeroDivisionError
    assert torch.cuda.memory_reserved(0) < 2**28
    with peak_memory() as small, leasing.lease() as device:
        torch.empty(2**20, device=device.name)
    assert large.device_mb >= 1024 > small.device_mb + 500 and small.device_mb >= 4
    with leasing.lease() as device:  # as several evaluations share one
        with peak_memory() as first:
            torch.empty(2**28, device=device.name)
        with peak_memory() as second:
            torch.empty(2**20, device=device.name)
    assert first.device_mb >= 1024 > second.device_mb + 500 and second.device_mb >= 4


def test_distillation_in_child_processes(stories, tmp_path):
    """Children begin without CUDA; two of them train what one process trains."""
    source = Checkpoint(stories)
    plan = MergePlan("t", 5, (PlannedLayer((0, 1), (0.5, 0.5)), PlannedLayer((2, 3), (0.5, 0.5)), PlannedLayer((4,))))
    merged = apply_plan(source, plan, tmp_path / "merged")
    options = {"tokens": 2048, "length": 64, "batch_tokens": 256, "held_windows": 4, "checks": 2, "logit_share": 0.0}
    for workers in (1, 2):
        method = DistillMP.model_validate(options | {"method": "distill-mp", "workers": workers})
        method.recover(source, merged, plan, random_blocks(1, 8), tmp_path / f"{workers}", device="cuda:0")
    one, two = (Checkpoint(tmp_path / name) for name in ("1", "2"))
    assert any(not torch.equal(one.tensor(name), merged.tensor(name)) for name in one.tensors)
    for name in one.tensors:
        torch.testing.assert_close(one.tensor(name), two.tensor(name), rtol=2e-2, atol=2e-3)


def test_an_unknown_index_names_how_many_devices_there_are(tmp_path):
    count = torch.cuda.device_count()
    with pytest.raises(InputError, match=f"'cuda:{count}' asked for, but torch sees {count}"):
        Accelerator(home=str(tmp_path), device=f"cuda:{count}").check()
