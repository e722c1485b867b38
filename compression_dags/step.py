"""Steps: what a recipe computes, one artifact each. Declared by stages, run by workers, without Dagster and torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compression_dags.calibration.corpora import Calibration
    from compression_dags.job import Job

#: Role of the weights that a recipe has made so far; before its first stage they are the base model's.
WEIGHTS = "weights"
BASE = "base_model"
#: What every method may read of the calibration set and the base model's one pass over it.
ANALYSIS = ("calibration_tokens", "calibration_activations")
SIMILARITIES = ("similarity_block_influence", "similarity_angular", "similarity_npib", "similarity_cka")


def worker(name: str) -> Callable[..., Any]:
    """What `module:name` names, imported only now: options are read without torch, workers import it."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Step:
    """One artifact of a recipe: what determines it, what it reads, and who makes it.

    Attributes:
        name: of the asset, `merge_plan`.
        version: of the code, as it enters the fingerprint.
        options: canonical JSON values, defaults written out; they enter the fingerprint.
        reads: roles of its inputs: names of other steps, `base_model`, or `weights` (those made so far).
        worker: `module:function`, called with a `Job`; it writes into `job.out` and returns metadata for display.
        stage: the recipe's stage that asks for the step; None of shared analysis.
        kind: of the artifact in the store; by default the step's name.
        gpu: whether it computes on the accelerator; then device type and dtype enter the fingerprint.
        weights: whether the recipe's weights are this step's from here on.
        data: digests of what it reads beside artifacts (corpora), by role.
        before: name of the step, or `base_model`, that made the weights so far.
    """

    name: str
    version: str
    options: Mapping[str, Any]
    reads: tuple[str, ...]
    worker: str
    stage: Any = None
    kind: str = ""
    gpu: bool = True
    weights: bool = False
    data: Callable[[], Mapping[str, str]] = field(default=dict, compare=False)
    before: str = BASE

    @property
    def sources(self) -> dict[str, str]:
        """Role → name of the step (or `base_model`) whose artifact has it."""
        return {role: self.before if role == WEIGHTS else role for role in self.reads}

    def run(self, job: Job) -> dict[str, Any]:
        """Metadata for display, after the worker has written the artifact."""
        return worker(self.worker)(job)


@dataclass(frozen=True)
class Kind:
    """A kind of artifact that a stage makes: one asset, whatever the number of recipes.

    Attributes:
        name: of the asset and of its steps.
        about: what it is, for people.
        reads: every role that a step of this kind may read; which a recipe's step reads, it says itself.
        weights: whether it holds the recipe's weights.
        gpu: whether steps of this kind may compute on the accelerator.
        picture: `module:name` of what draws a stored artifact (its folder → PNG bytes) where it stores no picture.
    """

    name: str
    about: str
    reads: tuple[str, ...]
    weights: bool = False
    gpu: bool = True
    picture: str = ""


@dataclass(frozen=True)
class Chain:
    """What a stage knows of the recipe around it when it declares its steps.

    Attributes:
        calibration: of the recipe.
        merged: whether a merge comes before.
        recoveries: how many recoveries come before.
    """

    calibration: Calibration
    merged: bool = False
    recoveries: int = 0
