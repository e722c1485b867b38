"""Speed and memory of the pruners on a model of random weights (Llama-2-7B's shape), beside llm-compressor's.

    python benchmarks/sparsity_speed.py --work FOLDER --out speed.json            # one GPU, 4 layers, both tools
    python benchmarks/sparsity_speed.py --work FOLDER --layers 32 --ours          # the whole model, ours alone
    python benchmarks/sparsity_speed.py --work FOLDER --layers 3 --hidden 8192 --inter 28672 --heads 64 --kv 8 --ours
    python benchmarks/sparsity_speed.py --work FOLDER --als                       # seconds of ALS's allocation
    python benchmarks/sparsity_speed.py --work FOLDER --tiny                      # seconds on a CPU: does it run

The same random weights and tokens for both tools, in one process. FOLDER must not exist and is best in memory: ours
reads its layers from there, llm-compressor gets the model loaded. Timed is from weights in host memory to pruned
weights and packed masks in host memory; files are not written. Ours runs twice, the first with the compilation of its
kernels; both are shown, and the ratio is with the last. `floor` is the FLOPs of one forward and of the Hessians (four
inputs a layer) at --tflops.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from llmcompressor_sparsity import load, prune, tokenizer_for
from random_llama import layer_flops, random_tokens, write_random

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.statistics import load_statistics
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.registry import METHODS
from compression_dags.sparsity.allocation import SparsityEvidence
from compression_dags.sparsity.redundancy import compute_redundancy
from compression_dags.sparsity.results import Results
from compression_dags.sparsity.stage import SparsifyStage

TINY = {"layers": 2, "hidden": 64, "inter": 96, "heads": 8, "kv": 4, "vocab": 512, "sequences": 8, "length": 32}
ASKED = ("wanda-0.5", "sparsegpt-0.5", "sparsegpt-2:4", "magnitude-0.5")


def main() -> None:
    args = _arguments()
    rows: list[dict[str, Any]] = []

    def record(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}))

    try:
        source, blocks = write_random(args.work, args), random_tokens(args)
        if args.als:
            record(**als_seconds(source, blocks, args))
            return
        for asked in args.methods:
            ours = [run_ours(source, blocks, asked, args) for _ in range(args.repeats)]
            row = {"method": asked, "layers": args.layers, "first_seconds": ours[0]["seconds"], **ours[-1]}
            if not args.ours and not asked.startswith("magnitude"):
                theirs = run_theirs(args, blocks, asked)
                row |= {"llmcompressor": theirs, "ratio": round(theirs["seconds"] / row["seconds"], 1)}
            record(**row)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that does not exist yet, best in memory")
    parser.add_argument("--out", type=Path, default=None)
    for name, value in {"layers": 4, "hidden": 4096, "inter": 11008, "heads": 32, "kv": 32, "vocab": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"sequences": 128, "length": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="of the arithmetic; bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--tflops", type=float, default=600.0, help="sustained, for the floors")
    parser.add_argument("--methods", nargs="+", default=list(ASKED))
    parser.add_argument("--repeats", type=int, default=2, help="of ours; the last counts")
    parser.add_argument("--ours", action="store_true", help="leave llm-compressor out")
    parser.add_argument("--their-batch", type=int, default=1, help="sequences llm-compressor takes at a time")
    parser.add_argument("--als", action="store_true", help="time ALS's allocation instead")
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU does in seconds")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def stage_of(asked: str) -> SparsifyStage:
    method, target = asked.split("-")
    options = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    found = METHODS["sparsify"][method].model_validate({"method": method, **options})
    assert isinstance(found, SparsifyStage)
    return found


def settled(results: Results, directory: Path) -> Results:
    """In place of `Results.write`: everything is in host memory, nothing on disk."""
    results.settle()
    return results


def run_ours(source: Checkpoint, blocks: TokenBlocks, asked: str, args: argparse.Namespace) -> dict[str, Any]:
    stage = stage_of(asked)
    plan, _ = stage.plan(source, SparsityEvidence(source.architecture))
    _clear()
    start = time.perf_counter()
    with patch.object(Results, "write", settled):
        found: Any = stage.sparsify(source, plan, blocks, args.work, device=args.device, dtype=args.dtype)
    _wait()
    seconds = time.perf_counter() - start
    for decision in found.decisions:
        _check_count(decision.target, decision.evidence["zeros"], decision.evidence["parameters"], asked)
    return {"seconds": round(seconds, 3), "floor": round(floor(stage, args), 3), "peak_gb": _peak()}


def _check_count(name: str, zeros: int, numel: int, asked: str) -> None:
    target = 0.5 if ":" in asked else float(asked.split("-")[1])
    if abs(zeros / numel - target) > 1e-3:
        raise SystemExit(f"{name}: {zeros} zeros of {numel} are not {target:.0%}")


def floor(stage: SparsifyStage, args: argparse.Namespace) -> float:
    if not stage.reads_tokens:
        return 0.0
    flops = layer_flops(args)
    if stage.statistic == "hessian":
        flops += 2 * args.sequences * args.length * (3 * args.hidden**2 + args.inter**2)
    return args.layers * flops / (args.tflops * 1e12)


def run_theirs(args: argparse.Namespace, blocks: TokenBlocks, asked: str) -> dict[str, Any]:
    model = load(args.work, "bfloat16")
    _clear()
    seconds = prune(model, tokenizer_for(args.vocab), blocks.ids, asked, args.their_batch)
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n.endswith("proj.weight"))
    numel = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    return {"seconds": round(seconds, 2), "peak_gb": _peak(), "zeros": zeros / numel, "batch": args.their_batch}


def als_seconds(source: Checkpoint, blocks: TokenBlocks, args: argparse.Namespace) -> dict[str, Any]:
    """The calibration pass that all methods share, and what ALS adds to it."""
    stream = DecoderStream(source, device=args.device, dtype=args.dtype)
    start = time.perf_counter()
    found = profile_activations(stream, blocks)
    _wait()
    calibrated = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder))
        saved = time.perf_counter()
        redundancy = compute_redundancy(Path(folder), args.device)
        statistics = load_statistics(Path(folder))
    computed = time.perf_counter()
    allocation = METHODS["sparsify"]["wanda"].model_validate(
        {"method": "wanda", "sparsity": 0.5, "allocation": {"method": "als"}}
    )
    assert isinstance(allocation, SparsifyStage)
    allocation.plan(source, SparsityEvidence(source.architecture, statistics, redundancy))
    return {
        "step": "als",
        "calibration_seconds": round(calibrated - start, 2),
        "redundancy_seconds": round(computed - saved, 2),
        "allocation_seconds": round(time.perf_counter() - computed, 2),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
