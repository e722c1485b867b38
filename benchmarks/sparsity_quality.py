"""Quality of the sparsity methods: perplexity of a dense model and of every pruner and allocation, on one device.

    python benchmarks/sparsity_quality.py MODEL_DIR --device cuda --dtype float32 --out sparsity.json \
        --stages '[{"method": "wanda", "sparsity": 0.5}, {"method": "admm", "pattern": "2:4"}]' \
        --quantize '[{"method": "rtn", "scheme": "W4A16"}]' --checkpoints FOLDER

MODEL_DIR is a checkpoint directory. One calibration pass serves all allocations; every row says what was asked, the
seconds of plan and pruning, the perplexity, and the bytes that its weights need when zeros are stored as a bitmask.
`--checkpoints` scores folders that other tools wrote from the same tokens (saved by `--tokens FILE.npy`), pruned ones
or quantized ones. The steps are the pipeline's own, in a store that goes when the script ends.

    python benchmarks/sparsity_quality.py --tiny  # seconds on a CPU: does it run
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from quality_rig import Row, Study, add_arguments, parsed, sizes, stage_of

from compression_dags.calibration.corpora import load_blocks
from compression_dags.calibration.steps import calibration_steps
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.sparsity.allocation import SparsityPlan


def main() -> None:
    args = _arguments()
    with SparsityStudy.of(args) as study:
        if args.tokens:
            study.save_tokens(args.tokens)
        study.record(dense=True, **study.measured(study.base.checkpoint))
        for options in args.stages:
            study.attempt(study.prune, options, asked=options)
        for options in args.quantize:
            study.attempt(study.quantize, options, asked=options)
        for folder in args.checkpoints:
            study.record(checkpoint=folder.name, **study.measured(folder))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--stages", type=json.loads, default=[{"method": "wanda", "sparsity": 0.5}])
    parser.add_argument("--quantize", type=json.loads, default=[])
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=Path, default=None, help="write the calibration tokens here")
    return parsed(parser, quantize=[{"method": "rtn", "scheme": "W4A16", "group_size": 16}])


class SparsityStudy(Study):
    """Pruned and quantized checkpoints of one base model."""

    def save_tokens(self, path: Path) -> None:
        """Write the calibration tokens (n, T), for tools that are to use the same."""
        tokens, _ = calibration_steps(self.calibration)
        np.save(path, load_blocks(self.run([tokens])[tokens.name].path / "tokens.safetensors").ids)

    def measured(self, checkpoint: Path) -> Row:
        """Scores and sizes of a checkpoint directory."""
        return {**self.scores(checkpoint), **sizes(Checkpoint(checkpoint))}

    def prune(self, options: Row) -> None:
        """A row of a pruned model."""
        made = self.made(self.recipe("sparse", stage_of("sparsify", options)))
        plan, sparse = made["sparsity_plan"], made["sparse_weights"]
        self.record(
            sparsify=options,
            plan_seconds=round(plan.seconds, 2),
            seconds=round(sparse.seconds, 2),
            **self.measured(sparse.checkpoint),
            mean_output_error=sparse.metadata.get("mean_output_error"),
            **_notes(SparsityPlan.load(plan.path).evidence),
        )
        self.discard(made.values())

    def quantize(self, options: Row) -> None:
        """A row of a quantized model."""
        made = self.made(self.recipe("quantized", stage_of("quantize", options)))
        weights = made["quantized_weights"]
        self.record(quantize=options, seconds=round(weights.seconds, 2), **self.measured(weights.checkpoint))
        self.discard(made.values())


def _notes(evidence: Any) -> dict[str, Any]:
    summary = {k: v for k, v in evidence["summary"].items() if k in {"rise", "at_lower", "at_upper", "forced"}}
    return {"notes": evidence["notes"], **summary}


if __name__ == "__main__":
    main()
