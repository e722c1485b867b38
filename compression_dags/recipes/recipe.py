"""The value Recipe and what it derives. It imports neither Dagster nor torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from compression_dags.architectures import ModelShape
from compression_dags.calibration.corpora import Calibration, check_corpus, check_size
from compression_dags.depth.stage import MergeStage
from compression_dags.errors import InputError
from compression_dags.planning.bounds import check_bits
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.recipes.names import BASELINE, derived_name
from compression_dags.recovery.stage import RecoverStage
from compression_dags.sparsity.stage import SparsifyStage
from compression_dags.stage import Stage


@dataclass(frozen=True)
class Recipe:
    """One recipe, valid by construction.

    Attributes:
        name: lower-case words joined by hyphens, and after an `@` a changed calibration. `slug` has underscores.
        stages: at least one; only `BASELINE_RECIPE` has none.
        evaluate: tasks and suites; empty means the default suite of the model.
    """

    name: str
    description: str
    calibration: Calibration
    stages: tuple[Stage, ...]
    evaluate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.stages) == (self.name == BASELINE):
            raise ValueError(f"recipe {self.name}: only {BASELINE} has no stages")

    @property
    def slug(self) -> str:
        return self.name.replace("-", "_")

    def stage(self, kind: str) -> Stage | None:
        return next((s for s in self.stages if s.stage == kind), None)

    @property
    def merge(self) -> MergeStage | None:
        found = self.stage("merge")
        return found if isinstance(found, MergeStage) else None

    @property
    def recoveries(self) -> tuple[RecoverStage, ...]:
        """Recovery stages, in order: each works on the weights that the one before it left."""
        return tuple(s for s in self.stages if isinstance(s, RecoverStage))

    @property
    def sparsify(self) -> SparsifyStage | None:
        found = self.stage("sparsify")
        return found if isinstance(found, SparsifyStage) else None

    @property
    def sparsity_reads(self) -> tuple[str, ...]:
        """Shared analysis that the sparsity plan reads: see `SparsifyStage.plan_reads`."""
        return self.sparsify.plan_reads(merged=self.merge is not None) if self.sparsify else ()

    @property
    def reads_tokens(self) -> bool:
        """Whether any stage needs the calibration set."""
        merges = bool(self.merge and self.merge.analysis)
        prunes = bool(self.sparsify and (self.sparsify.reads_tokens or self.sparsity_reads))
        rounds = bool(self.quantize and (self.quantize.reads_tokens or self.quantize.bits))
        return merges or bool(self.recoveries) or prunes or rounds

    @property
    def quantize(self) -> QuantizeStage | None:
        found = self.stage("quantize")
        return found if isinstance(found, QuantizeStage) else None

    def check(self, shape: ModelShape) -> None:
        """Refuse what cannot work on a model, before any compute.

        Raises:
            InputError: beginning with the recipe's name.
        """
        try:
            for stage in self.stages:
                stage.check(self._before(stage, shape))
            if self.quantize and self.quantize.bits:
                check_bits(self.quantize, self._before(self.quantize, shape))
            self._check_texts()
            context = int(shape.config.get("max_position_embeddings") or self.calibration.length)
            sequences, length = self.calibration.sequences, min(self.calibration.length, context)
            if self.reads_tokens:
                check_size(self.calibration.corpus, sequences, length)
            for stage in self.stages:
                stage.check_tokens(shape, sequences, length)
        except InputError as error:
            raise InputError(f"recipe {self.name}: {error}") from None

    def with_calibration(self, sequences: int | None, length: int | None) -> Recipe:
        """The same recipe on a calibration set of another size, under a derived name such as `shortgpt-20@16x256`.

        It is this very recipe where nothing changes, and for the baseline, which reads no calibration set.

        Raises:
            InputError: a size that no calibration set may have.
        """
        asked = {k: v for k, v in (("sequences", sequences), ("length", length)) if v is not None}
        now = self.calibration.model_dump()
        if not self.stages or now == {**now, **asked}:
            return self
        try:
            changed = Calibration.model_validate({**now, **asked})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"recipe {self.name}: calibration.{where}: {first['input']}: {first['msg']}") from None
        name = derived_name(self.name, changed.sequences, changed.length)
        return replace(self, name=name, calibration=changed)

    def as_run(self) -> dict[str, Any]:
        """The recipe with its defaults and the versions of its methods: what handles of its assets keep."""
        versions = {name: version for stage in self.stages for name, version in stage.versions.items()}
        return {**self.describe(), "versions": versions}

    def _before(self, stage: Stage, shape: ModelShape) -> ModelShape:
        """Facts of the model that a stage changes: without the layers that were merged away, for all but recovery."""
        if self.merge is None or stage is self.merge or isinstance(stage, RecoverStage):
            return shape
        return shape.shortened(shape.layers - self.merge.removed(shape.layers))

    def check_texts(self) -> None:
        """Read every corpus that the recipe uses once, and refuse what is no text, before any compute.

        Raises:
            InputError: beginning with the recipe's name, with the file and its row.
        """
        try:
            self._check_texts()
        except InputError as error:
            raise InputError(f"recipe {self.name}: {error}") from None

    def _check_texts(self) -> None:
        if self.reads_tokens:
            check_corpus(self.calibration.corpus)
        for stage in self.stages:
            for corpus in getattr(stage, "corpora", ()):
                check_corpus(corpus)

    def describe(self) -> dict[str, Any]:
        """The recipe with every default written out, as it goes into `compression.json`."""
        return {
            "name": self.name,
            "description": self.description,
            "calibration": self.calibration.model_dump(mode="json"),
            "stages": [{s.stage: s.options()} for s in self.stages],
            "evaluate": list(self.evaluate),
        }


#: The uncompressed model, which all others are compared with.
BASELINE_RECIPE = Recipe(BASELINE, "The uncompressed model", Calibration.model_validate({}), ())


def options_digest(options: Mapping[str, Any]) -> str:
    """A short hash of a stage's options, the second half of an asset's code version."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
