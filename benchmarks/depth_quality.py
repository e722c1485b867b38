"""Quality of the depth methods: perplexity of a dense model and of every method at every ratio, on one device.

    python benchmarks/depth_quality.py MODEL_DIR --device cuda --dtype float32 --out depth.json \
        --merges '[{"method": "mka"}, {"method": "shortgpt"}]' \
        --recoveries '[[], [{"method": "least-squares"}, {"method": "distill-sp"}]]'

MODEL_DIR is a checkpoint directory. One calibration pass serves all methods; a recovery is a list of stages, each on
the weights that the one before it left. No Dagster is needed, so this runs on a machine that has only torch and
transformers.

    python benchmarks/depth_quality.py --tiny  # seconds on a CPU: does it run
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import Calibration, TokenBlocks, make_blocks, read_documents
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.depth.apply import apply_plan, reference_logits
from compression_dags.depth.plan import MergePlan, keep_only
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.evaluation.perplexity import perplexity
from compression_dags.evaluation.tasks import PerplexityTask
from compression_dags.paths import PROJECT
from compression_dags.recovery.stage import RecoverStage
from compression_dags.registry import METHODS
from compression_dags.similarity.evidence import Evidence, read_evidence
from compression_dags.similarity.tables import write_similarity

WIKITEXT = "data/eval/wikitext-2-raw-v1/validation.jsonl"
#: What `--tiny` asks for: a shipped model of five layers on a few windows.
TINY = {
    "model": PROJECT / "models" / "stories260k",
    "text": str(PROJECT / "data" / "heldout" / "stories.jsonl"),
    "window": 128,
    "max_windows": 2,
    "sequences": 8,
    "length": 128,
}


def main() -> None:
    args = _arguments()
    base = Checkpoint(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    record = recorder(args, [])
    study = Study(args, base, tokenizer, record)
    if not args.chains_only:
        record(method="dense", removed=0, **study.scores(base.path))
    for options in args.merges:
        for removed in [options["layers"]] if "layers" in options else map(int, args.removed.split(",")):
            stage = METHODS["merge"][options["method"]].model_validate({**options, "layers": removed})
            assert isinstance(stage, MergeStage)
            try:
                study.run(stage, removed, options)
            except Exception as error:  # one method's fault must not cost the others' figures
                record(merge=options, removed=removed, failed=f"{type(error).__name__}: {error}")


def recorder(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Callable[..., None]:
    """Appends a row, prints it, and writes all of them to `--out`."""

    def record(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}))

    return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its device, the calibration set and how it is scored."""
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL_DIR")
    parser.add_argument("--tiny", action="store_true", help="stories260k on a few windows: does it run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tasks", default="", help="lm-eval tasks, 0-shot, from --eval-data")
    parser.add_argument("--eval-data", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=None, help="items of every lm-eval task")
    parser.add_argument("--out", type=Path, default=None)


def parsed(parser: argparse.ArgumentParser, **tiny: Any) -> argparse.Namespace:
    """The arguments; with `--tiny` the small ones, and what a script adds to them."""
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY | tiny)
    elif args.model is None:
        parser.error("name a MODEL_DIR, or ask for --tiny")
    return args


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--merges", type=json.loads, default=[{"method": m} for m in ("reverse", "shortgpt", "angular")]
    )
    parser.add_argument("--removed", default="3,6,9", help="layers removed, for merges that do not say `layers`")
    parser.add_argument("--chains-only", action="store_true", help="score neither the base model nor the bare plans")
    parser.add_argument("--recoveries", type=json.loads, default=[[]], help="JSON list of lists of recover stages")
    parser.add_argument("--tasks-at", type=int, default=None, help="only at this many layers removed (and dense)")
    return parsed(parser, removed="1", merges=[{"method": "shortgpt"}], recoveries=[[{"method": "least-squares"}]])


