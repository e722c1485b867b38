"""Scores a checkpoint against the store: what is stored is found, and for the rest the model is loaded once."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from compression_dags.evaluation.samples import NEW_TOKENS, NO_TOKENIZER, PROMPTS, WRITTEN
from compression_dags.evaluation.samples import VERSION as SAMPLES_VERSION
from compression_dags.evaluation.tasks import Task
from compression_dags.heartbeat import working_on
from compression_dags.provenance.artifacts import Artifact, Request, write_metrics
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore, Produced, Workplace
from compression_dags.resources.evaluator import Evaluator, Session

#: What the continuations hang on beside the weights.
WRITING = {"prompts": list(PROMPTS), "new_tokens": NEW_TOKENS}


def evaluation_request(task: Task, weights: str, data: str, numeric: Mapping[str, str]) -> Request:
    """What determines the scores of a task.

    Args:
        weights: their digest.
        data: `Evaluator.data_digest` of the task.
    """
    inputs = {"weights": weights, "data": data}
    return Request("evaluation", task.version, task.options(), inputs, dict(numeric))


def samples_request(weights: str, numeric: Mapping[str, str]) -> Request:
    """What determines the continuations of the fixed prompts, after the digest of the weights."""
    return Request("samples", SAMPLES_VERSION, WRITING, {"weights": weights}, dict(numeric))


def scored(
    store: ArtifactStore,
    accelerator: Accelerator,
    evaluator: Evaluator,
    weights: Artifact,
    tasks: Sequence[Task],
    *,
    samples: bool = False,
    dense: str | None = None,
    label: Callable[[Task | None], str],
    run_id: str = "",
) -> Iterator[tuple[Task | None, Produced]]:
    """Every task with the artifact of its scores, then None with that of the samples.

    Args:
        weights: whose checkpoint is scored.
        samples: whether the continuations are asked for.
        dense: the base model's name where `weights` are the uncompressed ones, which have known values.
        label: what progress lines call a task's scores, or (None) the samples.
    """
    numeric = accelerator.numeric
    asked = [(task, evaluation_request(task, weights.digest, evaluator.data_digest(task), numeric)) for task in tasks]
    writing = samples_request(weights.digest, numeric)
    missing = [task for task, request in asked if store.find(request.kind, request.fingerprint) is None]
    unwritten = samples and store.find(writing.kind, writing.fingerprint) is None
    with evaluator.session(weights.checkpoint, missing, accelerator, generate=unwritten) as session:
        for task, request in asked:
            with working_on(label(task)):
                produced = store.produce(request, _scoring(session, task, dense), run_id)
            yield task, produced
        if samples:
            with working_on(label(None)):
                produced = store.produce(writing, _generation(session), run_id)
            yield None, produced


def _scoring(session: Session, task: Task, dense: str | None) -> Callable[[Workplace], dict[str, Any]]:
    def build(work: Workplace) -> dict[str, Any]:
        metrics = session.score(task, work.out)
        write_metrics(work.out, metrics)
        if dense:
            session.guard(dense, task, metrics)
        return dict(metrics)

    return build


def _generation(session: Session) -> Callable[[Workplace], dict[str, Any]]:
    def build(work: Workplace) -> dict[str, Any]:
        texts = session.samples()
        (work.out / WRITTEN).write_text(json.dumps({"prompts": list(PROMPTS), "texts": texts}, indent=1))
        return {} if texts else {"note": NO_TOKENIZER}

    return build
