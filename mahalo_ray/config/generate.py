"""A job of guided generation over a file of prompts: `mahalo generate`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.endpoint import EndpointConfig
from mahalo_ray.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section
from mahalo_ray.config.stages import ActorsConfig
from mahalo_ray.objectives import Weights


class RewardSource(Section):
    """A reward model: one of ours, which knows its objectives, or a classifier of another maker, for which
    `objective` says what it scores."""

    model: str
    objective: str | None = None

    @classmethod
    def parse(cls, text: str) -> RewardSource:
        """`FOLDER`, or `objective=FOLDER` for a model of another maker."""
        name, equals, folder = text.partition("=")
        return cls(model=folder, objective=name) if equals and name.isidentifier() else cls(model=text)


class ServerSource(Section):
    """A completion server in the policy's place: `tokenizer` is the folder of the server's tokenizer,
    `weights` what was merged into its model."""

    endpoint: EndpointConfig
    tokenizer: str
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None


_GUIDED = ("argmax", "sample", "beam", "dvts", "best_of_n")
# The strategies that make use of an option: setting it for another one is an error, never ignored.
_USED_BY = {
    "guidance": _GUIDED,
    "standardisation": _GUIDED,
    "beam_width": ("beam", "dvts"),
    "score_temperature": ("sample",),
}


class RequestConfig(Section):
    """What every prompt is answered with, as the endpoint's requests; rows may have weights, guidance and
    seed of their own. `seed` is mixed with each row's id."""

    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    guidance: dict[str, Annotated[float, Field(ge=0)]] | None = None
    num_candidates: PositiveInt = 5
    strategy: Literal["argmax", "sample", "beam", "dvts", "best_of_n", "none"] = "argmax"
    beam_width: PositiveInt = 4
    score_temperature: PositiveFloat = 1.0
    standardisation: Literal["within_candidates", "calibrated"] = "within_candidates"
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Fraction = 0.0
    seed: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 512
    max_step_tokens: PositiveInt = 256
    max_steps: PositiveInt = 256
    stop: list[Annotated[str, Field(min_length=1)]] = []

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        for values in (self.weights, self.guidance):
            if values is not None:
                Weights(values)
        for name, strategies in _USED_BY.items():
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and self.strategy not in strategies:
                raise ValueError(f"'{name}' is not used by 'strategy: {self.strategy}': leave it out")
        default = type(self).model_fields["num_candidates"].default
        if self.strategy == "none" and self.num_candidates not in (1, default):
            raise ValueError("'strategy: none' decodes one candidate: leave 'num_candidates' out")
        return self


class GenerateConfig(Section):
    """`prompts`: a file or folder of JSON, JSON Lines or Parquet rows; `output`: a folder or URL that every
    node can reach. Either `policy` (a model folder or a finished run) or `server` samples. Chunks of
    `chunk_rows` prompts are decoded together: another size is another job, another number of actors is not.
    """

    prompts: str
    output: str
    domain: Literal["math", "human_values", "tutoring"] = "tutoring"
    policy: str | None = None
    server: ServerSource | None = None
    rewards: list[RewardSource] = []
    request: RequestConfig = RequestConfig()
    chunk_rows: PositiveInt = 64
    max_branches: PositiveInt = 256
    max_bad_fraction: Fraction = 0.05
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cluster: ActorsConfig = ActorsConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.policy is None) == (self.server is None):
            raise ValueError("give either a policy or a completion server")
        if not self.rewards and self.request.strategy != "none":
            raise ValueError(
                f"strategy '{self.request.strategy}' needs a reward model: name one, or use strategy 'none'"
            )
        if self.rewards and self.request.strategy == "none":
            raise ValueError("'rewards' are not used by strategy 'none': leave them out")
        if self.server is not None and self.max_branches != type(self).model_fields["max_branches"].default:
            raise ValueError("'max_branches' is for a policy: a completion server has its own limits")
        return self
