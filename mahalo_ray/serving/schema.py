"""What clients send: the supported part of OpenAI's API, and our fields beside it.

Null is the same as leaving a field out. A field of OpenAI's API that this server does not support is accepted
at the value that changes nothing, and refused by name at any other; a field nobody knows is refused too,
never ignored. Every error has OpenAI's form `{"error": {"message", "type", "param", "code"}}`, with the wrong
field in `param`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, from_json
from pydantic_core.core_schema import no_info_after_validator_function

from mahalo_ray.config import Aggregation
from mahalo_ray.config.section import AggregationKind, Temperature
from mahalo_ray.data.records import Message
from mahalo_ray.objectives import Weights, unknown_name

# Those that a running batch can be joined with; beam searches need one of their own.
ServedStrategy = Literal["argmax", "sample", "best_of_n", "none"]

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 20
MAX_PARTS = 1024  # text parts of one message
MAX_OBJECTIVES = 64
MAX_WEIGHT = 1e9
MAX_SEED = 2**63 - 1
LONGEST_ECHO = 100  # characters of a client's own text that an error repeats
_LONGEST_MESSAGE = 600


class ApiError(Exception):
    """An answer other than 200. `param` is the field that is wrong, `code` OpenAI's short name of the
    problem.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON answer; texts are cut to a length that fits a log line."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        message = shorten(self.message, _LONGEST_MESSAGE)
        param = None if self.param is None else shorten(self.param, 2 * LONGEST_ECHO)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def encode(self) -> bytes:
        """The JSON answer's bytes."""
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds where a later try makes sense, `WWW-Authenticate` with 401."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


FULL_REPLICA_HEADER = "mahalo-full-replica"  # from a replica to the proxy in front of it


@dataclass(frozen=True)
class FullReplica:
    """What a replica without room tells the proxy: a name of its own, the seconds between places that become
    free there, and how many replicas there are."""

    name: str
    pace_s: float
    num_replicas: int

    @classmethod
    def parse(cls, text: str) -> FullReplica:
        """From the header's value."""
        name, pace_s, num_replicas = text.split(" ")
        return cls(name, float(pace_s), int(num_replicas))

    def __str__(self) -> str:
        return f"{self.name} {self.pace_s:.4f} {self.num_replicas}"


class Overloaded(ApiError):
    """503 of a server without room. `pace_s`: seconds between places that become free. `full`: no model of
    the replica has room, so that the proxy may refuse others itself for a moment."""

    def __init__(self, message: str, retry_after_s: float, pace_s: float = 1.0) -> None:
        super().__init__(503, message, code="overloaded", retry_after_s=retry_after_s)
        self.pace_s = pace_s
        self.full: FullReplica | None = None

    def headers(self) -> dict[str, str]:
        told = {} if self.full is None else {FULL_REPLICA_HEADER: str(self.full)}
        return super().headers() | told


def internal_error(reference: str) -> ApiError:
    """500 without details: the server's log has them under this reference."""
    message = f"something went wrong in the server; its log has the details under 'error {reference}'"
    return ApiError(500, message, code="internal_error")


def shorten(text: str, length: int = LONGEST_ECHO) -> str:
    """The text, or its beginning with dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold. `max_new_tokens` caps `max_tokens`; more than the others is an error."""

    max_candidates: int
    max_new_tokens: int
    max_messages: int
    max_strength: float
    max_choices: int

    def check_lengths(self, body: Mapping[str, Any]) -> None:
        """Raise ApiError for a list that is too long, before its items are looked at."""
        for name, limit in (("messages", self.max_messages), ("candidates", self.max_candidates)):
            value = body.get(name)
            if isinstance(value, list) and len(value) > limit:
                raise _above_limit(name, len(value), limit)


def _above_limit(param: str, value: float, limit: float) -> ApiError:
    return ApiError(400, f"'{param}': {value:g} is more than this server's limit of {limit:g}", param)


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a field that null leaves out."""
    if not schema.keys() & {"type", "anyOf", "$ref"}:  # an enum, or whatever there is: null is among it
        return schema
    about = {key: value for key, value in schema.items() if key in ("title", "description", "default")}
    variants = schema.get("anyOf") or [{key: v for key, v in schema.items() if key not in about}]
    return {"anyOf": [*(v for v in variants if v != {"type": "null"}), {"type": "null"}], **about}


class Payload(BaseModel):
    """Base of request bodies: unknown fields are errors, "5" is no number, null is the same as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        described = handler.resolve_ref_schema(handler(schema))
        described["additionalProperties"] = {"type": "null"}
        optional = described["properties"].keys() - set(described.get("required", ()))
        described["properties"] |= {name: _or_null(described["properties"][name]) for name in optional}
        return described

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {name: item for name, item in value.items() if item is not None}
        unknown = [name for name in given if name not in cls.model_fields]
        # The first unknown field refuses the request; thousands of them would only make thousands of errors.
        for name in unknown[1:]:
            del given[name]
        return given


