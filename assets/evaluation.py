"""`eval_<task>` and `samples`: what a compressed model is worth on each task, and what it writes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from compression_dags.assets.grid import COMPRESSED
from compression_dags.assets.partitions import GRID, Place
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.errors import InputError
from compression_dags.evaluation.samples import NEW_TOKENS, NO_TOKENIZER, PROMPTS
from compression_dags.evaluation.samples import VERSION as SAMPLES_VERSION
from compression_dags.evaluation.tasks import Task
from compression_dags.heartbeat import working_on
from compression_dags.provenance.artifacts import Artifact, Request, write_metrics
from compression_dags.provenance.escaping import markdown_code, markdown_line, markdown_text
from compression_dags.recipes import BASELINE, options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Evaluator, Session

SAMPLES = "samples"
FILE = "samples.json"
WRITING = {"prompts": list(PROMPTS), "new_tokens": NEW_TOKENS}


def eval_key(task: str) -> str:
    """The asset that holds the scores of a task."""
    return f"eval_{task}"


def evaluation_request(task: Task, weights: Artifact, data: str, numeric: Mapping[str, str]) -> Request:
    """What determines the scores of a task.

    Args:
        data: `Evaluator.data_digest` of the task.
    """
    inputs = {"weights": weights.digest, "data": data}
    return Request("evaluation", task.version, task.options(), inputs, dict(numeric))


def samples_request(weights: Artifact, numeric: Mapping[str, str]) -> Request:
    """What determines the continuations of the fixed prompts."""
    return Request("samples", SAMPLES_VERSION, WRITING, {"weights": weights.digest}, dict(numeric))


def evaluations(tasks: Sequence[Task]) -> dg.AssetsDefinition:
    """One asset a task, and `samples`: the model is loaded once for all that are selected, and not at all on hits."""
    specs = [
        dg.AssetSpec(
            eval_key(task.name),
            deps=[COMPRESSED],
            group_name="evaluation",
            kinds={"eval"},
            partitions_def=GRID,
            skippable=True,
            code_version=f"{task.version}:{options_digest(task.options())}",
            description=markdown_line(task.description) or f"lm-eval task {markdown_code(task.name)}.",
        )
        for task in tasks
    ]
    samples = dg.AssetSpec(
        SAMPLES,
        deps=[COMPRESSED],
        group_name="evaluation",
        kinds={"json"},
        partitions_def=GRID,
        skippable=True,
        code_version=f"{SAMPLES_VERSION}:{options_digest(WRITING)}",
        description=f"Greedy continuations of {len(PROMPTS)} fixed prompts, {NEW_TOKENS} tokens each.",
    )

    @dg.multi_asset(specs=[*specs, samples], name="evaluate_model", can_subset=True, partitions_def=GRID, pool=GPU_POOL)
    def evaluate_model(
        context: dg.AssetExecutionContext, store: ArtifactStore, accelerator: Accelerator, evaluator: Evaluator
    ) -> Iterator[dg.MaterializeResult]:
        here, selected = Place.of(context), {key.to_user_string() for key in context.selected_asset_keys}
        weights = store.recall(COMPRESSED, str(here))
        if weights is None:
            raise InputError(f"{COMPRESSED} of {here} is not in the store; materialize it first")
        wanted = [task for task in tasks if eval_key(task.name) in selected]
        digests = {task.name: evaluator.data_digest(task) for task in wanted}
        asked = {t.name: evaluation_request(t, weights, digests[t.name], accelerator.numeric) for t in wanted}
        writing = samples_request(weights, accelerator.numeric)
        missing = [t for t in wanted if store.find("evaluation", asked[t.name].fingerprint) is None]
        unwritten = SAMPLES in selected and store.find("samples", writing.fingerprint) is None

        def made(name: str, request: Request, build: Any) -> Any:
            with working_on(f"{name} {here}"):
                return store.produce(request, build, context.run_id)

        with evaluator.session(weights.checkpoint, missing, accelerator, generate=unwritten) as session:
            for task in wanted:
                name = eval_key(task.name)
                produced = made(name, asked[task.name], _scoring(session, task, here))
                yield publish(store, name, str(here), produced, recipe=weights.recipe)
            if SAMPLES in selected:
                produced = made(SAMPLES, writing, _generation(session))
                shown = _shown(produced.artifact)
                yield publish(store, SAMPLES, str(here), produced, recipe=weights.recipe, extra=shown)

    return evaluate_model


def _scoring(session: Session, task: Task, here: Place) -> Any:
    def build(work: Any) -> dict[str, float]:
        metrics = session.score(task, work.out)
        write_metrics(work.out, metrics)
        if here.recipe == BASELINE:
            session.guard(here.base_model, task, metrics)
        return metrics

    return build


def _generation(session: Session) -> Any:
    def build(work: Any) -> dict[str, str]:
        texts = session.samples()
        (work.out / FILE).write_text(json.dumps({"prompts": list(PROMPTS), "texts": texts}, indent=1))
        return {} if texts else {"note": NO_TOKENIZER}

    return build


def _shown(artifact: Artifact) -> Mapping[str, Any]:
    found = json.loads((artifact.path / FILE).read_text())
    texts = found["texts"] or []
    pairs = zip(found["prompts"], texts, strict=False)
    shown = [f"**{markdown_text(prompt)}** {markdown_text(text)}" for prompt, text in pairs]
    return {"texts": dg.MetadataValue.md("\n\n".join(shown))} if shown else {}
