"""Quality of the depth methods: perplexity of a dense model and of every method at every ratio, on one device.

    python benchmarks/depth_quality.py MODEL_DIR --device cuda --dtype float32 --out depth.json \
        --merges '[{"method": "mka"}, {"method": "shortgpt"}]' \
        --recoveries '[[], [{"method": "least-squares"}, {"method": "distill-sp"}]]'

MODEL_DIR is a checkpoint directory. One calibration pass serves all methods; a recovery is a list of stages, each on
the weights that the one before it left. The steps are the pipeline's own, in a store that goes when the script ends.

    python benchmarks/depth_quality.py --tiny  # seconds on a CPU: does it run
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from quality_rig import Row, Study, add_arguments, parsed, stage_of

from compression_dags.depth.plan import MergePlan
from compression_dags.provenance.artifacts import Artifact
from compression_dags.provenance.decisions import read_decisions
from compression_dags.stage import Stage


def main() -> None:
    args = _arguments()
    with DepthStudy.of(args) as study:
        if not args.chains_only:
            study.record(method="dense", removed=0, **study.scores(study.base.checkpoint))
        for options in args.merges:
            for removed in [options["layers"]] if "layers" in options else map(int, args.removed.split(",")):
                study.attempt(study.merge, options, removed, merge=options, removed=removed)


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


class DepthStudy(Study):
    """Merges of one base model, and what recoveries make of each."""

    def merge(self, options: Row, removed: int) -> None:
        """A row of a merge, then one of every prefix of every chain of recoveries."""
        merge = stage_of("merge", {**options, "layers": removed})
        asked = {"merge": options, "removed": removed}
        made = self.made(self.recipe("merge", merge))
        scores = {} if self.args.chains_only else self._scored(made["merged_weights"], removed)
        seconds, gate = round(made["merge_plan"].seconds, 1), made["merged_weights"].metadata["gate"]
        self.record(**asked, seconds=seconds, gate=gate, **scores, **_chosen(made["merge_plan"]))
        seen, used = set[str](), [*made.values()]
        for chain in self.args.recoveries:
            for length in range(1, len(chain) + 1):
                if (key := json.dumps(chain[:length])) not in seen:
                    seen.add(key)
                    used.append(self._recover(merge, chain[:length], asked))
        self.discard(used)

    def _recover(self, merge: Stage, chain: list[Row], asked: Row) -> Artifact:
        found = self.last(self.recipe("recovered", merge, *(stage_of("recover", options) for options in chain)))
        steps = [(r["target"].removeprefix("model.layers."), r["action"], r["value"]) for r in _rows(found)]
        scores = self._scored(found, asked["removed"])
        self.record(
            **asked, recover=chain, seconds=round(found.seconds, 1), **scores, metadata=found.metadata, steps=steps
        )
        return found

    def _scored(self, weights: Artifact, removed: int) -> Row:
        return self.scores(weights.checkpoint, self.args.tasks_at in {None, removed})


def _chosen(planned: Artifact) -> dict[str, Any]:
    """What a stored plan drops and merges, with the form and the value of each."""
    plan = MergePlan.load(planned.path)
    rows = [r for r in _rows(planned) if r["action"] != "keep"]
    chosen = [(r["target"], json.loads(r["evidence"]).get("form"), r["value"]) for r in rows]
    return {"dropped": plan.dropped, "merged": [x.sources for x in plan.layers if not x.kept], "chosen": chosen}


def _rows(artifact: Artifact) -> list[dict[Any, Any]]:
    """Decision rows beside an artifact."""
    return read_decisions(artifact.decisions).to_dict("records") if artifact.decisions else []


if __name__ == "__main__":
    main()