class Only:
    """Marks a field that is supported only at values that change nothing: `neutral`, and null."""

    def __init__(self, *neutral: JsonValue) -> None:
        self._neutral = neutral

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self._neutral], "description": "not supported: without effect only"}

    def _check(self, value: JsonValue) -> JsonValue:
        equal = [known for known in self._neutral if value == known]
        if not any(isinstance(value, bool) == isinstance(known, bool) for known in equal):  # 0 is not false
            choices = " or ".join(("null", *(str(known) for known in self._neutral)))
            raise ValueError(f"this server does not support it: leave it out, or send {choices}")
        return value


# Fields of others that change nothing here, whatever they hold.
Ignored = Annotated[JsonValue, Field(description="accepted, has no effect")]
AbsentText = Annotated[JsonValue, Only()]
AbsentList = Annotated[JsonValue, Only([])]


class TextPart(Payload):
    """The text form of OpenAI's content parts."""

    type: Literal["text"]
    text: str
    annotations: AbsentList = None
    cache_control: Ignored = None


class ChatMessage(Payload):
    """One message; `developer` is OpenAI's newer word for `system`. An answer of this or another server can
    be sent back as its client library dumps it, with all its null fields."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = Field(
        default=None, validate_default=True, description="null in an assistant's message only"
    )
    type: Literal["text", "message"] | None = None
    name: Annotated[str | None, Field(description="accepted, has no effect")] = None
    refusal: AbsentText = None
    audio: AbsentText = None
    function_call: AbsentText = None
    annotations: AbsentList = None
    provider_specific_fields: Ignored = None  # of LiteLLM's answers
    reasoning_content: Ignored = None
    tool_calls: AbsentList = None

    @field_validator("content")
    @classmethod
    def _content_is_there(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role", "assistant") != "assistant":
            raise ValueError(f"a message of role '{info.data['role']}' needs it")
        return value

    @property
    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def as_record(self) -> Message:
        """The message as the rest of the package knows it."""
        return Message(role="system" if self.role == "developer" else self.role, content=self.text)


Messages = Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]


def _at_most_64(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_OBJECTIVES:
        raise ValueError(f"{len(value)} weights are too many: at most {MAX_OBJECTIVES}")
    return value


WeightMap = Annotated[
    dict[str, Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)]], BeforeValidator(_at_most_64)
]


def _stop_list(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if isinstance(strings, list):
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"{len(strings)} stop strings: at most {MAX_STOP_STRINGS}")
        if any(isinstance(text, str) and not 1 <= len(text) <= MAX_STOP_LENGTH for text in strings):
            raise ValueError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters")
    return strings


_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOP_SCHEMA = {
    "anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}]
}


def _replace(value: int, by: int | None) -> BeforeValidator:
    return BeforeValidator(lambda given: by if given == value and type(given) is int else given)


class StreamOptions(Payload):
    """`include_usage`: a last chunk carries the token counts; `continuous_usage_stats`: every chunk does."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Annotated[bool, Field(description="accepted, has no effect")] = False


class ThresholdFields(Payload):
    """A least value of one objective, in calibrated units."""

    objective: Annotated[str, Field(min_length=1)]
    at_least: Annotated[float, Field(allow_inf_nan=False)]


class AggregationFields(Payload):
    """How the scores of a candidate become what is compared: the fields of `config.Aggregation`."""

    kind: AggregationKind
    temperature: Annotated[float, Field(ge=1e-3, le=1000)] | None = None
    thresholds: Annotated[list[ThresholdFields], FailFast(), Field(max_length=MAX_OBJECTIVES)] = []

    @property
    def as_config(self) -> Aggregation:
        """The same for the decoder; ApiError 400 for what does not go together."""
        try:
            return Aggregation.model_validate(self.model_dump(exclude_none=True))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise ApiError(400, reason, "aggregation", "invalid_value") from None


