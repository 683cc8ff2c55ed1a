"""What clients send: the supported part of OpenAI's chat completions API, and our fields beside it.

A field we do not know is an error, never ignored. Every error has OpenAI's form
`{"error": {"message", "type", "param", "code"}}`, with the wrong field in `param`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mahalo_ray.config.section import Temperature
from mahalo_ray.data.records import Message
from mahalo_ray.objectives import Weights, unknown_name

# Those that a running batch can be joined with; beam searches need one of their own.
ServedStrategy = Literal["argmax", "sample", "best_of_n", "none"]

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_OBJECTIVES = 64
MAX_SEED = 2**63 - 1


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
        """The JSON answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds where a later try makes sense, `WWW-Authenticate` with 401."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def internal_error() -> ApiError:
    """500 without details: they are in the server's log, and none of the client's business."""
    return ApiError(500, "something went wrong in the server; its log says what", code="internal_error")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_candidates: int
    max_new_tokens: int
    max_messages: int
    max_request_bytes: int


class Payload(BaseModel):
    """Base of request bodies: unknown fields are errors, and "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Payload):
    """The text form of OpenAI's content parts."""

    type: Literal["text"]
    text: str


class ChatMessage(Payload):
    """One message; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def as_record(self) -> Message:
        """The message as everything else here knows it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


Messages = Annotated[list[ChatMessage], Field(min_length=1)]
WeightMap = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class StreamOptions(Payload):
    """`include_usage`: a last chunk carries the token counts."""

    include_usage: bool = False


class ChatRequest(Payload):
    """POST /v1/chat/completions. Sampling fields left out take the server's defaults.

    objectives: decoding weights over the policy's heads; guidance: weights over the reward model's objectives
    (the objectives' weights when left out). strategy: how one of num_candidates is chosen at every step, as
    in `GuidedRequest`; left out, "argmax" where there is a reward model, else "none".
    """

    model: str
    messages: Messages
    temperature: Annotated[Temperature, Field(le=2)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: list[str] = []
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    objectives: WeightMap | None = None
    guidance: WeightMap | None = None
    num_candidates: Annotated[int, Field(ge=1)] | None = None
    strategy: ServedStrategy | None = None
    score_temperature: Annotated[float, Field(gt=0, le=1000)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _stop_bounds(cls, value: list[str]) -> list[str]:
        if len(value) > MAX_STOP_STRINGS:
            raise ValueError(f"{len(value)} stop strings: at most {MAX_STOP_STRINGS}")
        if any(not 1 <= len(text) <= MAX_STOP_LENGTH for text in value):
            raise ValueError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters")
        return value

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(400, "give 'max_tokens' or 'max_completion_tokens', not both", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' goes with 'stream': true only", "stream_options")
        if self.strategy == "none" and self.num_candidates not in (None, 1):
            raise ApiError(
                400, "strategy 'none' decodes one candidate: leave 'num_candidates' out", "num_candidates"
            )
        if self.score_temperature is not None and self.strategy != "sample":
            raise ApiError(400, "'score_temperature' goes with strategy 'sample' only", "score_temperature")
        if self.strategy == "none" and self.guidance is not None:
            raise ApiError(400, "strategy 'none' uses no reward model: leave 'guidance' out", "guidance")
        return self

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self, limits: Limits) -> None:
        """Raise ApiError naming the first field beyond the server's limits."""
        _at_most(limits.max_messages, len(self.messages), "messages")
        _at_most(limits.max_candidates, self.num_candidates, "num_candidates")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        _at_most(limits.max_new_tokens, self.token_limit, name)


class ScoreRequest(Payload):
    """POST /v1/score: how the reward model rates each candidate as the next turn after `messages`."""

    model: str | None = None
    messages: Messages
    candidates: Annotated[list[str], Field(min_length=1)]

    def check(self, limits: Limits) -> None:
        """Raise ApiError naming the first field beyond the server's limits."""
        _at_most(limits.max_messages, len(self.messages), "messages")
        _at_most(limits.max_candidates, len(self.candidates), "candidates")
        for index, text in enumerate(self.candidates):
            if not text.strip():
                raise ApiError(400, "the candidate is empty", f"candidates[{index}]")


def _at_most(limit: int, value: int | None, param: str) -> None:
    if value is not None and value > limit:
        raise ApiError(400, f"'{param}': {value} is more than this server's limit of {limit}", param)


RequestBody = TypeVar("RequestBody", bound=Payload)


def parse(model: type[RequestBody], body: bytes) -> RequestBody:
    """A request from its JSON bytes; ApiError 400 naming the first wrong field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error, model) from None


def weights_of(
    values: Mapping[str, float] | None, known: Sequence[str], default: Weights, param: str
) -> Weights:
    """The named weights over the known objectives, or the default; ApiError 400 naming `param.objective`."""
    if values is None:
        return default
    if len(values) > MAX_OBJECTIVES:
        raise ApiError(400, f"{len(values)} weights are too many: at most {MAX_OBJECTIVES}", param)
    for name in values:
        if name not in known:
            raise ApiError(
                400, unknown_name("objective", name, known), f"{param}.{name}", "unknown_objective"
            )
    try:
        return Weights(values)
    except ValueError as error:
        raise ApiError(400, str(error), param) from None


def _explained(error: ValidationError, model: type[BaseModel]) -> ApiError:
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
    if kind == "json_invalid":
        return ApiError(400, f"the request body is not valid JSON: {first['msg']}", code="invalid_json")
    param = _param(location)
    if kind == "extra_forbidden":
        known = model.model_fields if len(location) == 1 else ()
        name = str(location[-1])
        text = unknown_name("field", name, known) if known else f"unknown field '{param}'"
        return ApiError(400, text, param, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"'{param}' is missing", param, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"'{param}': {message}" if param else message, param, "invalid_value")


def _param(location: Sequence[int | str]) -> str | None:
    """('messages', 0, 'content', 'str') -> 'messages[0].content': pydantic's union tags are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("str", "list[TextPart]"):
            path += f".{part}" if path else part
    return path or None
