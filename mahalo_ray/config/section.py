"""What all sections share: strictness, the kinds of number and text, sampling and endpoints.

Every field has a docstring below it: what it is, its unit, and what a special value means. The printed
configurations (`mahalo config`) and the reference page of the docs are made from these docstrings and the
ranges that the types state: a field is described in one place.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from mahalo_ray.objectives import Weights

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1  # a run multiplies it by its number of seeds, and the product has to fit into 64 bits
MAX_REQUEST_SEED = 2**63 - 1


def refuse_bool(value: Any) -> Any:
    """YAML reads `yes`, `on` and `true` as booleans, which Python would count as 1."""
    if isinstance(value, bool):
        raise ValueError("give a number, not true or false")
    return value


def _refuse_control_characters(value: str) -> str:
    if not value.strip():
        raise ValueError("the text is empty")
    if any(ord(character) < 32 for character in value):
        raise ValueError("control characters (line ends, tabs, ...) cannot be part of it")
    return value


NOT_BOOL = BeforeValidator(refuse_bool)
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT), NOT_BOOL]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT), NOT_BOOL]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), NOT_BOOL]
Number = Annotated[float, NOT_BOOL]
PositiveFloat = Annotated[float, Field(gt=0), NOT_BOOL]
NonNegativeFloat = Annotated[float, Field(ge=0), NOT_BOOL]
Fraction = Annotated[float, Field(ge=0, le=1), NOT_BOOL]
PositiveFraction = Annotated[float, Field(gt=0, le=1), NOT_BOOL]
OpenFraction = Annotated[float, Field(gt=0, lt=1), NOT_BOOL]


def _refuse_descending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] >= value[1]:
        raise ValueError(f"the range is {list(value)}: the first must be below the second")
    return value


LabelRange = Annotated[tuple[Number, Number], AfterValidator(_refuse_descending)]

# One line of text that is not empty: folders, URLs, hub ids, names.
Text = Annotated[str, Field(min_length=1), AfterValidator(_refuse_control_characters)]
# Text that people read, on as many lines as they like.
LongText = Annotated[str, Field(min_length=1)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=200)]
EnvironmentVariable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# "module:function" of the user's own code; only a configuration names programs, never data.
FunctionName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]

# A domain's name, or "module:NAME" of the user's own code.
DomainName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$|^[\w.]+:\w+$")]

# The words that a configuration chooses from. The code that acts on them imports them from here.
Dtype = Literal["float32", "bfloat16"]
Domain = Literal["math", "lines", "human_values", "sentence", "tutoring"]
Supervision = Literal["rollout_value", "judged_rollouts", "judged_prefix", "pairwise"]
PairFormat = Literal[
    "auto", "trl", "mahalo", "hh_rlhf", "hhh", "ultrafeedback", "helpsteer", "records", "truthfulqa"
]
TraceFormat = Literal[
    "auto",
    "trl",
    "mahalo",
    "processbench",
    "prm800k",
    "math_shepherd",
    "big_bench_mistake",
    "model_solutions",
    "mathdial",
    "conversation",
    "rated",
    "steps",
]
OutcomeLabels = Literal["last", "all"]
PolicyMethod = Literal["mah_dpo", "dpo", "scalarised", "modpo"]
BaselineName = Literal["dpo", "scalarised", "modpo", "soup"]
PreferenceLoss = Literal["sigmoid", "ipo", "regression"]  # `losses.DPOKind`: the losses know torch alone
PairSelection = Literal["best_worst", "all", "disjoint"]
HeadKind = Literal["full", "low_rank"]
HeadInput = Literal["last", "pooled", "reference_logps"]
Tuning = Literal["full", "lora", "frozen"]
ZeroStage = Literal[0, 1, 2, 3]
Strategy = Literal["argmax", "sample", "beam", "dvts", "best_of_n", "none"]
Standardisation = Literal["within_candidates", "calibrated"]
AggregationKind = Literal["sum", "soft_min", "thresholds"]
# 0: the head of the model that a policy was made from, 1: the policy's own.
Strength = Annotated[float, Field(ge=0, le=100), NOT_BOOL]
SweepKind = Literal["decoding", "guidance", "training"]
TrainingStart = Literal["nearest", "policy", "sft"]
SamplerName = Literal["lattice", "sobol", "dirichlet", "surf", "surface"]

SMALLEST_TEMPERATURE = 1e-6


def _check_temperature(value: float) -> float:
    """Logits divided by a smaller number would leave the range of float32."""
    if 0 < value < SMALLEST_TEMPERATURE:
        raise ValueError(f"{value} is too small to divide by: take 0 (greedy) or at least 0.000001")
    return value


Temperature = Annotated[float, Field(ge=0), NOT_BOOL, AfterValidator(_check_temperature)]
# Told apart first, so that an error speaks of the form that was written.
PerObjective = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[dict[str, PositiveFloat], Tag("by_objective")],
    Discriminator(lambda value: "by_objective" if isinstance(value, dict) else "number"),
]

# `json_schema_extra` of a field that says where progress is reported, not what is computed.
NOT_SHAPING: dict[str, Any] = {"shapes_result": False}
# The same of an option that came later and changes nothing at its default: it counts where it is set, so
# what was made before there was such an option stays valid.
SHAPING_WHERE_SET: dict[str, Any] = {"shapes_result": "where set"}


def _parse_weights(value: Any) -> Any:
    return Weights.parse(value) if isinstance(value, str) else value


def _weights_schema(_source: Any, handler: Any) -> core_schema.CoreSchema:
    numbers = handler(dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False), NOT_BOOL]])
    return core_schema.no_info_before_validator_function(
        _parse_weights, core_schema.no_info_after_validator_function(Weights, numbers)
    )


# A point on the simplex in YAML: `{accuracy: 0.7, engagement: 0.3}` or "accuracy=0.7,engagement=0.3". The
# values are divided by their sum.
WeightVector = Annotated[
    Weights, GetPydanticSchema(_weights_schema), PlainSerializer(dict, return_type=dict[str, float])
]
# As above, where no weights may be given: written, and read, as the empty mapping.
OptionalWeights = Annotated[
    Annotated[Weights, GetPydanticSchema(_weights_schema)] | None,
    BeforeValidator(lambda value: None if value == {} else value),
    PlainSerializer(lambda value: dict(value or {}), return_type=dict[str, float]),
]


class ConfigError(ValueError):
    """The run's configuration cannot be used; the message says which key, where, and what to do."""

    def __init__(self, message: str) -> None:
        # A command line may hold bytes that are no text, which no terminal or log could take back.
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class Section(BaseModel):
    """Base of every section: immutable, every number finite, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

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
        may change without making what was computed before invalid, and those marked by `SHAPING_WHERE_SET`
        that are at their defaults."""
        return self.model_dump(mode="json", exclude=self._not_shaping())

    def _not_shaping(self) -> dict[str, Any]:
        marked: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            at_default = value == info.default
            if info.json_schema_extra == NOT_SHAPING or (
                info.json_schema_extra == SHAPING_WHERE_SET and at_default
            ):
                marked[name] = True
            elif isinstance(value, Section) and (inner := value._not_shaping()):
                marked[name] = inner
            elif isinstance(value, dict):
                inner = {k: v._not_shaping() for k, v in value.items() if isinstance(v, Section)}
                marked |= {name: inner} if any(inner.values()) else {}
        return marked


