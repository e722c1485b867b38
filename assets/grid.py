"""Every kind of artifact between a base model and its compressed model: one asset each, on the grid."""

from collections.abc import Mapping

import dagster as dg

from compression_dags.assets.partitions import GRID, Place
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.assets.recipe import at
from compression_dags.checkpoints.serving_lint import serving_fact
from compression_dags.depth.plan import VERSION as WRITER_VERSION
from compression_dags.errors import InputError, IntegrityError, naming_dtype
from compression_dags.heartbeat import working_on
from compression_dags.provenance.artifacts import Artifact
from compression_dags.recipes import Recipe
from compression_dags.recipes.kinds import ANALYSIS, TABLE, WEIGHTS_KINDS
from compression_dags.recipes.pipeline import last_weights, steps_of
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import RECIPE, ArtifactStore, Produced
from compression_dags.resources.runner import produce
from compression_dags.step import BASE, Kind, Step

COMPRESSED = "compressed_model"


def grid_assets() -> list[dg.AssetsDefinition]:
    """The assets of all steps, and `compressed_model`."""
    return [*(step_asset(kind, group) for group, kind in TABLE.values()), compressed_model]


def step_asset(kind: Kind, group: str) -> dg.AssetsDefinition:
    """The asset of the steps of one kind: it runs the step that the partition's recipe has."""
    name = kind.name

    @dg.asset(
        name=name,
        partitions_def=GRID,
        group_name=group,
        deps=[*kind.reads, *([RECIPE] if group != ANALYSIS or BASE in kind.reads else [])],
        kinds={"safetensors"} if kind.weights else {"parquet"} if name.endswith("_plan") else {"torch"},
        code_version=WRITER_VERSION if name == "merged_weights" else None,
        description=kind.about,
        pool=GPU_POOL if kind.gpu else None,
    )
    def materialize(
        context: dg.AssetExecutionContext, store: ArtifactStore, accelerator: Accelerator
    ) -> dg.MaterializeResult:
        here = Place.of(context)
        recipe = at(store, here.recipe)
        step = steps_of(recipe).get(name)
        if step is None:
            return _passed_on(recipe, name)
        inputs = read_inputs(store, step, here)
        try:
            with working_on(f"{name} {here}"):
                produced = produce(store, accelerator, step, inputs, context.run_id)
        except (InputError, IntegrityError) as error:
            raise naming_dtype(error, accelerator.compute_dtype if step.gpu else None) from error.__cause__
        return publish(store, name, str(here), produced, recipe=recipe.as_run(), extra=_method(step))

    return materialize


@dg.asset(
    name=COMPRESSED,
    partitions_def=GRID,
    group_name="results",
    deps=[BASE, RECIPE, *WEIGHTS_KINDS],
    kinds={"huggingface", "safetensors"},
    description="The recipe's last weights: the stock checkpoint that is scored and exported. It passed the reload "
    "gate when it was made.",
)
def compressed_model(context: dg.AssetExecutionContext, store: ArtifactStore) -> dg.MaterializeResult:
    here = Place.of(context)
    recipe = at(store, here.recipe)
    artifact = weights_of(store, recipe, here)
    certificate = {"serving": artifact.metadata.get("serving") or serving_fact(artifact.checkpoint)}
    produced = Produced(artifact, True, 0.0)
    return publish(store, COMPRESSED, str(here), produced, recipe=recipe.as_run(), extra=certificate)


def weights_of(store: ArtifactStore, recipe: Recipe, here: Place) -> Artifact:
    """The artifact with the weights that a recipe ends with.

    Raises:
        InputError: it is not in the store.
    """
    return _recalled(store, last_weights(recipe), here)


def read_inputs(store: ArtifactStore, step: Step, here: Place) -> Mapping[str, Artifact]:
    """Role → artifact of everything that a step reads.

    Raises:
        InputError: naming the first that is not in the store.
    """
    return {role: _recalled(store, source, here) for role, source in step.sources.items()}


def _recalled(store: ArtifactStore, name: str, here: Place) -> Artifact:
    partition = here.base_model if name == BASE else str(here)
    found = store.recall(name, partition)
    if found is None:
        raise InputError(f"{name} of {partition} is not in the store; materialize it first")
    return found


def _method(step: Step) -> dict[str, str]:
    method = getattr(step.stage, "method", None)
    return {"method": method} if method else {}


def _passed_on(recipe: Recipe, name: str) -> dg.MaterializeResult:
    """What Dagster is told where a recipe has no such step: its weights go on as they are."""
    said = f"recipe {recipe.name} has no such step; its weights are passed on as they are"
    return dg.MaterializeResult(asset_key=name, metadata={"passed_on": said}, data_version=dg.DataVersion("none"))