class SamplingFields(Payload):
    """What requests for answers have in common. Fields left out take the server's defaults.

    max_tokens above the server's limit is lowered to it: such an answer ends with finish_reason "length". Of
    `n` answers the first is that of `seed`; the others have seeds of their own.
    """

    model: Annotated[
        str, Field(description="the server's model, or `NAME@accuracy=0.8,engagement=0.2` with its weights")
    ]
    temperature: Annotated[Temperature, Field(le=2, json_schema_extra={"maximum": 2})] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[
        int | None,
        Field(ge=0, lt=2**31),
        _replace(-1, 0),
        WithJsonSchema({"type": "integer", "minimum": -1, "description": "0 or -1: off"}),
    ] = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, description="answers")] = 1
    stop: Annotated[list[str], BeforeValidator(_stop_list), WithJsonSchema(_STOP_SCHEMA)] = []
    seed: Annotated[
        int | None,
        Field(ge=0, le=MAX_SEED),
        _replace(-1, None),
        WithJsonSchema({"type": "integer", "minimum": -1, "description": "-1: a random one"}),
    ] = None
    min_tokens: Annotated[int, Field(ge=0, description="no end token is drawn before")] = 0
    ignore_eos: Annotated[bool, Field(description="no end token is drawn at all")] = False
    repetition_penalty: Annotated[
        float, Field(ge=0.01, le=100, description="above 1: tokens that occurred become less likely")
    ] = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    objectives: Annotated[WeightMap | None, Field(description="weights over the policy's heads")] = None
    strength: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False),
        WithJsonSchema(
            {
                "type": "number",
                "minimum": 0,
                "description": "0: the model the policy was made from, 1: the policy",
            }
        ),
    ] = None

    # Without effect on the answer.
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    # Not supported: accepted at the value that changes nothing.
    store: Annotated[JsonValue, Only(False)] = None
    best_of: Annotated[JsonValue, Only(1)] = None
    frequency_penalty: Annotated[JsonValue, Only(0)] = None
    presence_penalty: Annotated[JsonValue, Only(0)] = None
    logit_bias: Annotated[JsonValue, Only({})] = None
    response_format: Annotated[JsonValue, Only({"type": "text"})] = None
    suffix: AbsentText = None

    @model_validator(mode="after")
    def _options_go_with_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' goes with 'stream': true only", "stream_options")
        return self

    def check(self, limits: RequestLimits) -> None:
        """Raise ApiError naming the first field beyond the server's limits."""
        if self.n > limits.max_choices:
            raise _above_limit("n", self.n, limits.max_choices)
        if self.strength is not None and self.strength > limits.max_strength:
            raise _above_limit("strength", self.strength, limits.max_strength)


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions.

    objectives: decoding weights over the policy's heads; guidance: weights over the reward model's objectives
    (the objectives' weights when left out); aggregation: what is made of a candidate's scores. strategy: how
    one of num_candidates is chosen at every step, as in `GuidedRequest`; left out, "argmax" where there is a
    reward model, else "none".
    """

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[bool, Field(description="of the answer's tokens, with its last chunk")] = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    guidance: WeightMap | None = None
    num_candidates: Annotated[int, Field(ge=1)] | None = None
    strategy: ServedStrategy | None = None
    score_temperature: Annotated[float, Field(ge=1e-3, le=1000)] | None = None
    aggregation: AggregationFields | None = None

    parallel_tool_calls: Ignored = None
    tools: AbsentList = None
    tool_choice: Annotated[JsonValue, Only("none", "auto")] = None
    functions: AbsentList = None
    function_call: Annotated[JsonValue, Only("none", "auto")] = None
    modalities: Annotated[JsonValue, Only(["text"])] = None
    audio: AbsentText = None
    prediction: AbsentText = None
    web_search_options: AbsentText = None
    verbosity: Annotated[JsonValue, Only("medium")] = None
    reasoning_effort: Annotated[JsonValue, Only("none")] = None
    echo: Annotated[JsonValue, Only(False)] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ApiError(400, "'max_tokens' and 'max_completion_tokens' differ: give one", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "'top_logprobs' goes with 'logprobs': true only", "top_logprobs")
        if self.strategy == "none" and self.num_candidates not in (None, 1):
            raise ApiError(
                400, "strategy 'none' decodes one candidate: leave 'num_candidates' out", "num_candidates"
            )
        if self.score_temperature is not None and self.strategy != "sample":
            raise ApiError(400, "'score_temperature' goes with strategy 'sample' only", "score_temperature")
        if self.strategy == "none" and self.aggregation is not None:
            raise ApiError(400, "strategy 'none' compares nothing: leave 'aggregation' out", "aggregation")
        if self.strategy == "none" and self.guidance is not None:
            raise ApiError(400, "strategy 'none' uses no reward model: leave 'guidance' out", "guidance")
        return self

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self, limits: RequestLimits) -> None:
        super().check(limits)
        if self.num_candidates is not None and self.num_candidates > limits.max_candidates:
            raise _above_limit("num_candidates", self.num_candidates, limits.max_candidates)


TokenIds = tuple[int, ...]


def _prompt_list(value: Any) -> list[str | TokenIds]:
    """One or several texts, or one or several lists of token ids, as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(type(item) is int for item in value):
            value = [value]
        if all(isinstance(item, list) and item and all(type(i) is int for i in item) for item in value):
            if any(not 0 <= i < 2**31 for item in value for i in item):
                raise ValueError("a token id must be a number from 0 on, as the tokenizer gives it")
            return [tuple(item) for item in value]
    raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists")


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}