class Study:
    """One base model, its calibration pass, and the scores of what is made of it."""

    def __init__(self, args: argparse.Namespace, base: Checkpoint, tokenizer: Any, record: Callable[..., None]):
        self.args, self.base, self.tokenizer, self.record = args, base, tokenizer, record
        self.on = {"device": args.device, "dtype": args.dtype}
        request = Calibration.model_validate({"sequences": args.sequences, "length": args.length})
        context = base.config["max_position_embeddings"]
        self.blocks: TokenBlocks = make_blocks(read_documents(request.corpus), tokenizer, request, context)
        self.evidence = self._evidence()

    def _evidence(self) -> Evidence:
        start = time.monotonic()
        stream = DecoderStream(self.base, **self.on)
        found = profile_activations(stream, self.blocks)
        stream.close()
        if self.args.device != "cpu":
            torch.cuda.synchronize()
        self.record(step="calibration pass", tokens=self.blocks.tokens, seconds=round(time.monotonic() - start, 2))
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            found.save(work)
            needs = {n for o in self.args.merges for n in METHODS["merge"][o["method"]].needs}  # type: ignore[attr-defined]
            metrics = [work / f"similarity_{m}" for m in sorted(needs)]
            for directory in metrics:
                directory.mkdir()
                start = time.monotonic()
                write_similarity(directory.name.removeprefix("similarity_"), work, directory)
                self.record(step=directory.name, seconds=round(time.monotonic() - start, 2))
            return read_evidence({d.name: d for d in metrics}, work)

    def scores(self, path: Path, tasks: bool = True) -> dict[str, Any]:
        """Perplexity of the whole split, and the accuracy of the lm-eval tasks asked for."""
        args = self.args
        model = load_stock(path, **self.on)
        task = PerplexityTask(name="text", file=args.text, window=args.window, max_windows=args.max_windows)
        result = perplexity(
            model, self.tokenizer, task.read(), window=task.window, max_windows=task.max_windows, device=args.device
        )
        found = {"perplexity": next(v for k, v in result.metrics.items() if k.startswith("perplexity@"))}
        return found | (self._accuracies(model) if tasks and args.tasks else {})

    def _accuracies(self, model: Any) -> dict[str, Any]:
        from compression_dags.evaluation.harness import run_harness
        from compression_dags.evaluation.tasks import HarnessTask

        args = self.args
        asked = [HarnessTask(name=t, task=t, limit=args.limit) for t in args.tasks.split(",")]
        metrics = run_harness(model, self.tokenizer, asked, [args.eval_data] if args.eval_data else [], batch_size=64)
        accuracy = {name: round(m.get("acc_norm", m["acc"]), 4) for name, m in metrics.items()}
        return {"accuracy": accuracy, "mean_accuracy": round(sum(accuracy.values()) / len(accuracy), 4)}

    def run(self, stage: MergeStage, removed: int, options: dict[str, Any]) -> None:
        start = time.monotonic()
        probe = ProbeContext(self.base, self.blocks, **self.on)
        plan, decisions = stage.plan(self.base.shape, self.evidence, probe)
        seconds = round(time.monotonic() - start, 1)
        with tempfile.TemporaryDirectory() as folder:
            merged = apply_plan(self.base, plan, Path(folder, "merged"))
            gate = check_reload(merged.path, reference_logits(self.base, plan, **self.on), **self.on)
            chosen = [(d.target, d.evidence.get("form"), d.value) for d in decisions if d.action != "keep"]
            what = {"dropped": plan.dropped, "merged": [x.sources for x in plan.layers if not x.kept], "chosen": chosen}
            scores = {} if self.args.chains_only else self.scores(merged.path, self._with_tasks(removed))
            self.record(merge=options, removed=removed, seconds=seconds, gate=gate["gate"], **scores, **what)
            done: dict[str, Checkpoint] = {"[]": merged}
            for chain in self.args.recoveries:
                for length in range(1, len(chain) + 1):
                    if (key := json.dumps(chain[:length])) not in done:
                        student = done[json.dumps(chain[: length - 1])]
                        done[key] = self._recover(chain[:length], student, plan, Path(folder, str(len(done))), options)

    def _with_tasks(self, removed: int) -> bool:
        return self.args.tasks_at in {None, removed}

    def _recover(
        self, chain: list[dict[str, Any]], student: Checkpoint, plan: MergePlan, folder: Path, options: dict[str, Any]
    ) -> Checkpoint:
        stage = METHODS["recover"][chain[-1]["method"]].model_validate(chain[-1])
        assert isinstance(stage, RecoverStage)
        start = time.monotonic()
        found = stage.recover(self.base, student, plan, self.blocks, folder, **self.on)
        seconds = round(time.monotonic() - start, 1)
        same = keep_only("none", student.num_layers, list(range(student.num_layers)))
        check_reload(
            found.checkpoint.path, reference_logits(student, same, replaced=found.fitted, **self.on), **self.on
        )
        tally = [(d.target.removeprefix("model.layers."), d.action, d.value) for d in found.decisions]
        removed = plan.base_layers - len(plan.layers)
        self.record(
            merge=options,
            removed=removed,
            recover=chain,
            seconds=seconds,
            **self.scores(found.checkpoint.path, self._with_tasks(removed)),
            facts=found.facts,
            steps=tally,
        )
        return found.checkpoint


if __name__ == "__main__":
    main()
