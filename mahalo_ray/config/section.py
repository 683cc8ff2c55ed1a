"""What every section of a configuration shares: strictness, and the kinds of number."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Told apart first, so that an error speaks of the form that was written.
PerObjective = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[dict[str, PositiveFloat], Tag("by_objective")],
    Discriminator(lambda value: "by_objective" if isinstance(value, dict) else "number"),
]


class ConfigError(ValueError):
    """The run's configuration cannot be used; the message says which key, where, and what to do."""


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults_of_the_place(cls, data: Any) -> Any:
        """A section given in part keeps what its place sets: `policy.training` stays ZeRO-3, for example."""
        if not isinstance(data, dict):
            return data
        for name, info in cls.model_fields.items():
            if isinstance(info.default, Section) and isinstance(data.get(name), dict):
                data = {**data, name: info.default.model_dump(exclude_unset=True) | data[name]}
        return data
