"""What the speed benchmarks beside llm-compressor share: arguments, the record of rows, clocks and memory, its run.

The same random weights and tokens for both tools, in one process: ours first and `--repeats` times, then llm-compressor
once for each batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from llmcompressor_oneshot import compress, load, tokenizer_for

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.reader import Checkpoint

TINY = {"layers": 2, "hidden": 64, "inter": 96, "heads": 8, "kv": 4, "vocab": 512, "sequences": 8, "length": 32}
Row = dict[str, Any]
Rows = list[Row]


# -- what is asked -----------------------------------------------------------------------------------------------------


def base_parser(doc: str | None, asked: list[str], others: str) -> argparse.ArgumentParser:
    """All options but the shapes'. `others` says which methods there are beside `asked`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that does not exist yet, best in memory")
    parser.add_argument("--out", type=Path, default=None)
    for name, value in {"layers": 4, "hidden": 4096, "inter": 11008, "heads": 32, "kv": 32, "vocab": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"sequences": 128, "length": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="of the arithmetic; bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--tflops", type=float, default=600.0, help="sustained, for the floors")
    parser.add_argument("--methods", nargs="+", default=None, help=f"of {' '.join(asked)}, or {others}")
    parser.add_argument("--repeats", type=int, default=2, help="of ours; the last counts")
    parser.add_argument("--ours", action="store_true", help="leave llm-compressor out")
    parser.add_argument("--their-batch", type=int, default=1, help="llm-compressor also with batches of so many")
    parser.add_argument("--no-write", action="store_true", help="do not write our checkpoint (after the timing)")
    return parser


def shape_options(parser: argparse.ArgumentParser, full: str) -> Any:
    """Shapes that have a name of their own: the group, for more of them."""
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--tiny", action="store_true", help="a shape that a CPU does in seconds")
    shape.add_argument("--full", action="store_true", help=full)
    return shape


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.work.exists():
        parser.error(f"--work {args.work} exists; it is made anew, and removed at the end")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.tiny:
        vars(args).update(TINY)
    elif args.full:
        args.layers = 32
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def find_theirs(args: argparse.Namespace) -> None:
    if not args.ours and importlib.util.find_spec("llmcompressor") is None:
        print("llm-compressor is not installed: ours alone, no ratios", file=sys.stderr)
        args.ours = True


# -- what is recorded --------------------------------------------------------------------------------------------------


class Record:
    """Rows as they come: printed, and written to `--out` with the machine, the arguments and `facts`."""

    def __init__(self, args: argparse.Namespace, **facts: Any):
        self.args, self.facts = args, facts
        self.rows: Rows = []

    def __call__(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.args.out:
            options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
            found = {"machine": machine(), **self.facts, "arguments": options, "rows": self.rows}
            self.args.out.write_text(json.dumps(found, indent=1))


@contextlib.contextmanager
def made_anew(folder: Path) -> Iterator[None]:
    """The folder, removed at the end."""
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _seconds_of(theirs: Row) -> Any:
    return "failed" if "failed" in theirs else theirs.get("seconds")


def extremes(shares: Iterable[float]) -> list[float]:
    """The least and the largest."""
    found = list(shares)
    return [round(min(found), 6), round(max(found), 6)]


# -- both tools --------------------------------------------------------------------------------------------------------


def import_seconds(*modules: str) -> float:
    """Of what both tools need (and of `modules`), once a process: in no other figure."""
    start = time.perf_counter()
    import accelerate  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    for module in modules:
        importlib.import_module(module)
    return round(time.perf_counter() - start, 2)


def compare(
    asked: str, ours: Callable[[bool], Row], theirs: Callable[[int], Row] | None, args: argparse.Namespace
) -> Row:
    """A method's row. `ours` is told whether to write, `theirs` (None: it has no such method) the batch size."""
    last = args.repeats - 1
    runs = [ours(i == last and not args.no_write) for i in range(args.repeats)]
    row = {"method": asked, "layers": args.layers, "first_seconds": runs[0]["seconds"], **runs[-1]}
    if args.ours or theirs is None:
        return row
    batches = {"": 1} | ({"_batched": args.their_batch} if args.their_batch > 1 else {})
    for suffix, batch in batches.items():
        found = theirs(batch)
        row[f"llmcompressor{suffix}"] = found
        if "seconds" in found:
            row[f"ratio{suffix}"] = round(found["seconds"] / row["seconds"], 1)
    return row


def run_theirs(
    source: Checkpoint,
    blocks: TokenBlocks,
    modifiers: Callable[[], list[Any]],
    batch: int,
    args: argparse.Namespace,
    facts: Callable[[Any], Row],
) -> Row:
    """One run of llm-compressor; an error of its own is put down and does not end the rest.

    `facts` says what its model has become, after the clock.
    """
    chosen = modifiers()  # imports what it needs before the clock runs
    pipeline: Any = importlib.import_module("llmcompressor.pipelines.sequential.pipeline")
    start = time.perf_counter()
    model = load(source.path, "bfloat16")
    loaded = time.perf_counter() - start
    traced: list[float] = []
    clear()
    try:
        with patch.object(pipeline, "trace_subgraphs", timed(pipeline.trace_subgraphs, traced)):
            seconds = compress(model, tokenizer_for(args.vocab), blocks.ids, chosen, batch)
    except Exception as error:
        return {"batch": batch, "failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        importlib.import_module("llmcompressor.core").reset_session()  # lets go of what it still holds on the device
    return {
        "batch": batch,
        "seconds": round(seconds, 2),
        "trace_seconds": round(sum(traced), 2),
        "load_seconds": round(loaded, 2),
        "peak_gb": peak(),
        **facts(model),
    }


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return measured


# -- the machine -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None
