"""Speed and memory of the pruners on a model of random weights (Llama-2-7B's shape), beside llm-compressor's.

    python benchmarks/sparsity_speed.py --work FOLDER --out speed.json            # one GPU, 4 layers, both tools
    python benchmarks/sparsity_speed.py --work FOLDER --their-batch 8             # llm-compressor batched too
    python benchmarks/sparsity_speed.py --work FOLDER --full                      # 32 layers, ours alone
    python benchmarks/sparsity_speed.py --work FOLDER --stack70b 3                # layers of a 70B's shape, ours alone
    python benchmarks/sparsity_speed.py --work FOLDER --als                       # seconds of ALS's allocation
    python benchmarks/sparsity_speed.py --work FOLDER --tiny                      # seconds on a CPU: does it run

The same random weights and tokens for both tools, in one process. FOLDER must not exist and is best in memory: ours
reads its layers from there, llm-compressor gets the model loaded (`load_seconds`, not in its `seconds`). `seconds` are
from weights in host memory to pruned weights in host memory, packed masks too in ours; `write_seconds` is the writing
of our checkpoint after that. Ours runs --repeats times and goes first, so that the start of CUDA and the compilation of
kernels are in `first_seconds` and not in llm-compressor's one run; imports are in neither, but in a row of their own.
`ratio` is its seconds over our last. `floor` is the FLOPs of one forward and of the Hessians (four inputs a layer) at
--tflops. `zeros` are the least and the largest share in a matrix; a mask of ours with another count than was asked for
ends the run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from llmcompressor_sparsity import load, modifier, prune, tokenizer_for
from random_llama import layer_flops, random_tokens, write_random

from compression_dags.calibration.activations import Activations, profile_activations
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.module_features import ModuleFeatures
from compression_dags.calibration.statistics import load_statistics
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.registry import METHODS
from compression_dags.sparsity.allocation import SparsityEvidence
from compression_dags.sparsity.redundancy import compute_redundancy
from compression_dags.sparsity.results import Results
from compression_dags.sparsity.stage import SparsifyStage

TINY = {"layers": 2, "hidden": 64, "inter": 96, "heads": 8, "kv": 4, "vocab": 512, "sequences": 8, "length": 32}
SHAPE_70B = {"hidden": 8192, "inter": 28672, "heads": 64, "kv": 8}
ASKED = ["wanda-0.5", "sparsegpt-0.5", "sparsegpt-2:4", "magnitude-0.5"]
TARGETS = {"wanda-0.5": 15, "sparsegpt-0.5": 20, "sparsegpt-2:4": 20}  # times llm-compressor, 4 layers on one H100
#: Stored weights may be 0 by chance: so many of a matrix's are let pass beside the mask's.
CHANCE = 1e-5
Rows = list[dict[str, Any]]


def main() -> None:
    args = _arguments()
    rows: Rows = []

    def record(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
            found = {"machine": _machine(), "targets": TARGETS, "arguments": options, "rows": rows}
            args.out.write_text(json.dumps(found, indent=1))

    args.work.mkdir(parents=True)
    try:
        record(step="imports", seconds=import_seconds())
        source, blocks = write_random(args.work / "model", args), random_tokens(args)
        if args.als:
            for run in range(args.repeats):
                record(step="als", run=run + 1, layers=args.layers, **als_seconds(source, blocks, args))
            return
        for asked in args.methods:
            record(**compare(source, blocks, asked, args))
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    print(table(rows))


def import_seconds() -> float:
    """Of what both tools need, once a process: in no other figure."""
    start = time.perf_counter()
    import accelerate  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    return round(time.perf_counter() - start, 2)


# -- what is asked -----------------------------------------------------------------------------------------------------


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
    parser.add_argument("--methods", nargs="+", default=None, help=f"of {' '.join(ASKED)}, or with other targets")
    parser.add_argument("--repeats", type=int, default=2, help="of ours; the last counts")
    parser.add_argument("--ours", action="store_true", help="leave llm-compressor out")
    parser.add_argument("--their-batch", type=int, default=1, help="llm-compressor also with batches of so many")
    parser.add_argument("--no-write", action="store_true", help="do not write our checkpoint (after the timing)")
    parser.add_argument("--als", action="store_true", help="time ALS's allocation instead")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--tiny", action="store_true", help="a shape that a CPU does in seconds")
    shape.add_argument("--full", action="store_true", help="32 layers, ours alone, wanda and sparsegpt")
    shape.add_argument("--stack70b", type=int, metavar="N", help="N layers of a 70B's shape, ours alone")
    args = parser.parse_args()
    if args.work.exists():
        parser.error(f"--work {args.work} exists; it is made anew, and removed at the end")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return _completed(args)


def _completed(args: argparse.Namespace) -> argparse.Namespace:
    """The shapes that have a name of their own, and what follows from them."""
    alone = args.full or bool(args.stack70b)
    if args.tiny:
        vars(args).update(TINY)
    elif args.full:
        args.layers = 32
    elif args.stack70b:
        vars(args).update(SHAPE_70B, layers=args.stack70b)
    args.methods = args.methods or (ASKED[:2] if alone else ASKED)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if not (args.ours or alone or args.als) and importlib.util.find_spec("llmcompressor") is None:
        print("llm-compressor is not installed: ours alone, no ratios", file=sys.stderr)
        args.ours = True
    args.ours = args.ours or alone
    return args


def stage_of(asked: str, **options: Any) -> SparsifyStage:
    """`wanda-0.5`, `sparsegpt-2:4` → the pipeline's stage."""
    method, target = asked.split("-")
    aim = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    found = METHODS["sparsify"][method].model_validate({"method": method, **aim, **options})
    assert isinstance(found, SparsifyStage)
    return found


