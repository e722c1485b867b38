"""Quality at equal bytes: perplexity and size of recipes (merged, sparse, quantized, composed), and of planned ones.

    python benchmarks/recipe_quality.py MODEL_DIR --device cuda --out recipes.json \
        --recipes gptq-w4 shortgpt-20-ls-sparsegpt-50-gptq-w4 \
        --stages '{"rtn-w8": [{"quantize": {"method": "rtn", "scheme": "W8A16"}}]}' \
        --budgets 120MB 100MB --bits 4.25 --bank '{"schemes": ["W8A16", "W4A16", "W3A16"]}'

MODEL_DIR is a checkpoint directory. All recipes share one calibration set (--sequences × --length; their own is not
read) and every prefix of stages is made once. `bytes` are of all tensors; `bitmask_bytes` of a sparse model whose zeros
take one bit. `front` marks what no row as small or smaller beats. A planned recipe is emitted, read and run like any
other; `above_front` is its perplexity over the best hand-written one of its size or less. No Dagster is needed, so this
runs on a machine that has only torch and transformers.

    python benchmarks/recipe_quality.py --tiny  # seconds on a CPU: does it run
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from depth_quality import Study, add_arguments, parsed, recorder
from sparsity_quality import sizes
from transformers import AutoTokenizer

from compression_dags.checkpoints.gate import check_reload
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.plan import parse_budget
from compression_dags.depth.apply import apply_plan
from compression_dags.depth.plan import MergePlan
from compression_dags.depth.stage import MergeStage, ProbeContext
from compression_dags.planning.budget_solver import Measure, solve
from compression_dags.planning.candidate_table import measure_bank
from compression_dags.planning.candidates import CandidateTable
from compression_dags.planning.mixed import plan_schemes
from compression_dags.planning.options import CandidateOptions
from compression_dags.planning.recipe_writer import recipe_of, recipe_text
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.recipes import Recipe, load_recipe, load_recipes, pick_recipes
from compression_dags.recovery.stage import RecoverStage
from compression_dags.sparsity.evidence import PruneProbe, fresh_evidence
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import Stage

Row = dict[str, Any]
TINY_STAGES = {
    "w4": [{"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16}}],
    "cut-w8": [{"merge": {"method": "shortgpt", "layers": 1}}, {"quantize": {"method": "rtn", "scheme": "W8A16"}}],
}


def main() -> None:
    args = _arguments()
    rows: list[Row] = []
    record = recorder(args, rows)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipes = pick_recipes(load_recipes(), args.recipes)
        recipes += [_written(work / f"{name}.yaml", name, stages) for name, stages in args.stages.items()]
        args.merges = [r.merge.options() for r in recipes if r.merge]
        study = RecipeStudy(args, record, work)
        study.base_row()
        for recipe in recipes:
            study.attempt(recipe)
        for recipe in study.planned() if args.budgets or args.bits else []:
            study.attempt(recipe, planned=True)
    print(table(scored(rows)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="*", default=[], help="names, as `run -r` takes them")
    parser.add_argument("--stages", type=json.loads, default={}, help="JSON: name → list of stages")
    parser.add_argument("--budgets", nargs="*", default=[], help="bytes of all tensors, for the planner: 120MB")
    parser.add_argument("--bits", nargs="*", default=[], help="bits a weight, for the planner")
    parser.add_argument("--bank", type=CandidateOptions.model_validate_json, default="{}")
    parser.add_argument("--keep-bank", type=Path, default=None, help="folder for it: solves other budgets anywhere")
    parser.add_argument("--gate", action="store_true", help="reload gate for every quantized checkpoint")
    return parsed(parser, stages=TINY_STAGES)


def _written(path: Path, name: str, stages: list[Row]) -> Recipe:
    path.write_text(yaml.safe_dump({"name": name, "stages": stages}))
    return load_recipe(path)


@dataclass(frozen=True)
class Made:
    """Weights after some stages.

    Attributes:
        plan: of the merge among them.
        seconds: of the last stage.
        facts: of it, for the row.
    """

    checkpoint: Checkpoint
    plan: MergePlan | None
    seconds: float
    facts: Row


class RecipeStudy(Study):
    """One base model, one calibration set, and what recipes make of them."""

    def __init__(self, args: argparse.Namespace, record: Any, work: Path):
        base = Checkpoint(args.model)
        super().__init__(args, base, AutoTokenizer.from_pretrained(args.model), record)
        self.work = work
        self.done: dict[str, Made] = {"[]": Made(base, None, 0.0, {})}

    def base_row(self) -> None:
        self.record(recipe="baseline", **sizes(self.base), **self.scores(self.base.path))

    def attempt(self, recipe: Recipe, *, planned: bool = False) -> None:
        """A row; one recipe's fault must not cost the others' figures."""
        try:
            made = [self.make(recipe.stages[:n]) for n in range(1, len(recipe.stages) + 1)]
            last = made[-1]
            facts = {"planned": planned, "seconds": [round(m.seconds, 1) for m in made], **last.facts}
            sized, scores = sizes(last.checkpoint), self.scores(last.checkpoint.path)
            stages = [{s.stage: s.options()} for s in recipe.stages]
            self.record(recipe=recipe.name, **sized, **scores, **facts, stages=stages)
        except Exception as error:
            self.record(recipe=recipe.name, planned=planned, failed=f"{type(error).__name__}: {error}"[:500])

    def make(self, stages: tuple[Stage, ...]) -> Made:
        """The weights after `stages`, each prefix once."""
        key = json.dumps([{s.stage: s.options()} for s in stages], sort_keys=True)
        if key not in self.done:
            before = self.make(stages[:-1])
            start, folder = time.monotonic(), self.work / f"weights-{len(self.done)}"
            checkpoint, plan, facts = self._applied(stages[-1], before, folder)
            self.done[key] = Made(checkpoint, plan, time.monotonic() - start, facts)
        return self.done[key]

    def _applied(self, stage: Stage, before: Made, folder: Path) -> tuple[Checkpoint, MergePlan | None, Row]:
        source, plan = before.checkpoint, before.plan
        if isinstance(stage, MergeStage):
            plan, _ = stage.plan(source.shape, self.evidence, ProbeContext(source, self.blocks, **self.on))
            return apply_plan(source, plan, folder), plan, {}
        if isinstance(stage, RecoverStage):
            assert plan is not None
            found = stage.recover(self.base, source, plan, self.blocks, folder, **self.on)
            return found.checkpoint, plan, {}
        if isinstance(stage, SparsifyStage):
            evidence = fresh_evidence(source, stage.allocation, self.blocks, **self.on)
            shares, _ = stage.plan(source, evidence, PruneProbe(stage, source, self.blocks, **self.on))
            return stage.sparsify(source, shares, self.blocks, folder, **self.on).checkpoint, plan, {}
        assert isinstance(stage, QuantizeStage)
        return (*self._quantized(stage, source, folder, plan),)

    def _quantized(
        self, stage: QuantizeStage, source: Checkpoint, folder: Path, plan: MergePlan | None
    ) -> tuple[Checkpoint, MergePlan | None, Row]:
        schemes = plan_schemes(stage, source, self.blocks, **self.on)[0].choices if stage.bits else None
        found = stage.quantize(source, folder, blocks=self.blocks, schemes=schemes, **self.on)
        facts: Row = {"bits_per_weight": round(found.bits_per_weight, 3)}
        if self.args.gate:
            reference = stage.reference_logits(source, rounding=found.rounding, **self.on)
            facts["gate"] = check_reload(folder, reference, **self.on)["gate"]
        return found.checkpoint, plan, facts

    # -- planned ---------------------------------------------------------------------------------------------------

    def planned(self) -> list[Recipe]:
        """A recipe for every budget, from one bank."""
        start = time.monotonic()
        bank = measure_bank(self.base, self.blocks, self.args.bank, **self.on)
        self.record(step="bank", alternatives=len(bank.alternatives), seconds=round(time.monotonic() - start, 2))
        if self.args.keep_bank:
            self.args.keep_bank.mkdir(parents=True, exist_ok=True)
            bank.save(self.args.keep_bank)
        self.record(step="together", costs=bank.together, mixtures=bank.mixtures)
        asked: list[tuple[Measure, float]] = [("bytes", parse_budget(text)) for text in self.args.budgets]
        asked.extend(("bits", float(text)) for text in self.args.bits)
        return [self._emitted(bank, *budget) for budget in asked]

    def _emitted(self, bank: CandidateTable, measure: Measure, budget: float) -> Recipe:
        start = time.monotonic()
        solution = solve(bank, measure, budget)
        name = f"planned-{budget / 1e6:g}mb" if measure == "bytes" else f"planned-{budget:g}-bits"
        name = name.replace(".", "-")
        recipe = recipe_of(solution, bank, self.base.architecture, name=name, description="", calibration={})
        path = self.work / f"{name}.yaml"
        path.write_text(recipe_text(recipe, solution, bank))
        facts = {"predicted_kl": round(solution.cost, 4), "removed": solution.removed}
        self.record(step=name, seconds=round(time.monotonic() - start, 2), **facts, text=path.read_text())
        return load_recipe(path)


# -- at equal bytes ----------------------------------------------------------------------------------------------------


def scored(rows: list[Row]) -> list[Row]:
    """Rows with a perplexity, the smallest first; `front` and `above_front` are added to them."""
    found = sorted((r for r in rows if "perplexity" in r), key=lambda r: (size_of(r), r["perplexity"]))
    for row in found:
        rivals = [r for r in found if size_of(r) <= size_of(row) and r is not row]
        row["front"] = all(r["perplexity"] > row["perplexity"] for r in rivals)
        written = [r["perplexity"] for r in rivals if not r.get("planned")]
        if row.get("planned") and written:
            row["above_front"] = round(row["perplexity"] - min(written), 3)
    return found


def size_of(row: Row) -> int:
    """Bytes that the row needs at least."""
    return min(row["bytes"], row.get("bitmask_bytes", row["bytes"]))


def table(rows: list[Row]) -> str:
    lines = ["| MB | perplexity | bits | front | recipe |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        mark = "●" if r["front"] else f"+{r['above_front']}" if r.get("above_front", 0) > 0 else ""
        name = f"*{r['recipe']}*" if r.get("planned") else r["recipe"]
        lines.append(
            f"| {size_of(r) / 1e6:.1f} | {r['perplexity']:.2f} | {r.get('bits_per_weight', '')} | {mark} | {name} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
