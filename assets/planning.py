"""`alternatives`: what every layer of a base model could become, from which the planner solves a budget."""

from collections.abc import Iterable, Mapping

import dagster as dg

from compression_dags.assets.partitions import BASE_MODELS
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.calibration.corpora import Calibration
from compression_dags.errors import InputError
from compression_dags.heartbeat import working_on
from compression_dags.planning.options import CandidateOptions
from compression_dags.planning.steps import ALTERNATIVES, planning_steps
from compression_dags.provenance.artifacts import Artifact
from compression_dags.recipes import options_digest
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore
from compression_dags.resources.runner import produce
from compression_dags.step import BASE, Step


def alternatives_asset(calibration: Calibration, options: CandidateOptions) -> dg.AssetsDefinition:
    """The asset of one base model, with the calibration set and options that a plan asks for."""
    *before, step = planning_steps(calibration, options)

    @dg.asset(
        name=ALTERNATIVES,
        partitions_def=BASE_MODELS,
        group_name="planning",
        kinds={"json"},
        code_version=f"{step.version}:{options_digest(step.options)}",
        deps=[BASE],
        description="What every layer could become (a scheme for each group of projections, dropped, merged with the "
        "next), the bytes of each, and KL(base ‖ changed) on calibration text. `compression-dags plan` solves a budget "
        "from it in seconds.",
        pool=GPU_POOL,
    )
    def measured(
        context: dg.AssetExecutionContext, store: ArtifactStore, accelerator: Accelerator
    ) -> dg.MaterializeResult:
        here = context.partition_key
        base = store.recall(BASE, here)
        if base is None:
            raise InputError(f"{BASE} of {here} is not in the store; materialize it first")
        inputs = _inputs(store, accelerator, before, base, context.run_id)
        with working_on(f"{ALTERNATIVES} {here}"):
            produced = produce(store, accelerator, step, inputs, context.run_id)
        # a handle of each set of options: prune keeps all of them, and the calibration set that they hang on
        named = f"{here}|{calibration.slug}-{options_digest(step.options)}"
        for role, artifact in {**inputs, ALTERNATIVES: produced.artifact}.items():
            if role != BASE:
                store.remember(f"{ALTERNATIVES}.{role}", named, artifact)
        return publish(store, ALTERNATIVES, here, produced)

    return measured


def _inputs(
    store: ArtifactStore, accelerator: Accelerator, steps: Iterable[Step], base: Artifact, run_id: str
) -> Mapping[str, Artifact]:
    """The base model and its calibration set, made if it is not stored: no recipe of the grid asks for it."""
    found = {BASE: base}
    for each in steps:
        needs = {role: found[role] for role in each.reads}
        found[each.name] = produce(store, accelerator, each, needs, run_id).artifact
    return found
