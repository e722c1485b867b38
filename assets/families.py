"""A recipe (or the baseline) as a family of assets, wired stage by stage to the weights before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg

from compression_dags.assets.base_models import base_model
from compression_dags.assets.calibration import SIMILARITIES, calibration_key
from compression_dags.assets.evaluation import build_evaluations, build_scorecard, eval_key, samples_key
from compression_dags.assets.merging import (
    build_merge_plan,
    build_merged_weights,
    build_recovered_weights,
    recipe_key,
    recovered_key,
)
from compression_dags.assets.quantization import build_quantization_plan, build_quantized_weights
from compression_dags.assets.sparsity import build_sparse_weights, build_sparsity_plan
from compression_dags.evaluation.tasks import Task
from compression_dags.recipes import BASELINE, Recipe


@dataclass(frozen=True)
class Family:
    """The assets of one recipe, and which shared ones it needs.

    Attributes:
        name, slug: the recipe's name and its asset key prefix.
        assets: definitions, in order.
        stages: keys of the stage assets, in pipeline order.
        shared: keys of shared assets upstream.
        weights: key of the last weights.
        tasks: task name → key.
    """

    name: str
    slug: str
    assets: list[dg.AssetsDefinition]
    stages: list[dg.AssetKey]
    shared: list[dg.AssetKey]
    weights: dg.AssetKey
    tasks: dict[str, dg.AssetKey]

    @property
    def scorecard(self) -> dg.AssetKey:
        return dg.AssetKey([self.slug, "scorecard"])

    @property
    def samples(self) -> dg.AssetKey:
        return samples_key(self.slug)

    def keys(self, tasks: Sequence[str]) -> list[dg.AssetKey]:
        """Everything to materialize for a run that scores `tasks`, and lets the model write."""
        return [*self.shared, *self.stages, *(self.tasks[t] for t in tasks), self.samples, self.scorecard]


def build_baseline(tasks: Sequence[Task]) -> Family:
    """The uncompressed model under the same evaluations."""
    return _evaluated(BASELINE, BASELINE, [], [], [base_model.key], base_model.key, tasks)


def build_recipe_family(recipe: Recipe, tasks: Sequence[Task]) -> Family:
    assets: list[dg.AssetsDefinition] = []
    stages: list[dg.AssetKey] = []
    weights = base_model.key
    shared = [base_model.key]
    if recipe.merge:
        assets += [build_merge_plan(recipe), build_merged_weights(recipe)]
        stages += [recipe_key(recipe, "merge_plan"), recipe_key(recipe, "merged_weights")]
        weights = stages[-1]
        if recipe.merge.analysis:
            similarities = [n for n in SIMILARITIES if n in {"block_influence", "angular", *recipe.merge.needs}]
            names = ("calibration_tokens", "calibration_activations", *(f"similarity_{n}" for n in similarities))
            shared += [calibration_key(recipe.calibration, name) for name in names]
    for index in range(len(recipe.recoveries)):
        assets.append(build_recovered_weights(recipe, index, weights))
        weights = recovered_key(recipe, index)
        stages.append(weights)
        shared.append(calibration_key(recipe.calibration, "calibration_tokens"))
    if recipe.sparsify:
        assets += [build_sparsity_plan(recipe, weights), build_sparse_weights(recipe, weights)]
        stages += [recipe_key(recipe, "sparsity_plan"), recipe_key(recipe, "sparse_weights")]
        weights = stages[-1]
        shared += _analysis(recipe)
    if recipe.quantize:
        if recipe.quantize.bits:
            assets.append(build_quantization_plan(recipe, weights))
            stages.append(recipe_key(recipe, "quantization_plan"))
        assets.append(build_quantized_weights(recipe, weights))
        if recipe.quantize.reads_tokens or recipe.quantize.bits:
            shared.append(calibration_key(recipe.calibration, "calibration_tokens"))
        weights = recipe_key(recipe, "quantized_weights")
        stages.append(weights)
    return _evaluated(recipe.name, recipe.slug, assets, stages, list(dict.fromkeys(shared)), weights, tasks)


def _analysis(recipe: Recipe) -> list[dg.AssetKey]:
    """Shared assets upstream of the sparsity stage, in order."""
    assert recipe.sparsify is not None
    names = list(recipe.sparsity_reads)
    if any(name != "calibration_tokens" for name in names):
        names = ["calibration_tokens", "calibration_activations", *names]
    names += ["calibration_tokens"] * recipe.sparsify.reads_tokens
    return [calibration_key(recipe.calibration, name) for name in dict.fromkeys(names)]


def _evaluated(
    name: str,
    slug: str,
    assets: list[dg.AssetsDefinition],
    stages: list[dg.AssetKey],
    shared: list[dg.AssetKey],
    weights: dg.AssetKey,
    tasks: Sequence[Task],
) -> Family:
    assets = [*assets, build_evaluations(slug, weights, tasks), build_scorecard(slug, weights, tasks)]
    return Family(name, slug, assets, stages, shared, weights, {t.name: eval_key(slug, t.name) for t in tasks})