def floor(stage: SparsifyStage, args: argparse.Namespace) -> float:
    if not stage.reads_tokens:
        return 0.0
    flops = layer_flops(args)
    if stage.statistic == "hessian":
        flops += 2 * args.sequences * args.length * (3 * args.hidden**2 + args.inter**2)
    return args.layers * flops / (args.tflops * 1e12)


# -- both tools --------------------------------------------------------------------------------------------------------


def compare(source: Checkpoint, blocks: TokenBlocks, asked: str, args: argparse.Namespace) -> dict[str, Any]:
    last = args.repeats - 1
    ours = [run_ours(source, blocks, asked, args, write=i == last and not args.no_write) for i in range(args.repeats)]
    row = {"method": asked, "layers": args.layers, "first_seconds": ours[0]["seconds"], **ours[-1]}
    if args.ours or asked.split("-")[0] not in {"wanda", "sparsegpt"}:
        return row
    batches = {"": 1} | ({"_batched": args.their_batch} if args.their_batch > 1 else {})
    for suffix, batch in batches.items():
        theirs = run_theirs(source, blocks, asked, batch, args)
        row[f"llmcompressor{suffix}"] = theirs
        if "seconds" in theirs:
            row[f"ratio{suffix}"] = round(theirs["seconds"] / row["seconds"], 1)
    return row


def run_ours(
    source: Checkpoint, blocks: TokenBlocks, asked: str, args: argparse.Namespace, *, write: bool
) -> dict[str, Any]:
    stage = stage_of(asked)
    plan, _ = stage.plan(source, SparsityEvidence(source.architecture))
    original, kept, times = Results.write, list[Results](), dict[str, float]()

    def measured(results: Results, directory: Path) -> Any:
        """In place of `Results.write`: everything is in host memory once it has settled."""
        results.settle()
        _wait()
        times["walked"] = time.perf_counter()
        kept.append(results)
        return original(results, directory) if write else None

    _clear()
    start = time.perf_counter()
    with patch.object(Results, "write", measured):
        stage.sparsify(source, plan, blocks, args.work / "written", device=args.device, dtype=args.dtype)
    end = time.perf_counter()
    shutil.rmtree(args.work / "written", ignore_errors=True)
    seconds = times["walked"] - start
    return {
        "seconds": round(seconds, 3),
        "seconds_per_layer": round(seconds / args.layers, 3),
        **({"write_seconds": round(end - times["walked"], 3)} if write else {}),
        "floor": round(floor(stage, args), 3),
        "peak_gb": _peak(),
        "zeros": checked_zeros(kept[0], stage),
    }


def checked_zeros(results: Results, stage: SparsifyStage) -> list[float]:
    """Least and largest share of zeros; every matrix's mask and weights are counted anew, in host memory."""
    shares = []
    for name, packed in results.packed.items():
        weight = results.tensors[f"{name}.weight"]
        wanted = expected_zeros(weight.shape, stage)
        masked = weight.numel() - int(np.bitwise_count(packed).sum(dtype=np.int64))
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        if masked != wanted or not 0 <= zeros - masked <= CHANCE * weight.numel():
            raise SystemExit(f"{name}: {wanted} zeros were asked for; mask {masked}, weights {zeros}")
        shares.append(zeros / weight.numel())
    return _range(shares)


