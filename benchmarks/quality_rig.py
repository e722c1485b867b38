"""What the quality benchmarks share: arguments, a store in a work folder, the steps of a recipe, and scores.

Steps run through `runner.produce`, as in an asset: a prefix that two recipes share is made once, and every checkpoint
has passed its reload gate. `seconds` of a step are those of its artifact, so they include the gate and hashing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer

from compression_dags.assets.base_models import import_base_model
from compression_dags.calibration.corpora import Calibration
from compression_dags.checkpoints.gate import load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.evaluation.harness import run_harness
from compression_dags.evaluation.perplexity import perplexity
from compression_dags.evaluation.tasks import HarnessTask, PerplexityTask
from compression_dags.paths import PROJECT
from compression_dags.provenance.artifacts import Artifact
from compression_dags.recipes import Recipe
from compression_dags.recipes.pipeline import last_weights, steps_of
from compression_dags.registry import METHODS
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.model_hub import ModelHub
from compression_dags.resources.runner import produce
from compression_dags.sparsity.stage import all_matrices
from compression_dags.stage import Stage
from compression_dags.step import BASE, Step

Row = dict[str, Any]
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


def stage_of(kind: str, options: Row) -> Stage:
    """The stage that `options` ask for, as a recipe would read it."""
    found = METHODS[kind][options["method"]].model_validate(options)
    assert isinstance(found, Stage)
    return found


def sizes(checkpoint: Checkpoint) -> dict[str, float | int]:
    """Bytes of all tensors; of a model that is not quantized also the share of zeros over its projections, and the
    bytes with a bit a projection weight and only non-zero values stored."""
    whole = sum(t.nbytes for t in checkpoint.tensors.values())
    if checkpoint.raw_config.get("quantization_config"):
        return {"bytes": whole}
    tensors = [checkpoint.tensor(f"{m.name}.weight") for m in all_matrices(checkpoint)]
    zeros, numel = sum(int((t == 0).sum()) for t in tensors), sum(t.numel() for t in tensors)
    packed = whole - zeros * tensors[0].element_size() + numel // 8
    return {"zeros": zeros / numel, "bytes": whole, "bitmask_bytes": packed}


class Study:
    """One base model, one calibration set, and what recipes make of them."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.rows = args, list[Row]()
        home, hub = str(work), ModelHub(home=str(work))
        self.store = ArtifactStore(home=home)
        self.accelerator = Accelerator(home=home, device=args.device, dtype=args.dtype)
        self.base = import_base_model(self.store, hub, hub.resolve(str(args.model))).artifact
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.calibration = Calibration.model_validate({"sequences": args.sequences, "length": args.length})

    @classmethod
    @contextlib.contextmanager
    def of(cls, args: argparse.Namespace) -> Iterator[Self]:
        """A study in a folder that goes when it ends."""
        with tempfile.TemporaryDirectory() as folder:
            yield cls(args, Path(folder))

    def record(self, **row: Any) -> None:
        """Append a row, print it, and write all of them to `--out`."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.args.out:
            arguments = {k: str(v) for k, v in vars(self.args).items()}
            self.args.out.write_text(json.dumps({"arguments": arguments, "rows": self.rows}))

    def attempt(self, call: Callable[..., None], *asked: Any, **said: Any) -> None:
        """Call, and record a failure: one method's fault must not cost the others' figures."""
        try:
            call(*asked)
        except Exception as error:
            self.record(**said, failed=f"{type(error).__name__}: {error}"[:500])

    # -- steps -------------------------------------------------------------------------------------------------------

    def recipe(self, name: str, *stages: Stage) -> Recipe:
        """These stages on the study's calibration set."""
        return Recipe(name, "", self.calibration, stages)

    def made(self, recipe: Recipe) -> dict[str, Artifact]:
        """Step → artifact of everything that a recipe takes."""
        return self.run(steps_of(recipe).values())

    def run(self, steps: Iterable[Step]) -> dict[str, Artifact]:
        """Step → artifact, stored already or made now; a row for the shared ones that were made."""
        found = {BASE: self.base}
        for step in steps:
            inputs = {role: found[source] for role, source in step.sources.items()}
            produced = produce(self.store, self.accelerator, step, inputs)
            found[step.name] = produced.artifact
            if not isinstance(step.stage, Stage) and not produced.hit:
                self.record(step=step.name, seconds=round(produced.seconds, 2), **produced.artifact.metadata)
        return found

    def last(self, recipe: Recipe) -> Artifact:
        """The weights that a recipe ends with."""
        return self.made(recipe)[last_weights(recipe)]

    def discard(self, made: Iterable[Artifact]) -> None:
        """Remove weights that no further row reads: a study of many recipes would fill the disk."""
        for artifact in made:
            if artifact is not self.base and artifact.checkpoint.is_dir():
                shutil.rmtree(artifact.path)

    # -- scores ------------------------------------------------------------------------------------------------------

    def scores(self, path: Path, tasks: bool = True) -> Row:
        """Perplexity of the whole split, and the accuracy of the lm-eval tasks asked for, with the base's tokenizer."""
        args = self.args
        model = load_stock(path, device=args.device, dtype=args.dtype)
        task = PerplexityTask(name="text", file=args.text, window=args.window, max_windows=args.max_windows)
        windows = {"window": task.window, "max_windows": task.max_windows}
        result = perplexity(model, self.tokenizer, task.read(), **windows, device=args.device)
        found = {"perplexity": next(v for k, v in result.metrics.items() if k.startswith("perplexity@"))}
        return found | (self._accuracies(model) if tasks and args.tasks else {})

    def _accuracies(self, model: Any) -> Row:
        args = self.args
        asked = [HarnessTask(name=t, task=t, limit=args.limit) for t in args.tasks.split(",")]
        metrics = run_harness(model, self.tokenizer, asked, [args.eval_data] if args.eval_data else [], batch_size=64)
        accuracy = {name: round(m.get("acc_norm", m["acc"]), 4) for name, m in metrics.items()}
        return {"accuracy": accuracy, "mean_accuracy": round(sum(accuracy.values()) / len(accuracy), 4)}
