"""Speed and memory of the quantizers on a model of random weights (Llama-2-7B's shape), beside llm-compressor's.

    python benchmarks/quantization_speed.py --work FOLDER --out speed.json            # one GPU, 4 layers, both tools
    python benchmarks/quantization_speed.py --work FOLDER --their-batch 8             # llm-compressor batched too
    python benchmarks/quantization_speed.py --work FOLDER --full                      # 32 layers, ours alone
    python benchmarks/quantization_speed.py --work FOLDER --methods gptq-W8A8         # METHOD-SCHEME or -SCHEME-GROUP
    python benchmarks/quantization_speed.py --work FOLDER --methods gptq-W4A16 --options '{"target": "own"}'   # of ours
    python benchmarks/quantization_speed.py --work FOLDER --tiny                      # seconds on a CPU: does it run

The same random weights and tokens for both tools, in one process. FOLDER must not exist and is best in memory: ours
reads its layers from there, llm-compressor gets the model loaded (`load_seconds`, not in its `seconds`). `seconds` are
from weights in host memory to codes and scales in host memory; `write_seconds` is the packing and writing of our
checkpoint after that. llm-compressor ends with scales and float weights in host memory: its codes are made when it
saves, which is in no figure. Ours runs --repeats times and goes first, so that the start of CUDA and the compilation of
kernels are in `first_seconds` and not in llm-compressor's one run; imports are in neither, but in a row of their own.
`ratio` is its seconds over our last. `peak_gb` is of the same time as `seconds`. `floor` is the FLOPs of one forward
and, for a method with a Hessian, of the Hessians (four inputs a layer) at --tflops; searches and sweeps are not in it.
`changed` are the least and the largest share in a matrix of codes that are not those of the stored weight rounded to
nearest: on its own range for ours, on the scales that it got for llm-compressor's. A matrix of ours that is missing, a
code out of range, a bad scale, or a layer without a changed code ends the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from llmcompressor_quantization import modifiers, parts
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

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.quantization.packing import Packer
from compression_dags.quantization.rounding_pass import RoundingPass
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.registry import METHODS
from compression_dags.solvers.grids import Grid
from compression_dags.solvers.rounding import Rounded, Scales, find_scales, round_codes

ASKED = ["gptq-W4A16", "awq-W4A16", "smoothquant-W8A8"]
TINY_ASKED = ["gptq-W4A16-32", "awq-W4A16-32", "smoothquant-W8A8"]  # no group of 128 divides so small a matrix
THEIRS = {"gptq", "awq", "smoothquant"}


def main() -> None:
    args = _arguments()
    record = Record(args)
    with made_anew(args.work):
        record(step="imports", seconds=import_seconds("compressed_tensors.compressors"))
        source, blocks = write_random(args.work / "model", args), random_tokens(args)
        for asked in args.methods:
            record(**compared(source, blocks, asked, args))
    print(table(record.rows))


# -- what is asked -----------------------------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, ASKED, "with other schemes or groups")
    shape_options(parser, "32 layers, ours alone")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: more options of our stages")
    args = parsed(parser)
    args.methods = args.methods or (TINY_ASKED if args.tiny else ASKED)
    for asked in args.methods:
        if not stage_of(asked, args).reads_tokens:
            parser.error(f"{asked} reads no tokens: nothing is left to time but rounding and writing")
    args.ours = args.ours or args.full
    find_theirs(args)
    return args


def stage_of(asked: str, args: argparse.Namespace) -> QuantizeStage:
    """`gptq-W4A16`, `awq-W4A16-64` → the pipeline's stage."""
    method, scheme, group = parts(asked)
    options = {"method": method, "scheme": scheme, "group_size": group, **args.options}
    found = METHODS["quantize"][method].model_validate(options)
    assert isinstance(found, QuantizeStage)
    return found


def floor(stage: QuantizeStage, args: argparse.Namespace) -> float:
    flops = layer_flops(args) + (hessian_flops(args) if stage.wanted.startswith("hessian") else 0)
    return args.layers * flops / (args.tflops * 1e12)


# -- both tools --------------------------------------------------------------------------------------------------------


def compared(source: Checkpoint, blocks: TokenBlocks, asked: str, args: argparse.Namespace) -> Row:
    def ours(write: bool) -> Row:
        return run_ours(source, blocks, asked, args, write=write)

    def theirs(batch: int) -> Row:
        grid = stage_of(asked, args).choice.grid()
        return run_theirs(source, blocks, lambda: modifiers(asked), batch, args, lambda m: found_in(m, source, grid))

    return compare(asked, ours, theirs if parts(asked)[0] in THEIRS else None, args)