def expected_zeros(shape: torch.Size, stage: SparsifyStage) -> int:
    """Exact: Wanda rounds a row down, the others round the matrix."""
    rows, columns = shape
    pattern = stage.asked
    if pattern.m is not None and pattern.zeros is not None:
        return rows * columns // pattern.m * pattern.zeros
    if stage.method == "wanda":
        return rows * int(columns * pattern.sparsity + 1e-9)
    return int(pattern.sparsity * rows * columns + 0.5)


def run_theirs(
    source: Checkpoint, blocks: TokenBlocks, asked: str, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One run of llm-compressor; an error of its own is put down and does not end the rest."""
    modifier(asked)  # imports what it needs before the clock runs
    pipeline: Any = importlib.import_module("llmcompressor.pipelines.sequential.pipeline")
    start = time.perf_counter()
    model = load(source.path, "bfloat16")
    loaded = time.perf_counter() - start
    traced: list[float] = []
    _clear()
    try:
        with patch.object(pipeline, "trace_subgraphs", _timed(pipeline.trace_subgraphs, traced)):
            seconds = prune(model, tokenizer_for(args.vocab), blocks.ids, asked, batch)
    except Exception as error:
        return {"batch": batch, "failed": f"{type(error).__name__}: {error}"[:500]}
    weights = (p for n, p in model.named_parameters() if n.endswith("proj.weight"))
    return {
        "batch": batch,
        "seconds": round(seconds, 2),
        "trace_seconds": round(sum(traced), 2),
        "load_seconds": round(loaded, 2),
        "peak_gb": _peak(),
        "zeros": _range(1 - int(torch.count_nonzero(p)) / p.numel() for p in weights),
    }


def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return timed


# -- ALS ---------------------------------------------------------------------------------------------------------------


def als_seconds(source: Checkpoint, blocks: TokenBlocks, args: argparse.Namespace) -> dict[str, Any]:
    """The calibration pass that all methods share, its part for modules' features, and what ALS adds to it."""
    found, calibration = _calibrated(source, blocks, args)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found.save(Path(folder))
        start = time.perf_counter()
        redundancy = compute_redundancy(Path(folder), args.device)
        computed = time.perf_counter()
        statistics = load_statistics(Path(folder))
        read = time.perf_counter()
    allocation = stage_of("wanda-0.5", allocation={"method": "als"})
    planned = time.perf_counter()
    allocation.plan(source, SparsityEvidence(source.architecture, statistics, redundancy))
    end = time.perf_counter()
    with patch.object(ModuleFeatures, "watch", lambda features, layer, index: []):
        _, plain = _calibrated(source, blocks, args)
    return {
        "calibration_seconds": round(calibration, 3),
        "without_module_features": round(plain, 3),
        "redundancy_seconds": round(computed - start, 3),
        "reading_seconds": round(read - computed, 3),
        "allocation_seconds": round(end - planned, 3),
        "beyond_calibration": round(read - start + end - planned, 3),
    }


def _calibrated(source: Checkpoint, blocks: TokenBlocks, args: argparse.Namespace) -> tuple[Activations, float]:
    _clear()
    start = time.perf_counter()
    stream = DecoderStream(source, device=args.device, dtype=args.dtype)
    found = profile_activations(stream, blocks)
    _wait()
    seconds = time.perf_counter() - start
    stream.close()
    return found, seconds


# -- bookkeeping -------------------------------------------------------------------------------------------------------


def table(rows: Rows) -> str:
    """Ours and theirs, a line a method; the last two columns are of their batched run."""
    head = ["method", "first", "seconds", "a layer", "write", "floor", "GB", "theirs", "GB", "×", "batched", "×"]
    lines = [head]
    for row in (r for r in rows if "method" in r):
        keys = ("method", "first_seconds", "seconds", "seconds_per_layer", "write_seconds", "floor", "peak_gb")
        one, batched = row.get("llmcompressor", {}), row.get("llmcompressor_batched", {})
        theirs = [_seconds_of(one), one.get("peak_gb"), row.get("ratio")]
        cells = [*(row.get(k) for k in keys), *theirs, _seconds_of(batched), row.get("ratio_batched")]
        lines.append(["" if c is None else str(c) for c in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def _seconds_of(theirs: dict[str, Any]) -> Any:
    return "failed" if "failed" in theirs else theirs.get("seconds")


def _range(shares: Iterable[float]) -> list[float]:
    found = list(shares)
    return [round(min(found), 6), round(max(found), 6)]


def _machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


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
