"""What the server answers: OpenAI's objects, with our `mahalo` field beside theirs.

These classes build the answers and, through FastAPI, document them at /openapi.json.
"""

from __future__ import annotations

import random
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import ClassVar, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from mahalo_ray.decoding.guidance import GuidedResult, Step
from mahalo_ray.decoding.stopping import StopReason
from mahalo_ray.serving.answer_job import Answer, AnswerPart, AnswersWanted, TokenReport
from mahalo_ray.serving.front import ObjectiveReport

END_OF_STREAM = "data: [DONE]\n\n"
# Of answers. Asking the system for each would give the interpreter away to the model's thread every time.
_IDS = random.Random(secrets.randbits(256))
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


class RankedText(BaseModel):
    """A token with its log-probability in nats; `bytes`: its part of the answer's UTF-8, null where the
    tokenizer does not say."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(RankedText):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[RankedText] = []


class ChatLogprobs(BaseModel):
    """Log-probabilities under the policy at temperature 1, before `top_p` and the like cut anything off."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionChoice(BaseModel):
    """One answer. `mahalo`: where `n` answers were asked for, what decided this one."""

    index: int = 0
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    mahalo: AnswerReport | None = None


class ChatCompletion(BaseModel):
    """The answer of a request without streaming. `mahalo`: that of the first choice."""

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
    """What a chunk adds to one answer; log-probabilities of all its tokens come with its last chunk."""

    index: int = 0
    delta: MessageDelta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream: a step of a guided answer, a token of another one, or the end."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None
    mahalo: StepReport | AnswerReport | None = None


class TextLogprobs(BaseModel):
    """The log-probabilities of OpenAI's older API: lists of equal length, null for the first token of a
    prompt, which nothing predicts. `text_offset`: where each token begins, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(BaseModel):
    """The answer of POST /v1/completions, and every event of its stream."""

    id: str
    created: int
    model: str
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: TokenUsage | None = None
    objectives: dict[str, float] | None = Field(default=None, description="the decoding weights")


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
    max_choices: int


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
    students: list[str] = Field(description="what simulated students begin with: POST /v1/student plays them")
    merged_weights: list[dict[str, float]] = Field(
        description="the only weights there are, of a model on a completion server; empty: any weights"
    )
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


class AnswerWriter(ABC):
    """The objects that bring the answers of one request, with one identity: all at once, or the events of a
    stream."""

    prefix: ClassVar[str]

    def __init__(self, model: str, wanted: AnswersWanted) -> None:
        self._model, self._wanted = model, wanted
        self._id, self._created = f"{self.prefix}-{_IDS.getrandbits(96):024x}", int(time.time())
        self._started = time.monotonic()
        self._streamed = [""] * len(wanted.requests)

    @abstractmethod
    def whole(self, answers: Sequence[Answer]) -> BaseModel:
        """The answer of a request without streaming."""

    def stream_opening(self, echoed: Sequence[str], with_usage: bool) -> Iterator[str]:
        """The first event of every answer, sent as soon as the models have taken the request."""
        for index, text in enumerate(echoed):
            yield self._opening(index, text, TokenUsage.of(0, 0) if with_usage else None)

    def stream_part(self, part: AnswerPart, with_usage: bool) -> str:
        """The event of one part."""
        self._streamed[part.index] += part.text
        usage = TokenUsage.of(part.prompt_tokens, part.answer_tokens)
        return self._part(part, usage if with_usage else None)

    def stream_ends(self, answers: Sequence[Answer], with_usage: bool) -> Iterator[str]:
        """The events that say why each answer ended, with what was held back of its text."""
        for index, answer in enumerate(answers):
            rest = answer.result.text[len(self._streamed[index]) :]
            yield self._end(index, answer, rest, self._usage([answer]) if with_usage else None)

    @abstractmethod
    def stream_usage(self, answers: Sequence[Answer]) -> str:
        """The event with the token counts (`stream_options.include_usage`)."""

    @abstractmethod
    def _opening(self, index: int, echoed: str, usage: TokenUsage | None) -> str: ...

    @abstractmethod
    def _part(self, part: AnswerPart, usage: TokenUsage | None) -> str: ...

    @abstractmethod
    def _end(self, index: int, answer: Answer, rest: str, usage: TokenUsage | None) -> str: ...

    def _usage(self, answers: Sequence[Answer]) -> TokenUsage:
        """Tokens of all answers, every prompt counted once."""
        prompts = {}
        for index, answer in enumerate(answers):
            request, raw = self._wanted.requests[index], self._wanted.prompts[index]
            prompts[id(request.messages) if raw is None else id(raw)] = answer.result.prompt_tokens
        return TokenUsage.of(sum(prompts.values()), sum(len(a.result.token_ids) for a in answers))


class ChatWriter(AnswerWriter):
    """Writes OpenAI's chat completions."""

    prefix = "chatcmpl"

    def whole(self, answers: Sequence[Answer]) -> ChatCompletion:
        reports = [self._report(index, answer) for index, answer in enumerate(answers)]
        choices = [
            CompletionChoice(
                index=index,
                message=AnswerMessage(content=answer.result.text),
                finish_reason=_finish_reason(answer.result),
                logprobs=_chat_logprobs(answer),
                mahalo=report if len(answers) > 1 else None,
            )
            for index, (answer, report) in enumerate(zip(answers, reports, strict=True))
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._usage(answers),
            mahalo=reports[0],
        )

    def stream_usage(self, answers: Sequence[Answer]) -> str:
        return self._event([], self._usage(answers), None)

    def _opening(self, index: int, echoed: str, usage: TokenUsage | None) -> str:
        delta = MessageDelta(role="assistant", content="")
        return self._event([ChunkChoice(index=index, delta=delta)], usage, None)

    def _part(self, part: AnswerPart, usage: TokenUsage | None) -> str:
        """A step that was chosen among candidates brings them in `mahalo`."""
        choice = ChunkChoice(index=part.index, delta=MessageDelta(content=part.text))
        guided = self._wanted.requests[part.index].is_guided
        return self._event([choice], usage, StepReport.of(part.step) if guided else None)

    def _end(self, index: int, answer: Answer, rest: str, usage: TokenUsage | None) -> str:
        choice = ChunkChoice(
            index=index,
            delta=MessageDelta(content=rest) if rest else MessageDelta(),
            finish_reason=_finish_reason(answer.result),
            logprobs=_chat_logprobs(answer),
        )
        return self._event([choice], usage, self._report(index, answer))

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

    def _report(self, index: int, answer: Answer) -> AnswerReport:
        request, result = self._wanted.requests[index], answer.result
        steps = [StepReport.of(step) for step in result.steps]
        if not request.is_guided:  # streamed, every token has been a step
            tokens = len(result.token_ids)
            steps = [StepReport(chosen=0, candidates=[CandidateReport(text=result.text, tokens=tokens)])]
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


