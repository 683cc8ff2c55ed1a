"""What every section of a configuration shares: strictness, and the kinds of number."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SMALLEST_TEMPERATURE = 1e-6


def _check_temperature(value: float) -> float:
    """Logits divided by a smaller number would leave the range of float32."""
    if 0 < value < SMALLEST_TEMPERATURE:
        raise ValueError(f"{value} is too small to divide by: take 0 (greedy) or at least 0.000001")
    return value


Temperature = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, description="divides the logits; 0 always takes the likeliest token"),
    AfterValidator(_check_temperature),
]
# Told apart first, so that an error speaks of the form that was written.
PerObjective = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[dict[str, PositiveFloat], Tag("by_objective")],
    Discriminator(lambda value: "by_objective" if isinstance(value, dict) else "number"),
]

# `json_schema_extra` of a field that says where progress is reported, not what is computed.
NOT_SHAPING: dict[str, Any] = {"shapes_result": False}


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

    def shaping(self) -> dict[str, Any]:
        """JSON values of everything that shapes a result: without the fields marked by `NOT_SHAPING`, which
        may change without making what was computed before invalid."""
        return self.model_dump(mode="json", exclude=self._not_shaping())

    def _not_shaping(self) -> dict[str, Any]:
        marked: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if info.json_schema_extra == NOT_SHAPING:
                marked[name] = True
            elif isinstance(value, Section) and (inner := value._not_shaping()):
                marked[name] = inner
        return marked


class SamplingParams(Section):
    """How a token is drawn from a model's distribution, for configuration, decoding and serving alike.

    The filters act in this order on the distribution at the given temperature (as in transformers): `top_k`,
    `top_p`, `min_p`. Example: `SamplingParams(temperature=0.7, top_p=0.95)`.
    """

    temperature: Temperature = 1.0
    top_k: Annotated[
        int, Field(ge=0, lt=2**31, description="keep this many of the likeliest tokens; 0 keeps all")
    ] = 0
    top_p: Annotated[
        float,
        Field(ge=1e-6, le=1, description="keep the smallest set of tokens of this mass; 1 keeps all"),
    ] = 1.0
    min_p: Annotated[
        float,
        Field(ge=0, le=1, description="keep tokens of this share of the likeliest one's probability"),
    ] = 0.0


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
