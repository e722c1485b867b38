"""Every kind of artifact between a base model and its compressed model: one asset each, on the grid."""

from collections.abc import Mapping, Sequence

import dagster as dg

from compression_dags.assets.partitions import GRID, Place
from compression_dags.assets.publishing import GPU_POOL, publish
from compression_dags.assets.recipe import at
from compression_dags.checkpoints.serving_lint import serving_fact
from compression_dags.depth.plan import WRITER_VERSION
from compression_dags.errors import InputError, IntegrityError, naming_dtype
from compression_dags.heartbeat import working_on
from compression_dags.provenance.artifacts import Artifact
from compression_dags.recipes import Recipe
from compression_dags.recipes.pipeline import last_weights, steps_of
from compression_dags.recovery.stage import MOST_RECOVERIES, recovered_name
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import RECIPE, ArtifactStore, Produced
from compression_dags.resources.runner import produce
from compression_dags.similarity.steps import MEASURES, REDUNDANCY
from compression_dags.step import BASE, Step

RECOVERIES = tuple(map(recovered_name, range(MOST_RECOVERIES)))
COMPRESSED = "compressed_model"
_TOKENS, _PASS = "calibration_tokens", "calibration_activations"
_SIMILAR = tuple(f"similarity_{name}" for name in MEASURES)
_MERGED, _SPARSE = ("merged_weights", *RECOVERIES), ("merged_weights", *RECOVERIES, "sparse_weights")
WEIGHTS_ASSETS = (*_SPARSE, "quantized_weights")
#: Asset → group, what it may read (which recipe reads what, its steps say), and what it is.
TABLE: dict[str, tuple[str, tuple[str, ...], str]] = {
    _TOKENS: ("analysis", (BASE, RECIPE), "The recipe's calibration set: exact counts of tokens, seeded."),
    _PASS: (
        "analysis",
        (BASE, RECIPE, _TOKENS),
        "One streamed pass over the calibration tokens: block influence, angular distances, hidden states of sampled "
        "tokens, channel norms of every projection input.",
    ),
    **{f"similarity_{name}": ("analysis", (_PASS,), about) for name, about in MEASURES.items()},
    REDUNDANCY: (
        "analysis",
        (_PASS,),
        "How much the inputs, outputs and gates of every two layers, and of every two modules, hold of each other "
        "(ALS): as printed, centred, and debiased.",
    ),
    "merge_plan": ("depth", (BASE, RECIPE, _TOKENS, _PASS, *_SIMILAR), "Which layers stay, and how others go."),
    "merged_weights": (
        "depth",
        (BASE, "merge_plan"),
        "The plan applied: layers renumbered, per-layer config remapped, reload gate passed.",
    ),
    **{
        name: (
            "depth",
            (BASE, RECIPE, _TOKENS, "merge_plan", "merged_weights", *RECOVERIES[:index]),
            f"The model after recovery {index + 1} of its recipe, or as it was if nothing helped.",
        )
        for index, name in enumerate(RECOVERIES)
    },
    "sparsity_plan": (
        "sparsity",
        (BASE, RECIPE, _TOKENS, _PASS, REDUNDANCY, *_MERGED),
        "The share of zeros, or the pattern, of every projection.",
    ),
    "sparse_weights": (
        "sparsity",
        (BASE, RECIPE, _TOKENS, "sparsity_plan", *_MERGED),
        "The pruned model, its packed masks beside it, reload gate passed.",
    ),
    "quantization_plan": (
        "quantization",
        (BASE, RECIPE, _TOKENS, *_SPARSE),
        "A scheme for every group of projections, where a recipe asks for bits a weight on average.",
    ),
    "quantized_weights": (
        "quantization",
        (BASE, RECIPE, _TOKENS, "quantization_plan", *_SPARSE),
        "The model rounded onto a compressed-tensors scheme, reload gate passed.",
    ),
}


def grid_assets() -> list[dg.AssetsDefinition]:
    """The assets of all steps, and `compressed_model`."""
    return [*(step_asset(name, *said) for name, said in TABLE.items()), compressed_model]


def step_asset(name: str, group: str, reads: Sequence[str], about: str) -> dg.AssetsDefinition:
    """The asset of the steps of one name: it runs the step that the partition's recipe has."""

    @dg.asset(
        name=name,
        partitions_def=GRID,
        group_name=group,
        deps=list(reads),
        kinds={"safetensors"} if name.endswith("_weights") else {"parquet"} if name.endswith("_plan") else {"torch"},
        code_version=WRITER_VERSION if name == "merged_weights" else None,
        description=about,
        pool=GPU_POOL,
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
