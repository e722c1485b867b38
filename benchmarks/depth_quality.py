"""Quality of the depth methods: perplexity of a dense model and of every method at every ratio, on one device.

    python benchmarks/depth_quality.py MODEL_DIR --device cuda --dtype float32 --out depth.json

MODEL_DIR is a checkpoint directory. One calibration pass serves all methods. No Dagster is needed, so this runs on a
machine that has only torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import Calibration, make_blocks, read_documents
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.evaluation.perplexity import perplexity
from compression_dags.evaluation.tasks import PerplexityTask
from compression_dags.merging.apply import apply_plan, reference_logits
from compression_dags.merging.least_squares import LeastSquares
from compression_dags.merging.plan import Evidence, keep_only
from compression_dags.registry import METHODS

WIKITEXT = "data/eval/wikitext-2-raw-v1/validation.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--methods", default="reverse,shortgpt,angular,weighted-sum")
    parser.add_argument("--removed", default="3,6,9", help="layers removed")
    parser.add_argument("--recoveries", type=json.loads, default=[{}], help="JSON list of least-squares options")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    on = {"device": args.device, "dtype": args.dtype}
    base = Checkpoint(args.model)
    task = PerplexityTask(name="text", file=args.text, window=args.window, max_windows=args.max_windows)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def score(path: Path) -> float:
        model = load_stock(path, **on)
        result = perplexity(
            model, tokenizer, task.read(), window=task.window, max_windows=task.max_windows, device=args.device
        )
        return next(v for k, v in result.metrics.items() if k.startswith("perplexity@"))

    rows = []

    def record(**row: object) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}))

    record(method="dense", removed=0, perplexity=score(base.path))
    request = Calibration(sequences=args.sequences, length=args.length)
    blocks = make_blocks(read_documents(request.corpus), tokenizer, request, base.config["max_position_embeddings"])
    start = time.monotonic()
    activations = profile_activations(DecoderStream(base, **on), blocks)
    if args.device != "cpu":
        torch.cuda.synchronize()
    record(step="calibration pass", tokens=blocks.tokens, seconds=round(time.monotonic() - start, 2))
    evidence = Evidence(
        *(t.numpy() for t in (activations.block_influence, activations.angular, activations.angular_last))
    )
    for method in args.methods.split(","):
        for removed in map(int, args.removed.split(",")):
            stage = METHODS["merge"][method].model_validate({"method": method, "layers": removed})
            plan, _ = stage.plan(base.facts, evidence)  # type: ignore[attr-defined]
            with tempfile.TemporaryDirectory() as folder:
                merged = apply_plan(base, plan, Path(folder, "merged"))
                check_reload(merged.path, reference_logits(base, plan, **on), **on)
                what = {"dropped": plan.dropped, "merged": [x.sources for x in plan.layers if len(x.sources) > 1]}
                record(method=method, removed=removed, perplexity=score(merged.path), **what)
                for options in args.recoveries:
                    name = " ".join(("least-squares", *(f"{k}={v}" for k, v in options.items())))
                    start = time.monotonic()
                    found = LeastSquares(**options).recover(base, merged, plan, blocks, Path(folder, name), **on)
                    seconds = time.monotonic() - start
                    same = keep_only("none", merged.num_layers, list(range(merged.num_layers)))
                    check_reload(
                        found.checkpoint.path, reference_logits(merged, same, replaced=found.fitted, **on), **on
                    )
                    chosen = [
                        (d.target, d.action, d.evidence["form"], d.evidence["alpha"], d.value) for d in found.decisions
                    ]
                    record(
                        method=f"{method} + {name}",
                        removed=removed,
                        perplexity=score(found.checkpoint.path),
                        seconds=round(seconds, 1),
                        chosen=chosen,
                    )


if __name__ == "__main__":
    main()
