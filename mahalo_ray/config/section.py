"""What every section of a configuration shares: strictness, and the kinds of number."""

from __future__ import annotations

from typing import Annotated, Any, Self

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


class EndpointConfig(Section):
    """Where the server is and how hard it may be asked.

    `base_url` ends where `/chat/completions` begins (`http://host:8000/v1`). `api_key_env` names the
    environment variable that holds the key; the key itself never stands in a configuration. Requests that
    meet 429, 5xx, a timeout (`timeout_s`, for a whole reply) or a lost connection are tried up to
    `max_retries` times more. Prices are per million tokens, in any currency: the cost is reported in it.
    """

    base_url: Annotated[str, Field(pattern=r"^https?://")]
    model: str
    api_key_env: str | None = None
    concurrency: PositiveInt = 8
    requests_per_minute: PositiveInt | None = None
    timeout_s: PositiveFloat = 60.0
    max_retries: NonNegativeInt = 5
    input_price: Annotated[float, Field(ge=0)] | None = None
    output_price: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _both_prices(self) -> Self:
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("give both 'input_price' and 'output_price' (per million tokens), or neither")
        return self
