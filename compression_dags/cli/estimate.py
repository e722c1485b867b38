"""The line before a run: what it will take. It never fails a run, and costs a few hundredths of a second."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from compression_dags.assets.evaluation import eval_key
from compression_dags.estimate import Estimate, Model, Work, estimate, read_past
from compression_dags.evaluation.tasks import PerplexityTask, Task
from compression_dags.recipes.pipeline import steps_of

if TYPE_CHECKING:
    from compression_dags.cli.run import Plan
    from compression_dags.provenance.artifacts import Artifact
    from compression_dags.recipes import Recipe

logger = logging.getLogger("compression_dags")
#: Characters a token, of a text whose tokenizer is not asked.
CHARACTERS = 3.5


def announce(plan: Plan, base: Artifact) -> None:
    """Say what computing a plan's missing assets will take; nothing if that cannot be known."""
    try:
        logger.info("%s", foresee(plan, base).line())
    except Exception:  # an estimate is a courtesy: whatever is odd here must not stop the run
        logger.debug("no estimate", exc_info=True)


def foresee(plan: Plan, base: Artifact) -> Estimate:
    """What the assets of all recipes of a plan will take, each artifact that several share counted once."""
    model = Model(base.size["parameters"], base.size["layers"], base.size["bytes"])
    works: dict[str, Work] = {}
    for recipe in plan.recipes:
        stored = plan.planner.stored(recipe, plan.tasks[recipe.name], base, plan.source.slug)
        for name, artifact in stored:
            work = _work(plan, recipe, name, base.size["context"], artifact is not None)
            works.setdefault(artifact.fingerprint if artifact else _shared(recipe, name), work)
    device = plan.planner.accelerator.kind
    missing = [work.kind for work in works.values() if not work.stored]
    return estimate(model, works.values(), device, read_past(plan.settings.home, missing, device, model.parameters))


def _shared(recipe: Recipe, name: str) -> str:
    """One name for equal artifacts that are not made yet: the shared analysis of a calibration set."""
    shared = name.startswith(("calibration_", "similarity_"))
    return f"{recipe.calibration.slug if shared else recipe.name}/{name}"


def _work(plan: Plan, recipe: Recipe, name: str, context: int, stored: bool) -> Work:
    steps = steps_of(recipe)
    if step := steps.get(name):
        reads = {name, *step.reads} & {"calibration_tokens"}
        tokens = recipe.calibration.sequences * min(recipe.calibration.length, context) if reads else 0
        return Work(name, step.kind or name, getattr(step.stage, "method", ""), tokens, stored)
    task = {eval_key(each): plan.planner.tasks[each] for each in plan.tasks[recipe.name]}.get(name)
    if task:
        return Work(name, "evaluation", "", _text_tokens(task, context), stored)
    return Work(name, name, "", 0, stored)


def _text_tokens(task: Task, context: int) -> int:
    """Tokens of a perplexity task; of lm-eval's tasks some hundred thousand."""
    if not isinstance(task, PerplexityTask):
        return 200_000
    whole = int(task.path.stat().st_size / CHARACTERS)
    return min(whole, (task.max_windows or whole) * min(task.window, context))