def run_ours(source: Checkpoint, blocks: TokenBlocks, asked: str, args: argparse.Namespace, *, write: bool) -> Row:
    stage = stage_of(asked, args)
    walk, start, walked, end, held = timed_stage(stage, source, blocks, args, write=write)
    return {
        "seconds": round(walked - start, 3),
        "seconds_per_layer": round((walked - start) / args.layers, 3),
        **({"write_seconds": round(end - walked, 3)} if write else {}),
        "floor": round(floor(stage, args), 3),
        "peak_gb": held,
        "changed": checked_changes(walk, source, args),
    }


def timed_stage(
    stage: QuantizeStage, source: Checkpoint, blocks: TokenBlocks, args: argparse.Namespace, *, write: bool
) -> tuple[RoundingPass, float, float, float, float | None]:
    """The walk; when the stage began, when all codes and scales were in host memory, and when it ended; the peak then.

    Without `write` nothing is packed.
    """
    run, pack = RoundingPass.run_layers, Packer.write
    seen: list[tuple[RoundingPass, float, float | None]] = []

    def measured(walk: RoundingPass, *rest: Any) -> None:
        run(walk, *rest)
        wait()
        seen.append((walk, time.perf_counter(), peak()))

    def packed(packer: Packer, directory: Path) -> Any:
        return pack(packer, directory) if write else None

    clear()
    start = time.perf_counter()
    with patch.object(RoundingPass, "run_layers", measured), patch.object(Packer, "write", packed):
        stage.quantize(source, args.work / "written", blocks=blocks, device=args.device, dtype=args.dtype)
    end = time.perf_counter()
    shutil.rmtree(args.work / "written", ignore_errors=True)
    walk, walked, held = seen[0]
    return walk, start, walked, end, held


# -- what came out -----------------------------------------------------------------------------------------------------


def checked_changes(walk: RoundingPass, source: Checkpoint, args: argparse.Namespace) -> list[float]:
    """Least and largest share of codes that rounding to nearest does not give; every matrix of ours is looked at."""
    if missing := walk.choices.keys() - walk.rounded.keys():
        raise SystemExit(f"{len(missing)} matrices were not rounded, among them {min(missing)}")
    shares: dict[str, float] = {}
    for name, found in walk.rounded.items():
        weight, found = source.tensor(f"{name}.weight").to(args.device), found.to(args.device)
        if fault := fault_of(found, weight, walk.choices[name].grid()):
            raise SystemExit(f"{name}: {fault}")
        shares[name] = changed_share(found, weight, find_scales(weight, found.scales.grid, name))
    for index in range(args.layers):
        prefix = source.architecture.layer_prefix(index)
        if not any(share for name, share in shares.items() if name.startswith(prefix)):
            raise SystemExit(f"layer {index}: every code is that of rounding to nearest")
    return extremes(shares.values())


def fault_of(found: Rounded, weight: torch.Tensor, grid: Grid) -> str | None:
    """What is wrong with a matrix's codes or scales."""
    codes, step = found.codes.float(), found.scales.step()
    low, high = grid.range
    if found.scales.grid != grid or codes.shape != weight.shape:
        return f"{found.scales.grid} and {tuple(codes.shape)}; asked were {grid} and {tuple(weight.shape)}"
    if not bool(((codes >= low) & (codes <= high)).all()):
        return f"codes from {float(codes.min())} to {float(codes.max())}; allowed are {low} to {high}"
    if not bool((torch.isfinite(step) & (step > 0)).all()):
        return "a scale is not finite, or not above 0"
    return None


def changed_share(found: Rounded, weight: torch.Tensor, scales: Scales) -> float:
    """Of codes that are not the weight's nearest on `scales`."""
    return int(torch.count_nonzero(found.codes.float() != round_codes(weight, scales))) / weight.numel()


def found_in(model: Any, source: Checkpoint, grid: Grid) -> Row:
    """Of llm-compressor's model: how many matrices have scales, and how many codes are not the nearest on them."""
    shares = []
    for name, module in model.named_modules():
        if getattr(module, "weight_scale", None) is None:
            continue
        weight, scales = module.weight.detach(), Scales(grid, module.weight_scale.detach())
        if not bool(torch.isfinite(scales.scale).all()):
            return {"matrices": len(shares), "fault": f"{name}: a scale is not finite"}
        stored = source.tensor(f"{name}.weight").to(weight.device)
        shares.append(changed_share(Rounded(round_codes(weight, scales), scales), stored, scales))
    return {"matrices": len(shares), "changed": extremes(shares)} if shares else {"matrices": 0}


if __name__ == "__main__":
    main()
