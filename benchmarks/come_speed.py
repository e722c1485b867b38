"""Speed and memory of CoMe's forms on a model of random weights (Llama-2-7B's shape), phase by phase.

    python benchmarks/come_speed.py --work FOLDER --refit --out come_speed.json          # one GPU
    python benchmarks/come_speed.py --work FOLDER --device cpu --tiny --refit             # seconds: does it run

Imports and writes the checkpoint first (not counted), then times the calibration pass with its loading of the weights,
each plan (`come` one-shot and progressive, `concat`), the writing of the merged checkpoint, and with --refit least
squares on `concat`. Layer-forwards are counted, not stated: tokens through `DecoderStream.apply` over calibration
tokens. The floor beside a phase is the FLOPs of those layer-forwards at --tflops sustained, causal attention included;
ridge solves and reading and writing files are not in it. Random weights choose other pairs than trained ones do, so the
progressive search may go on from other depths.

`reference` is the released way: the whole model anew for every merge. One whole pass is timed and multiplied by
--merges (`extrapolated`), or with --full as many passes are run. It uses this project's sums on the device and always
the model of full depth, so it is neither the released program's time nor exactly its work.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from random_llama import layer_flops, random_tokens, write_random

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.streaming import Batch, DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan
from compression_dags.depth.plan import MergePlan
from compression_dags.depth.stage import ProbeContext
from compression_dags.recovery.least_squares import LeastSquares
from compression_dags.registry import METHODS
from compression_dags.similarity.evidence import Evidence

#: What is asked of the default shape on one H100.
TARGETS = {"seconds": 60, "peak_gb": 24}
TINY = {"layers": 8, "hidden": 64, "inter": 96, "heads": 8, "kv": 4, "vocab": 512, "sequences": 32, "length": 64}
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "come one-shot": ("come", {"mode": "one-shot"}),
    "come progressive": ("come", {"mode": "progressive"}),
    "concat": ("concat", {}),
}


def stage(name: str, **options: Any) -> Any:
    return METHODS["merge"][name].model_validate(options)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Meter:
    """Seconds, peak memory and layer-forwards of named phases."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.tokens = args, 0
        self.rows: dict[str, dict[str, Any]] = {}
        self.cuda = args.device.startswith("cuda")

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the tokens that go through any layer."""
        original = DecoderStream.apply

        def apply(stream: DecoderStream, module: Any, index: int, batch: Batch, hidden: Any = None) -> Any:
            self.tokens += batch.ids.numel()
            return original(stream, module, index, batch, hidden)

        with patch.object(DecoderStream, "apply", apply):
            yield

    def phase(self, name: str, call: Callable[[], Any]) -> Any:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.tokens, start = 0, time.perf_counter()
        result = call()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        forwards = self.tokens / (self.args.sequences * self.args.length)
        self.rows[name] = {
            "seconds": round(seconds, 3),
            "floor_seconds": round(forwards * layer_flops(self.args) / (self.args.tflops * 1e12), 3),
            "layer_forwards": round(forwards, 3),
            "model_forwards": round(forwards / self.args.layers, 3),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.cuda else None,
        }
        print(json.dumps({name: self.rows[name]}), flush=True)
        return result


def calibrate(source: Checkpoint, blocks: TokenBlocks, args: argparse.Namespace) -> Evidence:
    """The shared calibration pass, weights loaded layer by layer."""
    resident = {"auto": None, "yes": True, "no": False}[args.resident]
    stream = DecoderStream(source, device=args.device, dtype=args.dtype, resident=resident)
    found = profile_activations(stream, blocks, samples=args.samples)
    stream.close()
    statistics = {f"norms.{k}": t.numpy() for k, t in found.norms.items()}
    return Evidence(
        found.block_influence.numpy(), found.angular.numpy(), found.angular_last.numpy(), statistics=statistics
    )


def one_form(
    name: str, source: Checkpoint, blocks: TokenBlocks, evidence: Evidence, meter: Meter, args: argparse.Namespace
) -> None:
    probe = ProbeContext(source, blocks, args.device, args.dtype)
    method, options = FORMS[name]
    chosen = stage(method, layers=args.merges, **options)
    plan, _ = meter.phase(f"{name}: plan", lambda: chosen.plan(source.shape, evidence, probe))
    assert len(plan.layers) == args.layers - args.merges
    written = args.work / "written"
    student = meter.phase(f"{name}: write", lambda: apply_plan(source, plan, written))
    if args.refit and name == "concat":
        actions = meter.phase(f"{name}: refit", lambda: refit(source, student, plan, blocks, args))
        meter.rows[f"{name}: refit"]["actions"] = actions
    shutil.rmtree(written)


def refit(
    source: Checkpoint, student: Checkpoint, plan: MergePlan, blocks: TokenBlocks, args: argparse.Namespace
) -> dict[str, int]:
    """Least squares at every merged layer, written out; how many fits were accepted and rejected."""
    method, directory = LeastSquares.model_validate({}), args.work / "recovered"
    found = method.recover(source, student, plan, blocks, directory, device=args.device, dtype=args.dtype)
    shutil.rmtree(directory)
    actions = [d.action for d in found.decisions]
    return {action: actions.count(action) for action in sorted(set(actions))}


def reference(source: Checkpoint, blocks: TokenBlocks, meter: Meter, args: argparse.Namespace) -> None:
    """The released way: a whole pass for one merge, as often as there are merges, or once and multiplied."""
    nothing = Evidence(np.empty(0), np.empty(0), np.empty(0))
    probe = ProbeContext(source, blocks, args.device, args.dtype)
    method, times = stage("come-released", layers=1), args.merges if args.full else 1

    def passes() -> None:
        for _ in range(times):
            method.plan(source.shape, nothing, probe)

    meter.phase("reference", passes)
    row = meter.rows["reference"]
    row |= {"passes": times, "extrapolated": times != args.merges}
    row["seconds_of_all_merges"] = round(row["seconds"] * args.merges / times, 3)


def totals(rows: dict[str, Any]) -> dict[str, Any]:
    """Each form with the calibration pass before it and the writing (and refit) after it."""
    found = {}
    for name in FORMS:
        parts = [row for phase, row in rows.items() if phase == "calibration" or phase.startswith(f"{name}: ")]
        peaks = [p["peak_gb"] for p in parts if p["peak_gb"] is not None]
        sums = {k: round(sum(p[k] for p in parts), 2) for k in ("seconds", "floor_seconds", "model_forwards")}
        found[name] = {**sums, "peak_gb": max(peaks) if peaks else None}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that does not exist yet, best in memory")
    parser.add_argument("--out", type=Path, default=None)
    for name, value in {"layers": 32, "hidden": 4096, "inter": 11008, "heads": 32, "kv": 32, "vocab": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"sequences": 128, "length": 2048, "merges": 10, "samples": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="of the hidden states; bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained, for the floors")
    parser.add_argument("--resident", choices=["auto", "yes", "no"], default="auto", help="layers in calibration")
    parser.add_argument("--refit", action="store_true", help="concat: least squares afterwards")
    parser.add_argument("--full", action="store_true", help="reference: a pass for every merge, nothing extrapolated")
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU does in seconds, 2 merges")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY, merges=2)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.hidden % args.heads or args.heads % args.kv:
        parser.error("--hidden must be a multiple of --heads, and --heads of --kv")
    if args.work.exists():
        parser.error(f"--work {args.work} exists; it is made anew, and removed at the end")
    return args


def main() -> None:
    args = parse()
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 (seconds, once a process)

    blocks, meter = random_tokens(args), Meter(args)
    args.work.mkdir(parents=True)
    try:
        start = time.perf_counter()
        source = write_random(args.work / "model", args)
        print(f"wrote {source.nbytes / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s (not counted)", flush=True)
        with meter.counting():
            evidence = meter.phase("calibration", lambda: calibrate(source, blocks, args))
            for name in FORMS:
                one_form(name, source, blocks, evidence, meter, args)
            reference(source, blocks, meter, args)
    finally:
        shutil.rmtree(args.work)
    name = torch.cuda.get_device_name(args.device) if meter.cuda else "cpu"
    machine = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {"machine": machine, "targets": TARGETS, "totals": totals(meter.rows), "phases": meter.rows}
    print(json.dumps(found["totals"], indent=1))
    if args.out:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.out.write_text(json.dumps({**found, "options": options}, indent=1))


if __name__ == "__main__":
    main()