class TextWriter(AnswerWriter):
    """Writes OpenAI's older completions."""

    prefix = "cmpl"

    def whole(self, answers: Sequence[Answer]) -> TextCompletion:
        choices = [
            TextChoice(
                index=index,
                text=answer.echoed + answer.result.text,
                logprobs=_text_logprobs(answer),
                finish_reason=_finish_reason(answer.result),
            )
            for index, answer in enumerate(answers)
        ]
        return self._object(choices, self._usage(answers))

    def stream_usage(self, answers: Sequence[Answer]) -> str:
        return self._event([], self._usage(answers))

    def _opening(self, index: int, echoed: str, usage: TokenUsage | None) -> str:
        return self._event([TextChoice(index=index, text=echoed, finish_reason=None)], usage)

    def _part(self, part: AnswerPart, usage: TokenUsage | None) -> str:
        return self._event([TextChoice(index=part.index, text=part.text, finish_reason=None)], usage)

    def _end(self, index: int, answer: Answer, rest: str, usage: TokenUsage | None) -> str:
        choice = TextChoice(
            index=index,
            text=rest,
            logprobs=_text_logprobs(answer),
            finish_reason=_finish_reason(answer.result),
        )
        return self._event([choice], usage)

    def _event(self, choices: list[TextChoice], usage: TokenUsage | None) -> str:
        return event(self._object(choices, usage).model_dump_json())

    def _object(self, choices: list[TextChoice], usage: TokenUsage | None) -> TextCompletion:
        weights = self._wanted.requests[0].weights
        return TextCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            objectives=None if weights is None else dict(weights),
        )


def event(data: str) -> str:
    """One server-sent event."""
    return f"data: {data}\n\n"


def _finish_reason(result: GuidedResult) -> FinishReason:
    return "length" if result.stop_reason in _CUT_SHORT else "stop"


def _chat_logprobs(answer: Answer) -> ChatLogprobs | None:
    if answer.tokens is None:
        return None
    content = [
        TokenLogprob(
            token=report.text,
            logprob=report.logp or 0.0,
            bytes=_bytes_of(report),
            top_logprobs=[
                RankedText(token=other.text, logprob=other.logp or 0.0, bytes=_bytes_of(other))
                for other in report.top
            ],
        )
        for report in answer.tokens
    ]
    return ChatLogprobs(content=content)


def _bytes_of(report: TokenReport) -> list[int] | None:
    return list(report.raw) or None


def _text_logprobs(answer: Answer) -> TextLogprobs | None:
    reports = answer.tokens
    if reports is None:
        return None
    tops: list[dict[str, float] | None] = []
    for report in reports:
        ranked: dict[str, float] = {}
        # The token itself is among them, also where it is not one of the likeliest.
        for other in (*report.top, report):
            if other.logp is not None:
                ranked.setdefault(other.text, other.logp)
        tops.append(ranked or None)
    lengths = [len(report.text) if report.is_text else 0 for report in reports]
    return TextLogprobs(
        tokens=[report.text for report in reports],
        token_logprobs=[report.logp for report in reports],
        top_logprobs=tops if any(report.top for report in reports) else None,
        text_offset=list(accumulate([0, *lengths[:-1]])) if lengths else [],
    )
