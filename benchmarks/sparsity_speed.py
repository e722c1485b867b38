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
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from llmcompressor_sparsity import modifiers
from random_llama import hessian_flops, layer_flops, random_tokens, write_random
from speed_rig import (
    Record,
    Row,
    base_parser,
    clear,
    compare,
    extremes,
    find_theirs,
    import_seconds,
    made_anew,
    parsed,
    peak,
    run_theirs,
    shape_options,
    table,
    wait,
)

from compression_dags.calibration.activations import Activations, profile_activations
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.module_features import ModuleFeatures
from compression_dags.calibration.statistics import load_statistics
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.registry import METHODS
from compression_dags.similarity.redundancy_tables import compute_redundancy
from compression_dags.sparsity.allocation import SparsityEvidence
from compression_dags.sparsity.results import Results
from compression_dags.sparsity.stage import SparsifyStage

SHAPE_70B = {"hidden": 8192, "inter": 28672, "heads": 64, "kv": 8}
ASKED = ["wanda-0.5", "sparsegpt-0.5", "sparsegpt-2:4", "magnitude-0.5"]
TARGETS = {"wanda-0.5": 15, "sparsegpt-0.5": 20, "sparsegpt-2:4": 20}  # times llm-compressor, 4 layers on one H100
THEIRS = {"wanda", "sparsegpt"}
#: Stored weights may be 0 by chance: so many of a matrix's are let pass beside the mask's.
CHANCE = 1e-5


def main() -> None:
    args = _arguments()
    record = Record(args, targets=TARGETS)
    with made_anew(args.work):
        record(step="imports", seconds=import_seconds())
        source, blocks = write_random(args.work / "model", args), random_tokens(args)
        if args.als:
            for run in range(args.repeats):
                record(step="als", run=run + 1, layers=args.layers, **als_seconds(source, blocks, args))
            return
        for asked in args.methods:
            record(**compared(source, blocks, asked, args))
    print(table(record.rows))


# -- what is asked -----------------------------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, ASKED, "with other targets")
    parser.add_argument("--als", action="store_true", help="time ALS's allocation instead")
    shape = shape_options(parser, "32 layers, ours alone, wanda and sparsegpt")
    shape.add_argument("--stack70b", type=int, metavar="N", help="N layers of a 70B's shape, ours alone")
    args = parsed(parser)
    if args.stack70b:
        vars(args).update(SHAPE_70B, layers=args.stack70b)
    alone = args.full or bool(args.stack70b)
    args.methods = args.methods or (ASKED[:2] if alone else ASKED)
    args.ours = args.ours or alone
    if not args.als:
        find_theirs(args)
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
        flops += hessian_flops(args)
    return args.layers * flops / (args.tflops * 1e12)


# -- both tools --------------------------------------------------------------------------------------------------------


def compared(source: Checkpoint, blocks: TokenBlocks, asked: str, args: argparse.Namespace) -> Row:
    def ours(write: bool) -> Row:
        return run_ours(source, blocks, asked, args, write=write)

    def theirs(batch: int) -> Row:
        return run_theirs(source, blocks, lambda: modifiers(asked), batch, args, zeros_of)

    return compare(asked, ours, theirs if asked.split("-")[0] in THEIRS else None, args)


def run_ours(source: Checkpoint, blocks: TokenBlocks, asked: str, args: argparse.Namespace, *, write: bool) -> Row:
    stage = stage_of(asked)
    plan, _ = stage.plan(source, SparsityEvidence(source.architecture))
    original, kept, times = Results.write, list[Results](), dict[str, float]()

    def measured(results: Results, directory: Path) -> Any:
        """In place of `Results.write`: everything is in host memory once it has settled."""
        results.settle()
        wait()
        times["walked"] = time.perf_counter()
        kept.append(results)
        return original(results, directory) if write else None

    clear()
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
        "peak_gb": peak(),
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
    return extremes(shares)


def expected_zeros(shape: torch.Size, stage: SparsifyStage) -> int:
    """Exact: Wanda rounds a row down, the others round the matrix."""
    rows, columns = shape
    pattern = stage.asked
    if pattern.m is not None and pattern.zeros is not None:
        return rows * columns // pattern.m * pattern.zeros
    if stage.method == "wanda":
        return rows * int(columns * pattern.sparsity + 1e-9)
    return int(pattern.sparsity * rows * columns + 0.5)


def zeros_of(model: Any) -> Row:
    weights = (p for n, p in model.named_parameters() if n.endswith("proj.weight"))
    return {"zeros": extremes(1 - int(torch.count_nonzero(p)) / p.numel() for p in weights)}


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
    clear()
    start = time.perf_counter()
    stream = DecoderStream(source, device=args.device, dtype=args.dtype)
    found = profile_activations(stream, blocks)
    wait()
    seconds = time.perf_counter() - start
    stream.close()
    return found, seconds


if __name__ == "__main__":
    main()
