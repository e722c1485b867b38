"""`eval_<task>` and `samples`: what a compressed model is worth on each task, and what it writes."""

from collections.abc import Iterator, Sequence

import dagster as dg

from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import GRID, Place
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.errors import InputError
from compression_dags.evaluation.samples import NEW_TOKENS, PROMPTS, as_markdown
from compression_dags.evaluation.samples import VERSION as SAMPLES_VERSION
from compression_dags.evaluation.tasks import Task
from compression_dags.provenance.escaping import markdown_code, markdown_line
from compression_dags.recipes import BASELINE, options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Evaluator
from compression_dags.resources.scoring import WRITING, scored

SAMPLES = "samples"


def eval_key(task: str) -> str:
    """The asset that holds the scores of a task."""
    return f"eval_{task}"


def evaluations(tasks: Sequence[Task]) -> dg.AssetsDefinition:
    """One asset a task, and `samples`: the model is loaded once for all that are selected, and not at all on hits."""
    specs = [
        _spec(
            eval_key(task.name),
            "eval",
            f"{task.version}:{options_digest(task.options())}",
            markdown_line(task.description) or f"lm-eval task {markdown_code(task.name)}.",
        )
        for task in tasks
    ]
    samples = _spec(
        SAMPLES,
        "json",
        f"{SAMPLES_VERSION}:{options_digest(WRITING)}",
        f"Greedy continuations of {len(PROMPTS)} fixed prompts, {NEW_TOKENS} tokens each.",
    )

    @dg.multi_asset(specs=[*specs, samples], name="evaluate_model", can_subset=True, partitions_def=GRID, pool=GPU_POOL)
    def evaluate_model(
        context: dg.AssetExecutionContext, store: ArtifactStore, accelerator: Accelerator, evaluator: Evaluator
    ) -> Iterator[dg.MaterializeResult]:
        here, selected = Place.of(context), {key.to_user_string() for key in context.selected_asset_keys}
        weights = store.recall(COMPRESSED, str(here))
        if weights is None:
            raise InputError(f"{COMPRESSED} of {here} is not in the store; materialize it first")
        for task, produced in scored(
            store,
            accelerator,
            evaluator,
            weights,
            [task for task in tasks if eval_key(task.name) in selected],
            samples=SAMPLES in selected,
            dense=here.base_model if here.recipe == BASELINE else None,
            label=lambda task: f"{_asset_of(task)} {here}",
            run_id=context.run_id,
        ):
            text = "" if task else as_markdown(produced.artifact.path)
            shown = {"texts": dg.MetadataValue.md(text)} if text else {}
            yield publish(store, _asset_of(task), str(here), produced, recipe=weights.recipe, extra=shown)

    return evaluate_model


def _asset_of(task: Task | None) -> str:
    """The asset that holds the scores of a task, or (None) the samples."""
    return eval_key(task.name) if task else SAMPLES


def _spec(name: str, kind: str, version: str, description: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        name,
        deps=[COMPRESSED],
        group_name="evaluation",
        kinds={kind},
        partitions_def=GRID,
        skippable=True,
        code_version=version,
        description=description,
    )
