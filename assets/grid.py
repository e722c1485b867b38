"""Every kind of artifact between a base model and its compressed model: one asset each, on the grid."""

from collections.abc import Mapping
from dataclasses import replace

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
from compression_dags.recipes.pipeline import last_weights, steps_of
from compression_dags.registry import stage_kinds
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import RECIPE, ArtifactStore, Produced
from compression_dags.resources.runner import produce
from compression_dags.similarity.steps import MEASURES, REDUNDANCY
from compression_dags.step import ANALYSIS, BASE, WEIGHTS, Kind, Step

COMPRESSED = "compressed_model"


def _analysis() -> dict[str, Kind]:
    """The shared analysis, of which only what a recipe's steps read is ever made."""
    tokens, activations = ANALYSIS
    found = [
        Kind(tokens, "The recipe's calibration set: exact counts of tokens, seeded.", (BASE,), gpu=False),
        Kind(
            activations,
            "One streamed pass over the calibration tokens: block influence, angular distances, hidden states of "
            "sampled tokens, channel norms of every projection input.",
            (BASE, tokens),
        ),
        *(Kind(f"similarity_{name}", about, (activations,), gpu=False) for name, about in MEASURES.items()),
        Kind(
            REDUNDANCY,
            "How much the inputs, outputs and gates of every two layers, and of every two modules, hold of each other "
            "(ALS): as printed, centred, and debiased.",
            (activations,),
            gpu=False,
        ),
    ]
    return {kind.name: kind for kind in found}


def _table() -> dict[str, tuple[str, Kind]]:
    """Asset → its group and kind, in pipeline order; the role `weights` is every asset that may have made them."""
    found = {name: ("analysis", kind) for name, kind in _analysis().items()}
    made: list[str] = []
    for stage, kinds in stage_kinds().items():
        for kind in kinds:
            reads = [n for role in kind.reads for n in ((BASE, *made) if role == WEIGHTS else (role,))]
            found[kind.name] = (stage, replace(kind, reads=tuple(dict.fromkeys(reads))))
            made += [kind.name] * kind.weights
    return found


TABLE = _table()
WEIGHTS_ASSETS = tuple(name for name, (_, kind) in TABLE.items() if kind.weights)
#: Assets that decide something, in pipeline order: `merged_weights` only applies a plan.
DECIDERS = tuple(name for name, (group, _) in TABLE.items() if group != "analysis" and name != "merged_weights")


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
        deps=[*kind.reads, *([RECIPE] if group != "analysis" or BASE in kind.reads else [])],
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
    deps=[BASE, RECIPE, *WEIGHTS_ASSETS],
    kinds={"huggingface", "safetensors"},
    description="The recipe's last weights: the stock checkpoint that is scored and exported. It passed the reload "
    "gate when it was made.",
)
def compressed_model(context: dg.AssetExecutionContext, store: ArtifactStore) -> dg.MaterializeResult:
    here = Place.of(context)
    recipe = at(store, here.recipe)
    artifact = weights_of(store, recipe, here)
    certificate = {"serving": artifact.facts.get("serving") or serving_fact(artifact.checkpoint)}
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
