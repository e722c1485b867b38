"""What all quantizers share: which matrices get which scheme, and the checks.

A method names who rounds one matrix, or matrices that share an input; packing and writing are `packing.py`'s, the
formats `formats.py`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compression_dags.architectures import ModelShape
from compression_dags.architectures.uniformity import refuse_unlike
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.options import Options
from compression_dags.quantization.formats import FREE, Choice, Format, Scheme
from compression_dags.quantization.schemes import (
    check_together,
    input_dimensions,
    inputs_by_layer,
    matches,
    refuse_unroundable,
)
from compression_dags.stage import Progress, Stage, StatisticKind, Target, implementation, silent
from compression_dags.step import WEIGHTS, Chain, Kind, Step, worker

if TYPE_CHECKING:
    import torch

    from compression_dags.calibration.corpora import TokenBlocks
    from compression_dags.passes.input_sums import InputSums
    from compression_dags.provenance.resume import ResumePoint
    from compression_dags.quantization.results import QuantizedModel, Rounding
    from compression_dags.quantization.rounding_pass import RoundedGroup
    from compression_dags.quantization.smoothing import Fold
    from compression_dags.solvers.rounding import Rounded


class Override(Options):
    """A scheme of some matrices' own."""

    scheme: Scheme
    group_size: int | None = Field(None, gt=0)
    symmetric: bool = True

    @property
    def choice(self) -> Choice:
        return Choice.of(self.scheme, self.group_size, self.symmetric)

    @model_validator(mode="after")
    def _allowed_by_scheme(self) -> Override:
        assert self.choice
        return self


