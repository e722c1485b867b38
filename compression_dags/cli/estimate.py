"""The line before a run: what it will take. It never fails a run, and costs a few hundredths of a second."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from compression_dags.assets.evaluation import eval_key
from compression_dags.estimate import Estimate, Model, Work, estimate, read_past
from compression_dags.evaluation.tasks import PerplexityTask, Task
from compression_dags.recipes.pipeline import steps_of
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.runner import stored_steps

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import Calibration
    from compression_dags.cli.run import Plan
    from compression_dags.definitions import Settings
    from compression_dags.provenance.artifacts import Artifact
    from compression_dags.step import Step

logger = logging.getLogger("compression_dags")
#: Characters a token, of a text whose tokenizer is not asked.
CHARACTERS = 3.5


def announce(foreseen: Callable[[], Estimate]) -> None:
    """Say what is to come; nothing if that cannot be known."""
    try:
        logger.info("%s", foreseen().line())
    except Exception:  # an estimate is a courtesy: whatever is odd here must not stop the run
        logger.debug("no estimate", exc_info=True)


def foresee(plan: Plan, base: Artifact) -> Estimate:
    """What the assets of all recipes of a plan will take, each artifact that several share counted once."""
    works: dict[str, Work] = {}
    context = base.size["context"]
    for recipe in plan.recipes:
        steps = steps_of(recipe)
        tasks = {eval_key(name): plan.planner.tasks[name] for name in plan.tasks[recipe.name]}
        for each in plan.planner.foreseen(recipe, plan.tasks[recipe.name], base, plan.source.slug):
            if step := steps.get(each.asset):
                work = _step(step, recipe.calibration, context, each.stored)
            elif task := tasks.get(each.asset):
                work = Work(each.asset, "evaluation", "", _text_tokens(task, context), each.stored)
            else:
                work = Work(each.asset, each.asset, stored=each.stored)
            works[each.fingerprint] = work
    return _sum(works.values(), base, plan.settings, plan.planner.accelerator)


def foresee_steps(steps: Iterable[Step], calibration: Calibration, base: Artifact, settings: Settings) -> Estimate:
    """What steps on a base model will take."""
    accelerator = Accelerator(home=str(settings.home), device=settings.device, dtype=settings.dtype)
    stored = stored_steps(ArtifactStore(home=str(settings.home)), steps, base, accelerator.numeric)
    works = [_step(step, calibration, base.size["context"], artifact is not None) for step, _, artifact in stored]
    return _sum(works, base, settings, accelerator)


def _sum(works: Iterable[Work], base: Artifact, settings: Settings, accelerator: Accelerator) -> Estimate:
    model, listed = Model(base.size["parameters"], base.size["layers"], base.size["bytes"]), list(works)
    missing = [work.kind for work in listed if not work.stored]
    past = read_past(settings.home, missing, accelerator.kind, model.parameters)
    return estimate(model, listed, accelerator.kind, past)


def _step(step: Step, calibration: Calibration, context: int, stored: bool) -> Work:
    reads = "calibration_tokens" in {step.name, *step.reads}
    tokens = calibration.sequences * min(calibration.length, context) if reads else 0
    return Work(step.name, step.kind or step.name, getattr(step.stage, "method", ""), tokens, stored)


def _text_tokens(task: Task, context: int) -> int:
    """Tokens of a perplexity task; of lm-eval's tasks some hundred thousand."""
    if not isinstance(task, PerplexityTask):
        return 200_000
    whole = int(task.path.stat().st_size / CHARACTERS)
    return min(whole, (task.max_windows or whole) * min(task.window, context))
