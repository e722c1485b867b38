"""Whether width methods work on every family of transformers, or refuse it before they compute.

    python benchmarks/width_methods.py                      # all families, tens of minutes on a CPU
    python benchmarks/width_methods.py llama jamba          # these
    python benchmarks/width_methods.py --tiny               # three of them, seconds on a CPU

Models are tiny and random. Each is imported, pruned by Wanda to 50 % and rounded to W4A16, to nearest and by GPTQ.
Stock transformers loads every result whole, and its logits must be those of the changed model in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are helpers of the tests

import numpy as np
import torch
import transformers

from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.importing import import_checkpoint
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.registry import METHODS
from compression_dags.sparsity.allocation import SparsityEvidence
from tests.support.any_models import FAMILIES, tiny_any

METHOD_NAMES = ("import", "wanda", "rtn", "gptq")
PASSED = "passed"


def outcomes(family: str, work: Path, methods: Sequence[str], details: bool) -> dict[str, str]:
    """Method → `passed`, `refused: why` or `FAILED: the first error`."""
    found: dict[str, str] = {}
    made: list[Checkpoint] = []

    def imported() -> None:
        source = tiny_any(family, work / "source")
        import_checkpoint(source, work / "base", revision=None, origin="benchmark")
        made.append(Checkpoint(work / "base"))

    found["import"] = _outcome(imported, details)
    if not made:
        return found
    for method in methods:
        run = pruned if method == "wanda" else rounded
        found[method] = _outcome(lambda run=run, method=method: run(method, made[0], work / method), details)
    return found


def _outcome(run: Callable[[], None], details: bool) -> str:
    try:
        run()
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:  # whatever a model raises
        if details:
            traceback.print_exc()
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return PASSED


def pruned(method: str, source: Checkpoint, directory: Path) -> None:
    stage: Any = METHODS["sparsify"][method].model_validate({"method": method, "sparsity": 0.5})
    stage.check(source.shape)
    plan, _ = stage.plan(source, SparsityEvidence(source.architecture))
    found = stage.sparsify(source, plan, blocks(), directory)
    check_reload(directory, found.reference_logits(source))


def rounded(method: str, source: Checkpoint, directory: Path) -> None:
    stage: Any = METHODS["quantize"][method].model_validate({"method": method, "scheme": "W4A16", "group_size": 16})
    stage.check(source.shape)
    found = stage.quantize(source, directory, blocks=blocks() if stage.reads_tokens else None)
    check_reload(directory, stage.reference_logits(source, rounding=found.rounding))


def blocks(rows: int = 5, length: int = 24) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(3, 200, (rows, length)).astype(np.int32)
    return TokenBlocks(ids, np.full(rows, length, dtype=np.int32), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="three families")
    parser.add_argument("--methods", nargs="*", default=METHOD_NAMES[1:], choices=METHOD_NAMES[1:])
    parser.add_argument("--details", action="store_true", help="print where a method failed")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    families = ["llama", "phi3", "jamba"] if options.tiny else options.families or FAMILIES
    rows: dict[str, dict[str, str]] = {}
    for family in families:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            rows[family] = outcomes(family, Path(work), options.methods, options.details)
        said = "; ".join(f"{method}: {outcome}" for method, outcome in rows[family].items())
        print(f"{family} ({time.perf_counter() - start:.0f} s): {said}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))
    for method in METHOD_NAMES:
        words = Counter(row[method].partition(":")[0] for row in rows.values() if method in row)
        print(f"{method}: {', '.join(f'{count} {word}' for word, count in sorted(words.items()))}")


if __name__ == "__main__":
    main()
