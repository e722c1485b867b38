"""What all options have in common: unknown keys are refused, and so are numbers that no computation can use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: No count, size or factor here is larger; beyond it float32 and int64 arithmetic fail in ways of their own.
LARGEST = 10**12
#: Below it float32 knows no factors.
SMALLEST = 1e-30


#: A ridge penalty over the mean diagonal: without one the normal equations of dependent inputs have no solution.
Ridge = Annotated[float, Field(gt=0)]

#: Closed-form fits need this many fitting tokens for every unknown of an output column.
TOKENS_PER_UNKNOWN = 10


class Options(BaseModel):
    """Values that a user may set. Refused are NaN, infinities, sizes beyond 10⁻³⁰ to 10¹², and yes for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, values: Any) -> Any:
        """YAML reads yes and no as booleans, which Python counts as 1 and 0."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and _is_number(field.annotation):
                raise ValueError(f"{name}: must be a number, not {str(value).lower()}")
        return values

    @field_validator("*", mode="after")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        _refuse_size(value)
        return value


def _may_be(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_may_be(part, kind) for part in get_args(annotation))


def _is_number(annotation: Any) -> bool:
    return not _may_be(annotation, bool) and (_may_be(annotation, int) or _may_be(annotation, float))


def _refuse_size(value: Any) -> None:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_size(item)
    elif isinstance(value, (int, float)) and (abs(value) > LARGEST or 0 < abs(value) < SMALLEST):
        raise ValueError(f"must be 0 or between {SMALLEST:g} and {LARGEST:.0e} in size")