class CompletionRequest(SamplingFields):
    """POST /v1/completions: the policy goes on with a text, or token ids, as they are: no chat template, and
    no reward model, which judges conversations only. A special token written in the text is read as one.

    logprobs: log-probabilities of every token, and of so many of the likeliest at its place; with `echo`
    those of the prompt too, and with max_tokens 0 of nothing else.
    """

    prompt: Annotated[list[str | TokenIds], BeforeValidator(_prompt_list), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    guidance: Annotated[JsonValue, Only()] = None
    num_candidates: Annotated[JsonValue, Only(1)] = None
    strategy: Annotated[JsonValue, Only("none")] = None

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "'max_tokens' 0 goes with 'echo': true only", "max_tokens")
        return self

    def check(self, limits: RequestLimits) -> None:
        super().check(limits)
        count = len(self.prompt) * self.n
        if count > limits.max_choices:
            raise _above_limit("prompt", count, limits.max_choices)


class ScoreRequest(Payload):
    """POST /v1/score: how the reward model rates each candidate as the next turn after `messages`."""

    model: str | None = None
    messages: Messages
    candidates: Annotated[list[str], FailFast(), Field(min_length=1)]

    @model_validator(mode="after")
    def _no_empty_candidate(self) -> ScoreRequest:
        for index, text in enumerate(self.candidates):
            if not text.strip():
                raise ApiError(400, "the candidate is empty", f"candidates[{index}]")
        return self


class StudentRequest(Payload):
    """POST /v1/student: what the simulated student who began this conversation answers to its last message,
    the assistant's."""

    model: str | None = None
    messages: Messages


RequestBody = TypeVar("RequestBody", bound=Payload)


def parse(model: type[RequestBody], body: bytes, limits: RequestLimits) -> RequestBody:
    """A request from its JSON bytes; ApiError 400 naming the first wrong field.

    Its cost is bounded by the body's size: lists stop at their first wrong item.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        message = f"the request body is not valid JSON: {shorten(str(error), 2 * LONGEST_ECHO)}"
        raise ApiError(400, message, code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request body must be a JSON object", code="invalid_value")
    limits.check_lengths(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explain(error, model) from None


def weights_of(
    values: Mapping[str, float] | None, known: Sequence[str], default: Weights, param: str
) -> Weights:
    """The named weights over the known objectives, or the default; ApiError 400 naming `param.objective`."""
    if values is None:
        return default
    for name in map(shorten, values):
        if name not in known:
            raise ApiError(
                400, unknown_name("objective", name, known), f"{param}.{name}", "unknown_objective"
            )
    try:
        return Weights(values)
    except ValueError as error:
        raise ApiError(400, str(error), param) from None


# pydantic speaks of Python's types.
_IN_JSON = {
    "dict_type": "Input should be an object",
    "model_type": "Input should be an object",
    "list_type": "Input should be an array",
}


def _explain(error: ValidationError, model: type[BaseModel]) -> ApiError:
    # An unknown field comes first: a misspelt name explains the "missing" beside it. A list given as
    # `content` failed as a string too, which says nothing.
    first = min(
        error.errors(include_url=False, include_context=False),
        key=lambda e: (
            e["type"] != "extra_forbidden",
            isinstance(e["input"], list) and e["loc"][-1:] == ("str",),
        ),
    )
    kind, location = first["type"], first["loc"]
    param = _field_path(location)
    if kind == "extra_forbidden":
        fields = model.model_fields if len(location) == 1 else {}
        known = [field for field, about in fields.items() if about.annotation is not JsonValue]
        name = shorten(str(location[-1]))
        text = unknown_name("field", name, known) if known else f"unknown field '{param}'"
        return ApiError(400, text, param, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"'{param}' is missing", param, "missing_required_parameter")
    message = _IN_JSON.get(kind) or first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"'{param}': {message}" if param else message, param, "invalid_value")


def _field_path(location: Sequence[int | str]) -> str | None:
    """('messages', 0, 'content', 'str') -> 'messages[0].content': pydantic's union tags are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("str", "list[TextPart]"):
            path += f".{shorten(part)}" if path else shorten(part)
    return path or None
