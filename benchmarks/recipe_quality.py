"""Quality at equal bytes: perplexity and size of recipes (merged, sparse, quantized, composed), and of planned ones.

    python benchmarks/recipe_quality.py MODEL_DIR --device cuda --out recipes.json \
        --recipes gptq-w4 shortgpt-20-ls-sparsegpt-50-gptq-w4 \
        --stages '{"rtn-w8": [{"quantize": {"method": "rtn", "scheme": "W8A16"}}]}' \
        --budgets 120MB 100MB --bits 4.25 --bank '{"schemes": ["W8A16", "W4A16", "W3A16"]}'

MODEL_DIR is a checkpoint directory. All recipes share one calibration set (--sequences × --length; their own is not
read) and every prefix of stages is made once. `bytes` are of all tensors; `bitmask_bytes` of a sparse model whose zeros
take one bit. `front` marks what no row as small or smaller beats. A planned recipe is emitted, read and run like any
other; `above_front` is its perplexity over the best hand-written one of its size or less. The steps are the pipeline's
own, in a store that goes when the script ends.

    python benchmarks/recipe_quality.py --tiny  # seconds on a CPU: does it run
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import yaml
from quality_rig import Row, Study, add_arguments, parsed, sizes

from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.cli.plan import parse_budget
from compression_dags.planning.budget_solver import Measure, solve
from compression_dags.planning.candidates import CandidateTable
from compression_dags.planning.options import CandidateOptions
from compression_dags.planning.recipe_writer import recipe_of, recipe_text
from compression_dags.planning.steps import ALTERNATIVES, planning_steps
from compression_dags.recipes import Recipe, load_recipe, load_recipes, pick_recipes
from compression_dags.recipes.pipeline import steps_of

TINY_STAGES = {
    "w4": [{"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16}}],
    "cut-w8": [{"merge": {"method": "shortgpt", "layers": 1}}, {"quantize": {"method": "rtn", "scheme": "W8A16"}}],
}


def main() -> None:
    args = _arguments()
    with RecipeStudy.of(args) as study:
        study.record(recipe="baseline", **study.measured(study.base.checkpoint))
        recipes = pick_recipes(load_recipes(), args.recipes)
        recipes += [study.read(name, yaml.safe_dump({"name": name, "stages": s})) for name, s in args.stages.items()]
        for recipe in recipes:
            study.attempt(study.score, recipe, False, recipe=recipe.name, planned=False)
        for recipe in study.planned() if args.budgets or args.bits else []:
            study.attempt(study.score, recipe, True, recipe=recipe.name, planned=True)
        print(table(scored(study.rows)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="*", default=[], help="names, as `run -r` takes them")
    parser.add_argument("--stages", type=json.loads, default={}, help="JSON: name → list of stages")
    parser.add_argument("--budgets", nargs="*", default=[], help="bytes of all tensors, for the planner: 120MB")
    parser.add_argument("--bits", nargs="*", default=[], help="bits a weight, for the planner")
    parser.add_argument("--bank", type=CandidateOptions.model_validate_json, default="{}")
    parser.add_argument("--keep-bank", type=Path, default=None, help="folder for it: solves other budgets anywhere")
    return parsed(parser, stages=TINY_STAGES)


class RecipeStudy(Study):
    """Recipes of one base model: hand-written ones, and those of its planner."""

    def read(self, name: str, text: str) -> Recipe:
        """A recipe as its file would be read."""
        path = Path(self.store.home, f"{name}.yaml")
        path.write_text(text)
        return load_recipe(path)

    def measured(self, checkpoint: Path) -> Row:
        """Sizes and scores of a checkpoint directory."""
        return {**sizes(Checkpoint(checkpoint)), **self.scores(checkpoint)}

    def score(self, recipe: Recipe, planned: bool) -> None:
        """A row of a recipe, on the study's calibration set."""
        recipe = replace(recipe, calibration=self.calibration)
        made = self.made(recipe)
        own = [made[step.name] for step in steps_of(recipe).values() if step.stage in recipe.stages]
        last, stages = own[-1], [{s.stage: s.options()} for s in recipe.stages]
        seconds = {artifact.kind: round(artifact.seconds, 1) for artifact in own}
        found: Row = {"planned": planned, "seconds": seconds, "gate": last.metadata["gate"]}
        if bits := last.metadata.get("bits_per_weight"):
            found["bits_per_weight"] = round(bits, 3)
        self.record(recipe=recipe.name, **self.measured(last.checkpoint), **found, stages=stages)

    def planned(self) -> list[Recipe]:
        """A recipe for every budget, from one bank."""
        measured = self.run(planning_steps(self.calibration, self.args.bank))[ALTERNATIVES]
        bank = CandidateTable.load(measured.path)
        if self.args.keep_bank:
            self.args.keep_bank.mkdir(parents=True, exist_ok=True)
            bank.save(self.args.keep_bank)
        self.record(step="together", costs=bank.together, mixtures=bank.mixtures)
        asked: list[tuple[Measure, float]] = [("bytes", parse_budget(text)) for text in self.args.budgets]
        asked.extend(("bits", float(text)) for text in self.args.bits)
        return [self._emitted(bank, *budget) for budget in asked]

    def _emitted(self, bank: CandidateTable, measure: Measure, budget: float) -> Recipe:
        solution = solve(bank, measure, budget)
        name = f"planned-{budget / 1e6:g}mb" if measure == "bytes" else f"planned-{budget:g}-bits"
        name = name.replace(".", "-")
        architecture = Checkpoint(self.base.checkpoint).architecture
        recipe = recipe_of(solution, bank, architecture, name=name, description="", calibration={})
        text = recipe_text(recipe, solution, bank)
        self.record(step=name, predicted_kl=round(solution.cost, 4), removed=solution.removed, text=text)
        return self.read(name, text)


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
