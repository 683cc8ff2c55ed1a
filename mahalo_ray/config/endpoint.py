"""A model behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


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
