"""Quality of the sparsity methods: perplexity of a dense model and of every pruner and allocation, on one device.

    python benchmarks/sparsity_quality.py MODEL_DIR --device cuda --dtype float32 --out sparsity.json \
        --stages '[{"method": "wanda", "sparsity": 0.5}, {"method": "admm", "pattern": "2:4"}]' \
        --quantize '[{"method": "rtn", "scheme": "W4A16"}]' --checkpoints FOLDER

MODEL_DIR is a checkpoint directory. One calibration pass serves all allocations; every row says what was asked, the
seconds of plan and pruning, the perplexity, and the bytes that its weights need when zeros are stored as a bitmask.
`--checkpoints` scores folders that other tools wrote from the same tokens (saved by `--tokens FILE.npy`), pruned ones
or quantized ones. No Dagster is needed, so this runs on a machine that has only torch and transformers.

    python benchmarks/sparsity_quality.py --tiny  # seconds on a CPU: does it run
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from depth_quality import parsed
from torch import Tensor
from transformers import AutoTokenizer

from compression_dags.calibration.activations import profile_activations
from compression_dags.calibration.corpora import Calibration, TokenBlocks, make_blocks, read_documents
from compression_dags.calibration.statistics import load_statistics
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.gate import check_reload, load_stock
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.evaluation.perplexity import cut_windows, perplexity_of
from compression_dags.evaluation.tasks import PerplexityTask
from compression_dags.planning.mixed import plan_schemes
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.registry import METHODS
from compression_dags.similarity.redundancy_tables import compute_redundancy
from compression_dags.sparsity.allocation import SparsityEvidence
from compression_dags.sparsity.evidence import PruneProbe
from compression_dags.sparsity.results import Sparsified
from compression_dags.sparsity.stage import SparsifyStage, all_matrices

WIKITEXT = "data/eval/wikitext-2-raw-v1/validation.jsonl"


def main() -> None:
    args = _arguments()
    rows: list[dict[str, Any]] = []

    def record(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}))

    study = Study(args, record)
    calls: list[tuple[Callable[..., None], Any]] = [(study.prune, s) for s in args.stages]
    calls += [(study.quantize, options) for options in args.quantize]
    study.dense()
    for call, options in calls:
        try:
            call(options)
        except Exception as error:  # one method's fault must not cost the others' figures
            record(asked=options, failed=f"{type(error).__name__}: {error}")
    for folder in args.checkpoints:
        record(checkpoint=folder.name, **study.score(folder), **sizes(Checkpoint(folder)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL_DIR")
    parser.add_argument("--tiny", action="store_true", help="stories260k on a few windows: does it run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--stages", type=json.loads, default=[{"method": "wanda", "sparsity": 0.5}])
    parser.add_argument("--gate", choices=["once", "all"], default="once", help="reload gate: a method's first, or all")
    parser.add_argument("--quantize", type=json.loads, default=[])
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=Path, default=None, help="write the calibration tokens here")
    parser.add_argument("--out", type=Path, default=None)
    return parsed(parser, quantize=[{"method": "rtn", "scheme": "W4A16", "group_size": 16}])


class Study:
    """One base model, its calibration pass, and the scores of what is made of it."""

    def __init__(self, args: argparse.Namespace, record: Callable[..., None]):
        self.args, self.record = args, record
        self.base, self.tokenizer = Checkpoint(args.model), AutoTokenizer.from_pretrained(args.model)
        self.on: dict[str, Any] = {"device": args.device, "dtype": args.dtype}
        request = Calibration.model_validate({"sequences": args.sequences, "length": args.length})
        context = self.base.config["max_position_embeddings"]
        self.blocks: TokenBlocks = make_blocks(read_documents(request.corpus), self.tokenizer, request, context)
        if args.tokens:
            np.save(args.tokens, self.blocks.ids)
        task = PerplexityTask(name="text", file=args.text, window=args.window, max_windows=args.max_windows)
        self.windows = cut_windows(self.tokenizer, task.read(), min(args.window, context), args.max_windows)
        self.model = load_stock(args.model, **self.on)
        self.gated: set[str] = set()
        self._evidence: SparsityEvidence | None = None

    def evidence(self, stage: SparsifyStage) -> SparsityEvidence:
        """The calibration pass's, taken once and only if an allocation reads it."""
        if not (stage.allocation.needs or stage.allocation.reads_statistics):
            return SparsityEvidence(self.base.architecture)
        if self._evidence is None:
            start = time.monotonic()
            stream = DecoderStream(self.base, **self.on)
            found = profile_activations(stream, self.blocks)
            stream.close()
            with tempfile.TemporaryDirectory() as folder:
                found.save(Path(folder))
                redundancy = compute_redundancy(Path(folder), self.args.device)
                statistics = load_statistics(Path(folder))
            self._evidence = SparsityEvidence(self.base.architecture, statistics, redundancy)
            self.record(step="calibration pass", seconds=round(time.monotonic() - start, 2))
        return self._evidence

    def dense(self) -> None:
        self.record(dense=True, **self.score_in_place({}), bytes=sum(t.nbytes for t in self.base.tensors.values()))

    def score(self, path: Path) -> dict[str, float]:
        return self._perplexity(load_stock(path, **self.on))

    def score_in_place(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Of the base model with other weights: the gate has shown that it equals the reloaded checkpoint."""
        parameters = dict(self.model.named_parameters())
        stored = {name: parameters[name].data for name in tensors}
        for name, tensor in tensors.items():
            parameters[name].data = tensor.to(self.args.device, stored[name].dtype)
        found = self._perplexity(self.model)
        for name, tensor in stored.items():
            parameters[name].data = tensor
        return found

    def _perplexity(self, model: Any) -> dict[str, float]:
        found = perplexity_of(model, self.windows, device=self.args.device)
        return {"perplexity": next(v for k, v in found.metrics.items() if k.startswith("perplexity@"))}

    def prune(self, options: dict[str, Any]) -> None:
        stage = METHODS["sparsify"][options["method"]].model_validate(options)
        assert isinstance(stage, SparsifyStage)
        start = time.monotonic()
        evidence, probe = self.evidence(stage), PruneProbe(stage, self.base, self.blocks, **self.on)
        plan, _ = stage.plan(self.base, evidence, probe)
        planned = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = stage.sparsify(self.base, plan, self.blocks, Path(folder, "sparse"), **self.on)
            pruned = time.monotonic()
            if stage.method not in self.gated or self.args.gate == "all":
                check_reload(found.checkpoint.path, found.reference_logits(self.base, **self.on), **self.on)
                self.gated.add(stage.method)
            self.record(
                sparsify=options,
                plan_seconds=round(planned - start, 2),
                seconds=round(pruned - planned, 2),
                **self.score_in_place(found.tensors),
                **sizes(found.checkpoint),
                **self._notes(plan.evidence, found),
            )

    @staticmethod
    def _notes(evidence: Any, found: Sparsified) -> dict[str, Any]:
        summary = {k: v for k, v in evidence["summary"].items() if k in {"rise", "at_lower", "at_upper", "forced"}}
        return {"mean_output_error": found.facts.get("mean_output_error"), "notes": evidence["notes"], **summary}

    def quantize(self, options: dict[str, Any]) -> None:
        stage = METHODS["quantize"][options["method"]].model_validate(options)
        assert isinstance(stage, QuantizeStage)
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            schemes = plan_schemes(stage, self.base, self.blocks, **self.on)[0].choices if stage.bits else None
            more = {"blocks": self.blocks, "schemes": schemes}
            found = stage.quantize(self.base, Path(folder, "quantized"), **more, **self.on)
            size = sum(f.stat().st_size for f in found.checkpoint.path.glob("*.safetensors"))
            scored = self.score(found.checkpoint.path)
            self.record(quantize=options, seconds=round(time.monotonic() - start, 2), **scored, bytes=size)


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


if __name__ == "__main__":
    main()
