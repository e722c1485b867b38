"""Which candidates are measured, by which quantizer and after which recovery; read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from compression_dags.errors import InputError
from compression_dags.options import Options
from compression_dags.quantization.formats import Choice
from compression_dags.quantization.schemes import check_together
from compression_dags.quantization.stage import QuantizeStage
from compression_dags.recovery.stage import RecoverStage
from compression_dags.registry import METHODS

#: The recovery of `recover: auto`: of both writers of the stream, at every layer behind the first gap.
AUTO = {"method": "least-squares", "projections": "attention+mlp", "scope": "sweep"}

QUANTIZER: dict[str, Any] = {"method": "gptq"}


#: Options of a quantizer that the plan chooses.
PLANNED = {"scheme", "group_size", "symmetric", "bits", "candidates", "overrides"}


def recovery_of(options: Mapping[str, Any]) -> RecoverStage:
    """The recovery stage that these options describe.

    Raises:
        InputError: an unknown method or option.
    """
    method = options.get("method")
    if method not in METHODS["recover"]:
        raise InputError(f"recover {method!r} is unknown; allowed: {', '.join(METHODS['recover'])}")
    return cast(RecoverStage, METHODS["recover"][method].model_validate(options))


def quantizer_stage(options: Mapping[str, Any], choice: Choice) -> QuantizeStage:
    """The quantizer that these options describe, at one scheme.

    Raises:
        InputError: an unknown method, or an option that the plan decides.
    """
    method = options.get("method")
    if method not in METHODS["quantize"]:
        raise InputError(f"quantizer {method!r} is unknown; allowed: {', '.join(METHODS['quantize'])}")
    if given := sorted(PLANNED & options.keys()):
        raise InputError(f"quantizer: {given[0]} is what plan decides; leave it out")
    return cast(QuantizeStage, METHODS["quantize"][method].model_validate({**options, **choice.options()}))


class CandidateOptions(Options):
    """Which candidates are measured, and on how much text."""

    schemes: tuple[str, ...] = Field(
        ("W8A16", "W4A16", "W3A16", "W3A16/128"),
        min_length=1,
        description="names, or NAME/SIZE: a group size of its own",
    )
    group_size: int | None = Field(64, gt=0, description="of schemes that leave it free and name none")
    units: Literal["group", "layer"] = Field("group", description="what gets a scheme of its own")
    sparsities: tuple[float, ...] = Field(
        (), max_length=32, description="shares of zeros that a layer may get (Wanda's masks)"
    )
    depth: bool = Field(True, description="also drop layers, and merge neighbours")
    quantizer: dict[str, Any] = Field(
        QUANTIZER,
        description="method and options of the recipe's quantizer, without schemes: all projections at a "
        "scheme are measured with it, single ones to nearest for rtn and by GPTQ for all others",
    )
    recover: Literal["auto"] | dict[str, Any] | None = Field(
        "auto",
        description="options of the recovery stage after which removals are measured; auto: least squares where the "
        "model and the calibration set allow it; null: as they are",
    )
    most_removed: float = Field(0.35, gt=0, lt=1, description="largest share of the layers that may go")
    rows: int = Field(12, ge=2, description="calibration sequences that survivors are measured on")
    first_rows: int = Field(4, ge=2, description="sequences after which poor candidates are given up")
    length: int = Field(512, ge=8, description="tokens of a sequence that are used")

    @field_validator("schemes")
    @classmethod
    def _schemes_exist(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            _choice(entry, None)
        return entries

    @model_validator(mode="after")
    def _first_is_a_part(self) -> CandidateOptions:
        if bad := [s for s in self.sparsities if not 0 < s < 1]:
            raise ValueError(f"sparsity {bad[0]} must lie between 0 and 1")
        for choice in self.choices():
            quantizer_stage(self.quantizer, choice)
        check_together({f"schemes {choice.label}": choice for choice in self.choices()})
        if isinstance(self.recover, dict):
            recovery_of(self.recover)
        if self.first_rows > self.rows:
            raise ValueError(f"first_rows {self.first_rows} must not exceed rows {self.rows}")
        return self

    @property
    def rounding(self) -> Literal["rtn", "gptq"]:
        """How single groups are rounded while they are measured."""
        return "rtn" if self.quantizer["method"] == "rtn" else "gptq"

    def choices(self) -> list[Choice]:
        """The schemes, each once, with the group size where it is free."""
        return list(dict.fromkeys(_choice(entry, self.group_size) for entry in self.schemes))


def _choice(entry: str, group_size: int | None) -> Choice:
    """What NAME, or NAME/SIZE, stands for.

    Raises:
        InputError: an unknown scheme, or a group size that is no number or not the scheme's to choose.
    """
    name, given, size = entry.partition("/")
    if given and not (size.isdecimal() and int(size)):
        raise InputError(f"schemes {entry!r}: a group size is a number of inputs, as in W3A16/128")
    free = Choice.of(name).format.free
    return Choice.of(name, int(size) if given else group_size if free else None)


def table_options(stage: QuantizeStage) -> CandidateOptions:
    """Options of the candidate table that an average of bits is solved from."""
    schemes = tuple(dict.fromkeys((stage.scheme, *stage.candidates)))
    asked = {"schemes": schemes, "group_size": stage.choice.group_size, "units": "group", "depth": False}
    given = stage.model_dump(mode="json", exclude=PLANNED, exclude_defaults=True)
    asked["quantizer"] = given | {"method": stage.method}
    return CandidateOptions.model_validate(asked)
