"""`eval_<task>` and `scorecard` of one family: a recipe, or the uncompressed baseline."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from compression_dags.assets.base_models import base_model, base_models
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.evaluation.samples import NEW_TOKENS, NO_TOKENIZER, PROMPTS
from compression_dags.evaluation.samples import VERSION as SAMPLES_VERSION
from compression_dags.evaluation.tasks import Task
from compression_dags.provenance.artifacts import Artifact, Request, write_metrics
from compression_dags.provenance.escaping import markdown_code, markdown_line, markdown_text
from compression_dags.recipes import BASELINE, options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.evaluator import Evaluator

SAMPLES = "samples.json"
#: 2: with samples. 3: scores and sizes from files that digests cover; names the weights it is about.
CARD_VERSION = "3"


def eval_key(family: str, task: str) -> dg.AssetKey:
    return dg.AssetKey([family, f"eval_{task}"])


def samples_key(family: str) -> dg.AssetKey:
    return dg.AssetKey([family, "samples"])


def build_evaluations(family: str, weights_key: dg.AssetKey, tasks: Sequence[Task]) -> dg.AssetsDefinition:
    """One subsettable multi-asset: the model is loaded once, whatever tasks are selected, and not at all on hits."""
    options = {"prompts": list(PROMPTS), "new_tokens": NEW_TOKENS}
    specs = [
        dg.AssetSpec(
            eval_key(family, task.name),
            deps=[weights_key],
            group_name=family,
            kinds={"eval"},
            partitions_def=base_models,
            skippable=True,
            code_version=f"{task.version}:{options_digest(task.options())}",
            description=markdown_line(task.description) or f"lm-eval task {markdown_code(task.name)}.",
        )
        for task in tasks
    ]
    samples = dg.AssetSpec(
        samples_key(family),
        deps=[weights_key],
        group_name=family,
        kinds={"json"},
        partitions_def=base_models,
        skippable=True,
        code_version=f"{SAMPLES_VERSION}:{options_digest(options)}",
        description=f"Greedy continuations of {len(PROMPTS)} fixed prompts, {NEW_TOKENS} tokens each.",
    )

    @dg.multi_asset(
        specs=[*specs, samples], name=f"{family}__evaluate", can_subset=True, partitions_def=base_models, pool=GPU_POOL
    )
    def evaluate(
        context: dg.AssetExecutionContext, store: ArtifactStore, accelerator: Accelerator, evaluator: Evaluator
    ) -> Iterator[dg.MaterializeResult]:
        weights = store.recall(weights_key, context.partition_key)
        if weights is None:
            raise dg.Failure(f"{weights_key.to_user_string()} of {context.partition_key} is not in the store")
        wanted = [t for t in tasks if eval_key(family, t.name) in context.selected_asset_keys]
        requests = {
            task.name: Request(
                "evaluation",
                task.version,
                task.options(),
                {"weights": weights.digest, "data": evaluator.data_digest(task)},
                accelerator.numeric,
            )
            for task in wanted
        }
        missing = [t for t in wanted if store.find("evaluation", requests[t.name].fingerprint) is None]
        writing = Request("samples", SAMPLES_VERSION, options, {"weights": weights.digest}, accelerator.numeric)
        chosen = samples.key in context.selected_asset_keys
        unwritten = chosen and store.find("samples", writing.fingerprint) is None

        def materialize(key: dg.AssetKey, request: Request, build, extra=None) -> dg.MaterializeResult:
            out = publish(context, store, request, build, key=key, extra=extra)
            store.remember(key, context.partition_key, out.value)
            return dg.MaterializeResult(asset_key=key, metadata=out.metadata, data_version=out.data_version)

        with evaluator.session(weights.checkpoint, missing, accelerator, generate=unwritten) as session:
            for task in wanted:

                def score(work, task=task):
                    metrics = session.score(task, work.out)
                    write_metrics(work.out, metrics)
                    if family == BASELINE:
                        session.guard(context.partition_key, task, metrics)
                    return metrics

                yield materialize(eval_key(family, task.name), requests[task.name], score)
            if chosen:

                def write(work):
                    texts = session.samples()
                    (work.out / SAMPLES).write_text(json.dumps({"prompts": list(PROMPTS), "texts": texts}, indent=1))
                    return {} if texts else {"note": NO_TOKENIZER}

                yield materialize(samples.key, writing, write, _shown_samples)

    return evaluate


def _shown_samples(artifact: Artifact) -> Mapping[str, Any]:
    found = json.loads((artifact.path / SAMPLES).read_text())
    texts = found["texts"] or []
    pairs = zip(found["prompts"], texts, strict=False)
    shown = [f"**{markdown_text(prompt)}** {markdown_text(text)}" for prompt, text in pairs]
    return {"samples": dg.MetadataValue.md("\n\n".join(shown))} if shown else {}


def build_scorecard(family: str, weights_key: dg.AssetKey, tasks: Sequence[Task]) -> dg.AssetsDefinition:
    """Size and scores of one family against the baseline."""
    reference = dg.AssetKey([BASELINE, "scorecard"])
    deps = [weights_key, *(eval_key(family, t.name) for t in tasks), samples_key(family)]
    deps += [reference] if family != BASELINE else []

    @dg.asset(
        key=dg.AssetKey([family, "scorecard"]),
        partitions_def=base_models,
        group_name=family,
        kinds={"json"},
        code_version=CARD_VERSION,
        ins={"base": dg.AssetIn(base_model.key)},
        deps=[d for d in deps if d != base_model.key],
        description="Layers, parameters, bytes and every score, with the change against the uncompressed model; what "
        "both write.",
    )
    def scorecard(context: dg.AssetExecutionContext, store: ArtifactStore, base: Artifact) -> dg.Output[Artifact]:
        here = context.partition_key
        weights = store.recall(weights_key, here) or base
        scores = {task.name: store.recall(eval_key(family, task.name), here) for task in tasks}
        # a task that was not selected may still hold the score of older weights: it does not count
        scores = {n: a for n, a in scores.items() if a and a.inputs["weights"] == weights.digest}
        written = store.recall(samples_key(family), here)
        written = written if written and written.inputs["weights"] == weights.digest else None
        dense = store.recall(reference, here) if family != BASELINE else None
        inputs = {"weights": weights.digest, "base_model": base.digest} | {n: a.digest for n, a in scores.items()}
        if dense:
            inputs["baseline"] = dense.digest
        if written:
            inputs["samples"] = written.digest

        def build(work):
            from compression_dags.reports.scorecard import make_scorecard

            baseline = json.loads((dense.path / "scorecard.json").read_text()) if dense else None
            samples = json.loads((written.path / SAMPLES).read_text()) if written else None
            metrics = {name: artifact.metrics for name, artifact in scores.items()}
            card = make_scorecard(family, weights.size, base.size, metrics, baseline, samples)
            card["weights"] = made_of["weights"]
            (work.out / "scorecard.json").write_text(json.dumps(card, indent=1, sort_keys=True))
            return {"layers": card["layers"], "parameters": card["parameters"], "bytes": card["bytes"], **card["flat"]}

        made_of = {"family": family, "weights": {"kind": weights.kind, "fingerprint": weights.fingerprint}}
        request = Request("scorecard", CARD_VERSION, made_of, inputs)
        return publish(context, store, request, build, recipe=weights.recipe)

    return scorecard