class QuantizeStage(Stage):
    """Common options of the quantizers.

    `implementation` rounds one matrix, or where the method names a `statistic`, the matrices that read one input.
    """

    stage: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[Kind, ...]] = (
        Kind(
            "quantization_plan",
            "A scheme for every group of projections, where a recipe asks for bits a weight on average.",
            (WEIGHTS, "calibration_tokens"),
        ),
        Kind(
            "quantized_weights",
            "The model rounded onto a compressed-tensors scheme, reload gate passed.",
            (WEIGHTS, "calibration_tokens", "quantization_plan"),
            weights=True,
        ),
    )
    statistic: ClassVar[StatisticKind] = "none"
    method: str

    scheme: Scheme = Field(description="bits and kind of weights (W) and activations (A)")
    group_size: int | None = Field(None, gt=0, description=f"inputs sharing a scale; for {FREE}; default: the scheme's")
    symmetric: bool = Field(True, description=f"false adds zero points; for {FREE}")
    ignore: tuple[str, ...] = Field(("lm_head",), description="modules kept as they are: names, or re:<pattern>")
    overrides: dict[str, Override] = Field(
        {}, description="schemes of some modules' own, by name or re:<pattern>; the first that matches counts"
    )
    fallback: Literal["smaller", "refuse"] = Field(
        "smaller",
        description="where a group size does not divide a matrix: the largest that does, or the matrix stays as it is "
        "(the ledger says so); or stop",
    )

    bits: float | None = Field(
        None, gt=1, lt=16, description="average stored bits a weight: schemes are then chosen by measured sensitivity"
    )
    candidates: tuple[Scheme, ...] = Field(("W3A16", "W8A16"), description="what `bits` may use beside `scheme`")

    @model_validator(mode="after")
    def _allowed_by_scheme(self) -> QuantizeStage:
        assert self.choice
        if self.bits is not None and self.overrides:
            raise InputError("bits and overrides: give one; bits chooses every scheme itself")
        if self.bits is not None:
            check_together({f"candidate {name}": Choice.of(name) for name in (self.scheme, *self.candidates)})
        return self

    def steps(self, chain: Chain) -> tuple[Step, ...]:
        """`quantized_weights`; with `bits` it reads a `quantization_plan`, which the planner declares."""
        tokens = ("calibration_tokens",) if self.reads_tokens else ()
        plan = ("quantization_plan",) if self.bits else ()
        return (
            Step(
                "quantized_weights",
                self.code_version,
                self.options(),
                (WEIGHTS, *tokens, *plan),
                "compression_dags.quantization.workers:quantize",
                self,
                weights=True,
            ),
        )

    @property
    def choice(self) -> Choice:
        """What a matrix gets that no override names and that it fits."""
        return Choice.of(self.scheme, self.group_size, self.symmetric)

    @property
    def format(self) -> Format:
        return self.choice.format

    def asked(self, module: str) -> Choice:
        entry = self.override_of(module)
        return self.choice if entry is None else self.overrides[entry].choice

    def override_of(self, module: str) -> str | None:
        """The entry of `overrides` that decides for a module."""
        return next((entry for entry in self.overrides if matches(entry, module)), None)

    def ignored_by(self, module: str) -> str | None:
        """The entry of `ignore` that names a module."""
        return next((entry for entry in self.ignore if matches(entry, module)), None)

    def remark(self, evidence: Mapping[str, Any]) -> str:
        """What a method's own search found for a matrix, in a few words for its reason; most have nothing to add."""
        return ""

    def _ignored(self, module: str) -> bool:
        return self.ignored_by(module) is not None

    def wished(self, shape: ModelShape) -> list[str]:
        """Projections that `ignore` does not name, whether their scheme fits them or not."""
        return [m for m in _modules(shape) if not self._ignored(m)]

    def choices(self, shape: ModelShape) -> dict[str, Choice]:
        """Module → what it is quantized to, layer by layer. Modules that stay as they are do not appear.

        Raises:
            InputError: matrices that engines fuse (query, key and value; gate and up) would differ; schemes that
                cannot share a checkpoint; with `fallback: refuse`, a group size that does not divide.
        """
        found: dict[str, Choice] = {}
        columns: dict[str, int] = {}
        for width, modules in itertools.chain.from_iterable(inputs_by_layer(shape)):
            own = {name: self._fitted(name, width) for name in modules if not self._ignored(name)}
            if len(set(own.values())) > 1:
                differ = ", ".join(f"{n}: {c.scheme if c else 'as it is'}" for n, c in own.items())
                raise InputError(f"overrides: matrices of one input must have one scheme; {differ}")
            found |= {name: choice for name, choice in own.items() if choice}
            columns |= dict.fromkeys(modules, width)
        found = self._alike(found, columns)
        check_together(found)
        return found

    def _fitted(self, name: str, columns: int) -> Choice | None:
        asked = self.asked(name)
        fitted = asked.fitted(columns)
        if fitted != asked and self.fallback == "refuse":
            instead = "leave it as it is"
            if fitted:
                instead = f"take {fitted.scheme} with {fitted.group_size or 'one scale a row'}"
            raise InputError(
                f"{name}: group size {asked.group_size} of {asked.scheme} does not divide its {columns} inputs; "
                f"fallback: smaller would {instead}"
            )
        return fitted

    def _alike(self, found: dict[str, Choice], columns: dict[str, int]) -> dict[str, Choice]:
        """With one group size for all matrices that ask for one scheme, where a checkpoint can hold one only."""
        widths: dict[Choice, set[int]] = {}
        for name in found:
            widths.setdefault(self.asked(name), set()).add(columns[name])
        common = {asked: asked.common(seen) for asked, seen in widths.items() if asked.dequantize_on_load}
        return {name: common.get(self.asked(name), choice) for name, choice in found.items()}

    def check(self, shape: ModelShape) -> None:
        """See `Stage.check`: mixtures of experts, quantized sources, bad `ignore` or `overrides`."""
        refuse_unroundable(shape)
        if shape.config.get("quantization_config"):
            raise InputError(f"the model is quantized already; {self.scheme} needs dense float weights")
        if self.bits is not None:
            refuse_unlike(shape, "quantize: bits", "give one scheme and overrides")
        modules = _modules(shape)
        for option, entries in (("ignore", self.ignore), ("overrides", tuple(self.overrides))):
            for entry in entries:
                if not any(matches(entry, module) for module in ("lm_head", *modules)):
                    raise InputError(f"{option} {entry!r} names no module; there are lm_head and e.g. {modules[0]}")
                if option == "overrides" and not any(matches(entry, module) for module in modules):
                    raise InputError(f"overrides {entry!r}: the head is never quantized; leave it out")
        if not self.choices(shape):
            if not self.wished(shape):
                raise InputError(f"ignore {list(self.ignore)} leaves nothing to quantize")
            widths = ", ".join(f"{name} {width}" for name, width in input_dimensions(shape).items())
            raise InputError(f"{self.choice.label} fits no matrix of the model, whose inputs are: {widths}")

    @property
    def wanted(self) -> StatisticKind:
        """What is summed over the inputs; where it hangs on options, a method says so here."""
        return self.statistic

    @property
    def reads_tokens(self) -> bool:
        return self.wanted != "none"

    @property
    def follows(self) -> Target:
        return "own"

    def round_weight(self, source: Checkpoint, name: str, device: str, choice: Choice) -> Rounded:
        """Ŵ of the tensor `name` on its grid, the same on every call: what a method without data names."""
        return implementation(self)(source.tensor(name).to(device), choice.grid(), name)

    def round_folded(
        self, weights: dict[str, torch.Tensor], seen: InputSums, choice: Choice, label: str, fold: Fold | None
    ) -> RoundedGroup:
        """Matrices (out_i, in) that read one input, rounded: what a calibrated method names.

        Args:
            label: names the input in errors.
            fold: takes factors that the input may be divided by; None: it may not.
        """
        return implementation(self)(self, weights, seen, choice, label, fold)

    def quantize(
        self,
        source: Checkpoint,
        directory: Path,
        *,
        blocks: TokenBlocks | None = None,
        schemes: Mapping[str, Choice] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        resume: ResumePoint | None = None,
        progress: Progress = silent,
    ) -> QuantizedModel:
        """The quantized checkpoint, written into `directory`. Equal inputs give equal bytes.

        Without data one matrix is in memory at a time; calibrated methods hold the codes of all. `dtype` is what the
        model computes in on calibration tokens; rounding itself is always float32. `schemes` are those that
        `planning.mixed.plan_schemes` chose, where `bits` asks for them.

        Raises:
            InputError: see `check`; a projection is not a float matrix; the installed transformers cannot load it; no
                calibration tokens for a method that reads them.
            IntegrityError: a weight, a scale or an activation is not finite.
        """
        run = worker("compression_dags.quantization.quantizing:quantize")
        return run(
            self,
            source,
            directory,
            blocks=blocks,
            schemes=schemes,
            device=device,
            dtype=dtype,
            resume=resume,
            progress=progress,
        )

    def reference_logits(
        self,
        source: Checkpoint,
        ids: torch.Tensor | None = None,
        *,
        rounding: Rounding | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> torch.Tensor:
        """Logits of the quantized model as it is in memory, without the written files: what the gate compares with.

        Args:
            ids: (sequences, T) int64; default: the gate's probe.
            rounding: `QuantizedModel.rounding`; methods without data find it anew.

        Returns:
            (sequences, T, vocabulary) float32 on the CPU.
        """
        run = worker("compression_dags.quantization.quantizing:reference_logits")
        return run(self, source, ids, rounding=rounding, device=device, dtype=dtype)


def _modules(shape: ModelShape) -> list[str]:
    """Every projection of every layer."""
    return [name for layer in inputs_by_layer(shape) for _, modules in layer for name in modules]