class SamplingParams(Section):
    """How a token is drawn from a model's distribution, for configuration, decoding and serving alike.

    The filters act in this order on the distribution at the given temperature (as in transformers): `top_k`,
    `top_p`, `min_p`.

    >>> SamplingParams(temperature=0.7, top_p=0.95).top_k
    0
    """

    temperature: Temperature = 1.0
    """Divides the logits: below 1 the likely tokens become likelier. 0 always takes the likeliest token; any
    other value is at least 0.000001."""

    top_k: NonNegativeInt = 0
    """Only this many of the likeliest tokens can be drawn. 0 keeps all."""

    top_p: Annotated[float, Field(ge=1e-6, le=1), NOT_BOOL] = 1.0
    """Only the smallest set of tokens that has this probability mass can be drawn. 1 keeps all."""

    min_p: Fraction = 0.0
    """Only tokens with at least this share of the likeliest token's probability can be drawn. 0 keeps all."""


class Threshold(Section):
    """A least value of one objective."""

    objective: Text
    """Which objective."""

    at_least: Annotated[float, Field(ge=-1000, le=1000), NOT_BOOL]
    """The least value, in calibrated units: 0 is the mean, 1 one within-prompt spread above it."""


class Aggregation(Section):
    """How the scores of one candidate, one per objective, become what candidates are compared by.

    `sum` is the weighted sum. `soft_min` is -t log(sum_o w_o exp(-s_o / t)): near the weighted sum at a high
    temperature t, near the worst score at a low one. `thresholds` compares by the thresholds in their order,
    where all above a threshold are alike, and by the weighted sum among those that are alike in all.

    >>> Aggregation(kind="thresholds", thresholds=[{"objective": "accuracy", "at_least": 0.2}]).kind
    'thresholds'
    """

    kind: AggregationKind = "sum"
    """`sum`, `soft_min` or `thresholds`."""

    temperature: Annotated[float, Field(ge=1e-3, le=1000), NOT_BOOL] = 1.0
    """Of `soft_min`, in the units of the scores."""

    thresholds: Annotated[list[Threshold], Field(max_length=64)] = []
    """Of `thresholds`, the most important first: `[{objective: accuracy, at_least: 0.2}]`."""

    @model_validator(mode="after")
    def _only_what_the_kind_uses(self) -> Self:
        if self.temperature != 1 and self.kind != "soft_min":
            raise ValueError(f"'temperature' is not used by 'kind: {self.kind}': leave it out")
        if bool(self.thresholds) != (self.kind == "thresholds"):
            raise ValueError("'thresholds' and 'kind: thresholds' go together: give both or neither")
        names = [threshold.objective for threshold in self.thresholds]
        if len(set(names)) < len(names):
            raise ValueError(f"'thresholds' name one objective twice: {', '.join(names)}")
        return self


