"""A recipe as the steps that it takes, in order: shared analysis, its stages, each reading what came before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compression_dags.calibration.steps import calibration_steps
from compression_dags.planning.steps import quantization_plan
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.similarity.steps import similarity_steps
from compression_dags.step import BASE, Chain, Step

if TYPE_CHECKING:
    from compression_dags.recipes import Recipe

#: Similarities that the report shows of every recipe which merges by calibration data.
SHOWN = ("similarity_block_influence", "similarity_angular")


def steps_of(recipe: Recipe) -> dict[str, Step]:
    """Name → step of everything that the recipe needs, in an order in which it can be made."""
    shared = {step.name: step for step in (*calibration_steps(recipe.calibration), *similarity_steps())}
    own = _stage_steps(recipe)
    wanted = {role for step in own for role in step.reads}
    if recipe.merge and recipe.merge.analysis:
        wanted |= {"calibration_tokens", *SHOWN}
    for step in reversed(shared.values()):
        wanted |= set(step.reads) if step.name in wanted else set()
    return {step.name: step for step in (*(s for name, s in shared.items() if name in wanted), *own)}


def last_weights(recipe: Recipe) -> str:
    """Name of the step whose weights the recipe ends with; `base_model` without stages."""
    return next((step.name for step in reversed(_stage_steps(recipe)) if step.weights), BASE)


def _stage_steps(recipe: Recipe) -> list[Step]:
    found: list[Step] = []
    before, chain = BASE, Chain(recipe.calibration)
    for stage in recipe.stages:
        planned = (quantization_plan(stage),) if isinstance(stage, QuantizeStage) and stage.bits else ()
        steps = [replace(step, before=before) for step in (*planned, *stage.steps(chain))]
        found += steps
        before = next((step.name for step in reversed(steps) if step.weights), before)
        merged, recovered = stage.stage == "merge", stage.stage == "recover"
        chain = replace(chain, merged=chain.merged or merged, recoveries=chain.recoveries + recovered)
    return found
