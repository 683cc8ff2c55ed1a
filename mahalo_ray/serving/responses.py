"""What the server answers: OpenAI's chat completion objects, with our `mahalo` field beside theirs.

These classes build the answers and, through FastAPI, document them at /openapi.json.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Step
from mahalo_ray.decoding.stopping import StopReason
from mahalo_ray.serving.front import ObjectiveReport

END_OF_STREAM = "data: [DONE]\n\n"
_CUT_SHORT = (StopReason.LENGTH, StopReason.CONTEXT, StopReason.STEPS)

FinishReason = Literal["stop", "length"]


class TokenUsage(BaseModel):
    """Tokens of the prompt and of the answer (not of the candidates that were not chosen)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> TokenUsage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class CandidateReport(BaseModel):
    """One candidate step. `scores`: the reward model's, per objective; `total`: what the choice was made by;
    both null when no reward model was asked."""

    text: str
    tokens: int
    scores: dict[str, float] | None = None
    total: float | None = None


class StepReport(BaseModel):
    """One accepted step: its candidates and which of them was chosen."""

    chosen: int
    candidates: list[CandidateReport]

    @classmethod
    def of(cls, step: Step) -> StepReport:
        candidates = [
            CandidateReport(
                text=candidate.text,
                tokens=len(candidate.token_ids),
                scores=candidate.scores or None,
                total=candidate.total,
            )
            for candidate in step.candidates
        ]
        return cls(chosen=step.chosen, candidates=candidates)


class AnswerReport(BaseModel):
    """What decided an answer, so that it can be asked for again, and what it took. The stream of an answer
    without guidance ends with a single step: the whole answer."""

    objectives: dict[str, float] | None
    strength: float
    guidance: dict[str, float] | None
    strategy: str
    num_candidates: int
    seed: int
    steps: list[StepReport]
    sampled_tokens: int = Field(description="tokens of all candidates together")
    seconds: float


class AnswerMessage(BaseModel):
    """The assistant's answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class CompletionChoice(BaseModel):
    """The only choice there is."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The answer of a request without streaming."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[CompletionChoice]
    usage: TokenUsage
    mahalo: AnswerReport


class MessageDelta(BaseModel):
    """What a chunk adds to the answer; the first one carries the role. What is not there is left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class ChunkChoice(BaseModel):
    """The only choice of a chunk."""

    index: Literal[0] = 0
    delta: MessageDelta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream: a step of a guided answer, a token of another one, or the end."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None
    mahalo: StepReport | AnswerReport | None = None


class ScoredCandidate(BaseModel):
    """The reward model's scores of one candidate turn."""

    object: Literal["score"] = "score"
    index: int
    scores: dict[str, float]


class ScoreList(BaseModel):
    """The answer of POST /v1/score."""

    object: Literal["list"] = "list"
    model: str
    data: list[ScoredCandidate]


class ServedLimits(BaseModel):
    """What one request may ask for."""

    max_candidates: int
    max_tokens: int
    max_strength: float = Field(description="1 where the model here has one strength only")


class ServedDefaults(BaseModel):
    """What a request gets that does not say otherwise."""

    objectives: dict[str, float]
    guidance: dict[str, float] | None
    num_candidates: int


class ServedModel(BaseModel):
    """A model of GET /v1/models; objectives, limits and defaults beside OpenAI's fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mahalo_ray"
    objectives: list[str]
    guidance_objectives: list[str]
    descriptions: list[ObjectiveReport]
    examples: list[str] = Field(description="questions to begin with; empty where the run knows none")
    limits: ServedLimits
    defaults: ServedDefaults


class ServedModels(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class ReplicaStatus(BaseModel):
    """The answer of GET /health and GET /ready."""

    status: Literal["ok", "ready"]


class ErrorDetails(BaseModel):
    """`param`: the field that is wrong; `code`: a short name of the problem."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer of a status other than 200."""

    error: ErrorDetails


@dataclass(frozen=True)
class AnswerPart:
    """A part of an answer that is still growing: the text it adds and the step it comes from. Parts with
    equal text are equal."""

    text: str
    step: Step = field(compare=False)
    usage: TokenUsage = field(compare=False)


class Completion:
    """The identity shared by an answer's objects: one completion, or the chunks of one stream."""

    def __init__(self, model: str, request: GuidedRequest) -> None:
        self._model, self._request = model, request
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._started = time.monotonic()
        self._streamed = ""

    def whole(self, result: GuidedResult) -> ChatCompletion:
        """The answer of a request without streaming."""
        message = AnswerMessage(content=result.text)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[CompletionChoice(message=message, finish_reason=_finish_reason(result))],
            usage=_usage(result),
            mahalo=self._report(result, [StepReport.of(step) for step in result.steps]),
        )

    def chunk(self, part: AnswerPart, with_usage: bool) -> str:
        """The event of one part. A step that was chosen among candidates brings them in `mahalo`."""
        delta = MessageDelta(content=part.text)
        if not self._streamed:
            delta.role = "assistant"
        self._streamed += part.text
        report = StepReport.of(part.step) if self._request.is_guided else None
        return self._event([ChunkChoice(delta=delta)], part.usage if with_usage else None, report)

    def last(self, result: GuidedResult, with_usage: bool) -> str:
        """The event that says why the answer ended, with what was held back of its text."""
        rest = result.text[len(self._streamed) :]
        delta = MessageDelta(content=rest) if rest else MessageDelta()
        choice = ChunkChoice(delta=delta, finish_reason=_finish_reason(result))
        steps = [StepReport.of(step) for step in result.steps]
        if not self._request.is_guided:  # every token has been a step
            tokens = len(result.token_ids)
            steps = [StepReport(chosen=0, candidates=[CandidateReport(text=result.text, tokens=tokens)])]
        return self._event([choice], _usage(result) if with_usage else None, self._report(result, steps))

    def usage(self, result: GuidedResult) -> str:
        """The event with the token counts (`stream_options.include_usage`)."""
        return self._event([], _usage(result), None)

    def _event(
        self, choices: list[ChunkChoice], usage: TokenUsage | None, report: StepReport | AnswerReport | None
    ) -> str:
        body = ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            mahalo=report,
        )
        absent = {name for name, value in (("usage", usage), ("mahalo", report)) if value is None}
        return event(body.model_dump_json(exclude=absent))

    def _report(self, result: GuidedResult, steps: list[StepReport]) -> AnswerReport:
        request = self._request
        return AnswerReport(
            objectives=None if request.weights is None else dict(request.weights),
            strength=request.strength,
            guidance=None if request.guidance is None else dict(request.guidance),
            strategy=request.strategy,
            num_candidates=request.num_candidates,
            seed=request.seed,
            steps=steps,
            sampled_tokens=sum(len(c.token_ids) for step in result.steps for c in step.candidates),
            seconds=time.monotonic() - self._started,
        )


def event(data: str) -> str:
    """One server-sent event."""
    return f"data: {data}\n\n"


def _finish_reason(result: GuidedResult) -> FinishReason:
    return "length" if result.stop_reason in _CUT_SHORT else "stop"


def _usage(result: GuidedResult) -> TokenUsage:
    return TokenUsage.of(result.prompt_tokens, len(result.token_ids))