class EndpointConfig(Section):
    """An OpenAI-compatible server, and how hard it may be asked.

    Requests that meet 429, 5xx, a timeout or a lost connection are tried again, later each time.
    """

    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")]
    """Address of the server up to where `/chat/completions` begins, for example `http://host:8000/v1`."""

    model: Text
    """Name of the model, as the server knows it."""

    api_key_env: EnvironmentVariable | None = None
    """Name of the environment variable that holds the key; the key itself never stands in a configuration.
    Null: no key is sent."""

    concurrency: PositiveInt = 8
    """Most requests that are open at one time, over the whole job."""

    requests_per_minute: PositiveInt | None = None
    """Most requests per minute, over the whole job. Null: no limit."""

    timeout_s: PositiveFloat = 60.0
    """Seconds that a whole reply may take."""

    max_retries: NonNegativeInt = 5
    """How often a failed request is tried again."""

    input_price: NonNegativeFloat | None = None
    """Price of a million prompt tokens, in any currency; the cost is reported in it. Null: no cost is
    reported."""

    output_price: NonNegativeFloat | None = None
    """Price of a million tokens of replies, in the same currency. Given together with `input_price`."""

    @model_validator(mode="after")
    def _both_prices(self) -> Self:
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("give both 'input_price' and 'output_price' (per million tokens), or neither")
        return self


class RubricJudgeConfig(Section):
    """A language model behind an OpenAI-compatible endpoint that judges, asked by a rubric."""

    kind: Literal["endpoint"] = "endpoint"
    """A language model asked by a rubric."""

    endpoint: EndpointConfig
    """The server. In `mahalo label` its limits are those of the whole job, which the actors share; in the
    domain `prompts` every process that judges has them."""

    rubric: Text
    """File with a jinja2 template of the question; docs/labelling.md has its variables."""

    score_pattern: str = r"(?i)score\s*[:=]\s*(-?\d+(?:\.\d+)?)"
    """Regular expression whose first group is the score; its last match in the reply counts."""

    scale: LabelRange = (0.0, 1.0)
    """Lowest and highest score, which are mapped to 0..1."""

    max_tokens: PositiveInt = 512
    """Most tokens of a reply."""

    temperature: Temperature = 0.0
    """Temperature of the replies. 0 always takes the likeliest token."""

    parse_retries: NonNegativeInt = 2
    """How often a reply without a score within the scale is asked for again."""

    @field_validator("score_pattern")
    @classmethod
    def _has_a_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError("the score is the first group of the pattern, and it has none")
        return value

    def _not_shaping(self) -> dict[str, Any]:
        """Of the endpoint, the model alone shapes a verdict."""
        return {"parse_retries": True, "endpoint": set(EndpointConfig.model_fields) - {"model"}}


class MergedModel(Section):
    """A model of a completion server, and the weights that were merged into it."""

    model: Text
    """Name of the model, or of the adapter, as the server knows it."""

    weights: WeightVector
    """The weights that were merged into it."""


class ServerSource(Section):
    """A completion server in the policy's place."""

    endpoint: EndpointConfig
    """The completion server."""

    tokenizer: Text
    """Folder or hub id of the server's tokenizer."""

    weights: WeightVector | None = None
    """The weights that were merged into the endpoint's model. Requests may ask for these, and for those of
    `further_models`. Null: a model without weights."""

    further_models: list[MergedModel] = []
    """Other models of the same server, which answer requests for their weights: merges at other weights, or
    adapters of one model."""

    @model_validator(mode="after")
    def _weights_differ(self) -> Self:
        if self.further_models and self.weights is None:
            raise ValueError("'further_models' need 'weights', those of the endpoint's own model")
        each = [self.weights, *(further.weights for further in self.further_models)]
        for weights in each:
            if weights is not None and each.count(weights) > 1:
                raise ValueError(f"two models have the weights {weights.label()}: keep one of them")
        return self

    @property
    def models_by_weights(self) -> dict[Weights, str]:
        """The names of all models whose weights are known."""
        own = {} if self.weights is None else {self.weights: self.endpoint.model}
        return {**own, **{further.weights: further.model for further in self.further_models}}


class RewardServer(Section):
    """A language model on a completion server in a reward model's place: it is asked whether, and how likely
    it says yes is the score."""

    endpoint: EndpointConfig
    """The completion server. It has to give log-probabilities."""

    tokenizer: Text
    """Folder or hub id of the server's tokenizer."""

    questions: Annotated[dict[Text, Text], Field(min_length=1)]
    """The question of every objective about the conversation; `Is the last reply right?`, for example."""

    yes: Text = "Yes"
    """What the model says where the objective is met. One token."""

    no: Text = "No"
    """What it says where it is not. One token."""

    max_length: PositiveInt = 4096
    """Most tokens that the server reads."""
