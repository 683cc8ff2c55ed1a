"""From checked requests to jobs of the model's thread: defaults filled in, weights resolved, limits kept."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from mahalo_ray.config import Aggregation, SamplingConfig, SamplingParams, ServeConfig
from mahalo_ray.data.records import Message
from mahalo_ray.decoding.guidance import GuidedRequest, Standardisation
from mahalo_ray.decoding.guided import derived_seeds
from mahalo_ray.objectives import Weights, unknown_name
from mahalo_ray.serving.answer_job import AnswersWanted, ModelLoad, RawPrompt
from mahalo_ray.serving.api_key import KeyDigests, RateLimiter
from mahalo_ray.serving.front import (
    Front,
    Measurements,
    ObjectiveReport,
    PortfolioMember,
    PortfolioReport,
    describe,
)
from mahalo_ray.serving.model_thread import Job, JobRunner, ModelThread
from mahalo_ray.serving.prometheus import ReplicaMetrics
from mahalo_ray.serving.responses import (
    ChatWriter,
    ServedDefaults,
    ServedLimits,
    ServedModel,
    TextWriter,
)
from mahalo_ray.serving.schema import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    FullReplica,
    Overloaded,
    RequestLimits,
    SamplingFields,
    ScoreRequest,
    ServedStrategy,
    StudentRequest,
    shorten,
    weights_of,
)
from mahalo_ray.serving.simulated import SimulatedStudents, StudentReply

MAX_DERIVED_SEED = 2**53 - 1  # what JavaScript reads without loss

RequestBody = TypeVar("RequestBody", bound=SamplingFields)

# Of a request: a few milliseconds of a tokenizer, and more than most prompts have.
_LONG_CHARACTERS = 10_000


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise. None: balanced weights over all objectives; guidance
    None: the request's decoding weights, as far as the reward model knows their objectives.
    """

    objectives: Weights | None = None
    guidance: Weights | None = None
    num_candidates: int = 4
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class ServiceSettings:
    """All a service needs beside its models. `descriptions`: what objectives mean, for people; `examples`:
    questions to begin with; `students`: who can answer in the place of a person."""

    config: ServeConfig
    model_name: str
    defaults: Defaults = field(default_factory=Defaults)
    key: KeyDigests | None = None
    descriptions: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    students: SimulatedStudents | None = None


class Backend(JobRunner, Protocol):
    """The models: an engine for `AnswersWanted` and `ScoreRequest` payloads, run by the model's thread."""

    objectives: tuple[str, ...]  # empty: an ordinary model with a single head
    guidance_objectives: tuple[str, ...]  # empty: no reward model
    served_weights: tuple[Weights, ...]  # the only ones there are; empty: any weights over the objectives
    has_strength: bool  # whether the policy can be decoded at other strengths than 1
    has_logprobs: bool  # whether the log-probabilities of tokens can be had
    standardisation: Standardisation  # of the reward model's scores
    usage: ModelLoad  # now
    steps_are_turns: bool  # a step is a whole turn, which no limit of its own may cut in two


class ChatService:
    """One replica's service of one policy. Constructed once its models are loaded. `measured`: what the run
    of these models has measured; `give_up`: as of `ModelThread`."""

    def __init__(
        self,
        backend: Backend,
        settings: ServiceSettings,
        measured: Measurements | None = None,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self.backend, self.settings = backend, settings
        measured = measured or Measurements()
        self._measured = measured
        self._front = measured.front(settings.descriptions)
        self._members = {
            name: member
            for name, member in measured.members(settings.model_name).items()
            if self._can_answer_as(member)
        }
        config, defaults = settings.config, settings.defaults
        self.limits = RequestLimits(
            config.max_candidates,
            config.max_new_tokens,
            config.max_messages,
            config.max_strength,
            config.max_choices,
        )
        self.weights: Weights | None = None
        if backend.objectives:
            self.weights = self._default_weights()
            self.weights.over(backend.objectives)
        elif defaults.objectives is not None:
            raise ValueError("decoding weights are configured, but the policy has a single head")
        if defaults.guidance is not None:
            if not backend.guidance_objectives:
                raise ValueError("guidance weights are configured, but there is no reward model")
            defaults.guidance.over(backend.guidance_objectives)
        if defaults.num_candidates > config.max_candidates:
            raise ValueError(
                f"{defaults.num_candidates} candidates by default are more than serve.max_candidates allows "
                f"({config.max_candidates})"
            )
        self.created = int(time.time())
        self.worker = ModelThread(
            backend,
            config.max_ongoing_requests,
            config.max_queued_requests,
            config.batch_window_s,
            give_up,
        )
        self.rate = RateLimiter(config.requests_per_minute)
        self.metrics = ReplicaMetrics(
            self.worker, lambda: backend.usage, backend.guidance_objectives, settings.model_name
        )

    def _default_weights(self) -> Weights:
        """Those of the configuration, else balanced ones; of a completion server the first it has. ValueError
        for configured ones that it has not."""
        configured, served = self.settings.defaults.objectives, self.backend.served_weights
        if not served:
            return configured or Weights.balanced(self.backend.objectives)
        if configured is None:
            return served[0]
        merged = self._merged(configured)
        if merged is None:
            raise ValueError(
                f"the default weights are {configured.label()}, and the completion server has models of "
                f"{self._served()}: add one to 'further_models', or change the defaults"
            )
        return merged

    def _can_answer_as(self, member: PortfolioMember) -> bool:
        """Whether the policy here can be decoded as this member was: on a completion server, only at weights
        that were merged."""
        if not self.backend.served_weights:
            return True
        named = member.objectives
        return member.strength == 1 and (named is None or self._merged(Weights(named)) is not None)

    def _merged(self, weights: Weights) -> Weights | None:
        """These weights as the completion server's model has them; None if it has not."""
        names = self.backend.objectives
        each = self.backend.served_weights
        return next((served for served in each if served.over(names) == weights.over(names)), None)

    def _served(self) -> str:
        return "; ".join(weights.label() for weights in self.backend.served_weights)

    def chat(self, body: ChatCompletionRequest) -> tuple[Job, ChatWriter]:
        """Queue answers. ApiError if the request asks for what this server does not have or allow."""
        asked = self._as_model_says(body)
        asked.check(self.limits)
        self._check_last(body.messages[-1].role)
        weights, strategy = self._weights(asked), self._strategy(asked)
        guidance = self._guidance(asked, strategy, weights)
        default = self.settings.defaults.num_candidates
        limit = body.token_limit or self.settings.defaults.sampling.max_new_tokens
        messages = [message.as_record() for message in body.messages]
        requests = self._requests(
            asked,
            [messages],
            limit,
            weights=weights,
            strength=self._strength(asked),
            guidance=guidance,
            num_candidates=1 if guidance is None else asked.num_candidates or default,
            strategy=strategy,
            score_temperature=1.0 if body.score_temperature is None else body.score_temperature,
            aggregation=self._aggregation(asked, strategy),
        )
        top = self._checked_logprobs((body.top_logprobs or 0) if body.logprobs else None)
        wanted = AnswersWanted(requests, (None,) * len(requests), top)
        return self._submit(wanted, body.stream), ChatWriter(body.model, wanted)

    def complete(self, body: CompletionRequest) -> tuple[Job, TextWriter]:
        """Queue continuations of texts; ApiError as `chat`."""
        asked = self._as_model_says(body)
        asked.check(self.limits)
        raw = [RawPrompt(prompt) for prompt in body.prompt]
        # No reward model reads these, so the messages are never looked at.
        unread = [[Message(role="user", content="")] for _ in raw]
        requests = self._requests(
            asked,
            unread,
            body.max_tokens or 1,
            weights=self._weights(asked),
            strength=self._strength(asked),
            guidance=None,
            num_candidates=1,
            strategy="none",
        )
        prompts = tuple(prompt for prompt in raw for _ in range(body.n))
        top = self._checked_logprobs(body.logprobs)
        wanted = AnswersWanted(requests, prompts, top, body.echo, generates=body.max_tokens > 0)
        return self._submit(wanted, body.stream), TextWriter(body.model, wanted)

    def _requests(
        self,
        body: SamplingFields,
        conversations: Sequence[Sequence[Message]],
        max_tokens: int,
        **options: Any,
    ) -> tuple[GuidedRequest, ...]:
        """`n` requests for each of the conversations, `max_tokens` capped."""
        max_new_tokens = min(max_tokens, self.limits.max_new_tokens)
        seed = secrets.randbits(31) if body.seed is None else body.seed
        seeds = [seed]
        if body.n > 1:  # deriving is work for torch, which no ordinary request needs here
            seeds += (derived & MAX_DERIVED_SEED for derived in derived_seeds(seed, body.n)[1:])
        try:
            return tuple(
                GuidedRequest(
                    messages,
                    seed=own_seed,
                    sampling=self._sampling(body),
                    max_new_tokens=max_new_tokens,
                    max_step_tokens=(
                        max_new_tokens if self.backend.steps_are_turns else GuidedRequest.max_step_tokens
                    ),
                    min_tokens=max_new_tokens if body.ignore_eos else min(body.min_tokens, max_new_tokens),
                    repetition_penalty=body.repetition_penalty,
                    stop=tuple(body.stop),
                    standardisation=self.backend.standardisation,
                    **options,
                )
                for messages in conversations
                for own_seed in seeds
            )
        except ValueError as error:  # the schema is stricter; this is the net below it
            raise ApiError(400, str(error), code="invalid_value") from None

    def score(self, body: ScoreRequest) -> Job:
        """Queue a rating of candidate turns."""
        if body.model is not None:
            self._carried(body.model)
        if not self.backend.guidance_objectives:
            raise ApiError(400, "this server has no reward model to score with", code="no_reward_model")
        return self._submit(body, streams=False)

    def student(self, body: StudentRequest) -> StudentReply:
        """What the simulated student says next; ApiError 404 where there is none."""
        if body.model is not None:
            self._carried(body.model)
        students = self.settings.students
        if students is None:
            raise ApiError(404, "the run behind this server has no simulated students", code="no_student")
        return students.reply([message.as_record() for message in body.messages])

    def models(self) -> list[ServedModel]:
        """The answer of GET /v1/models: the model, and one more id for every member of the portfolio."""
        return [self.model(name) for name in (self.settings.model_name, *self._members)]

    def model(self, name: str) -> ServedModel:
        """The answer of GET /v1/models/{name}; ApiError 404 for another name."""
        carried = self._carried(name)
        weights = Weights(carried["objectives"]) if "objectives" in carried else self.weights
        guidance = None
        if self.backend.guidance_objectives and carried.get("strategy") != "none":
            guidance = self._shared(weights) if "objectives" in carried else self._default_guidance(weights)
            if "guidance" in carried:
                guidance = Weights(carried["guidance"])
        candidates = carried.get("num_candidates", self.settings.defaults.num_candidates)
        return ServedModel(
            id=name,
            created=self.created,
            objectives=list(self.backend.objectives),
            guidance_objectives=list(self.backend.guidance_objectives),
            descriptions=self._described(),
            examples=list(self.settings.examples),
            students=[] if self.settings.students is None else list(self.settings.students.openings),
            limits=ServedLimits(
                max_candidates=self.limits.max_candidates,
                max_tokens=self.limits.max_new_tokens,
                max_strength=self.limits.max_strength if self.backend.has_strength else 1,
                max_choices=self.limits.max_choices,
            ),
            merged_weights=[dict(merged) for merged in self.backend.served_weights],
            defaults=ServedDefaults(
                objectives=dict(weights or {}),
                guidance=None if guidance is None else dict(guidance),
                num_candidates=candidates,
            ),
        )

    def front(self) -> Front:
        """The answer of GET /v1/front; ApiError 404 where nothing was measured."""
        if self._front is None:
            raise ApiError(404, "the run behind this server has no sweep and no evaluation", code="no_front")
        return self._front

    def portfolio(self, weights: str | None) -> PortfolioReport:
        """The answer of GET /v1/portfolio; `weights`: as `accuracy=0.7,engagement=0.3`.

        ApiError 404 where the run has no portfolio, 400 for weights that cannot be read.
        """
        try:
            asked = None if weights is None else Weights.parse(weights)
            report = self._measured.report_portfolio(
                self.settings.model_name, self.settings.descriptions, asked
            )
        except ValueError as error:
            raise ApiError(400, str(error), "weights", "invalid_value") from None
        if report is None:
            raise ApiError(
                404, "the run behind this server has no portfolio of its own policy", code="no_portfolio"
            )
        return report

    def _described(self) -> list[ObjectiveReport]:
        names = dict.fromkeys((*self.backend.objectives, *self.backend.guidance_objectives))
        return describe(tuple(names), self.settings.descriptions)

    def _submit(self, payload: AnswersWanted | ScoreRequest, streams: bool) -> Job:
        is_long = _count_characters(payload) > _LONG_CHARACTERS
        job = Job(payload, self.settings.config.request_timeout_s, streams, is_long)
        self.worker.submit(job)
        return job

    def _weights(self, body: SamplingFields) -> Weights | None:
        if self.weights is None:
            if body.objectives is not None:
                raise ApiError(400, "the model here has a single head: leave 'objectives' out", "objectives")
            return None
        weights = weights_of(body.objectives, self.backend.objectives, self.weights, "objectives")
        if not self.backend.served_weights:
            return weights
        if (merged := self._merged(weights)) is not None:
            return merged
        message = (
            f"the model is on a completion server, where weights are merged in: {self._served()} can be had, "
            f"and not {weights.label()}"
        )
        raise ApiError(400, message, "objectives", "invalid_value")

    def _checked_logprobs(self, count: int | None) -> int | None:
        if count is None or self.backend.has_logprobs:
            return count
        message = "the model here is on a completion server, which is not asked for log-probabilities"
        raise ApiError(400, f"{message}: leave 'logprobs' out", "logprobs")

    def _strength(self, body: SamplingFields) -> float:
        if body.strength in (None, 1) or self.backend.has_strength:
            return 1.0 if body.strength is None else body.strength
        lacking = "its base head was not saved with it" if self.backend.objectives else "it has a single head"
        if not self.backend.has_logprobs:
            lacking = "it is on a completion server"
        message = f"the model here has no strength other than 1, since {lacking}: leave 'strength' out"
        raise ApiError(400, message, "strength")

    def _strategy(self, body: ChatCompletionRequest) -> ServedStrategy:
        """The asked-for strategy: with a reward model "argmax" unless said otherwise, without one "none"."""
        if self.backend.guidance_objectives:
            return body.strategy or "argmax"
        for name, given in (
            ("strategy", body.strategy not in (None, "none")),
            ("guidance", body.guidance is not None),
            ("num_candidates", body.num_candidates not in (None, 1)),
        ):
            if given:
                message = f"this server has no reward model to choose with: leave '{name}' out"
                raise ApiError(400, message, name, "no_reward_model")
        return "none"

    def _aggregation(self, body: ChatCompletionRequest, strategy: ServedStrategy) -> Aggregation:
        if body.aggregation is None:
            return Aggregation()
        if strategy == "none":
            message = "this server has no reward model to compare with: leave 'aggregation' out"
            raise ApiError(400, message, "aggregation", "no_reward_model")
        aggregation = body.aggregation.as_config
        for threshold in map(shorten, (t.objective for t in aggregation.thresholds)):
            if threshold not in self.backend.guidance_objectives:
                raise ApiError(
                    400,
                    unknown_name("objective", threshold, self.backend.guidance_objectives),
                    "aggregation.thresholds",
                    "unknown_objective",
                )
        if aggregation.kind == "thresholds" and strategy == "sample":
            message = "thresholds give an order only, and strategy 'sample' draws: take another of the two"
            raise ApiError(400, message, "aggregation", "invalid_value")
        return aggregation

    def _guidance(
        self, body: ChatCompletionRequest, strategy: ServedStrategy, weights: Weights | None
    ) -> Weights | None:
        if strategy == "none":
            return None
        known = self.backend.guidance_objectives
        # Who asks for other objectives wants to be guided by them too, unless told otherwise.
        default = self._shared(weights) if body.objectives is not None else self._default_guidance(weights)
        return weights_of(body.guidance, known, default, "guidance")

    def _default_guidance(self, weights: Weights | None) -> Weights:
        configured = self.settings.defaults.guidance
        return self._shared(weights) if configured is None else configured

    def _shared(self, weights: Weights | None) -> Weights:
        """The decoding weights over the reward model's objectives; balanced if it has none of them."""
        known = self.backend.guidance_objectives
        shared = {name: value for name, value in (weights or {}).items() if name in known and value > 0}
        return Weights(shared) if shared else Weights.balanced(known)

    def _sampling(self, body: SamplingFields) -> SamplingParams:
        names = set(SamplingParams.model_fields)
        given = body.model_dump(include=names, exclude_none=True)
        defaults = self.settings.defaults.sampling.model_dump(include=names)
        return SamplingParams.model_validate(defaults | given)

    def _as_model_says(self, body: RequestBody) -> RequestBody:
        """The request with what its model id carries; ApiError 404 for an unknown model."""
        carried = self._carried(body.model)
        for name in carried:
            if getattr(body, name) is not None:
                raise ApiError(400, f"the model's id carries it: leave '{name}' out", name)
        if "guidance" in carried and isinstance(body, CompletionRequest):
            message = "this member of the portfolio is guided, which needs a conversation"
            raise ApiError(400, f"{message}: use /v1/chat/completions", "model")
        return body.model_copy(update=carried)

    def _carried(self, name: str) -> dict[str, Any]:
        """The fields of a request in `mahalo@accuracy=0.8,engagement=0.2` or `mahalo@member-1`."""
        _, at, weights = name.partition("@")
        if not at:
            return {}
        if name in self._members:
            return self._fields_of(self._members[name])
        try:
            balance = Weights.parse(weights)
            balance.over(self.backend.objectives)
        except ValueError as error:
            raise ApiError(404, f"the model's id: {error}", "model", "model_not_found") from None
        return {"objectives": dict(balance)}

    def _fields_of(self, member: PortfolioMember) -> dict[str, Any]:
        """The request that is answered as the member was when it was measured."""
        fields: dict[str, Any] = {}
        if member.objectives is not None:
            fields["objectives"] = member.objectives
        if member.strength != 1:
            fields["strength"] = member.strength
        if member.temperature is not None:
            fields["temperature"] = member.temperature
        if member.guidance is not None:
            fields |= {"guidance": member.guidance, "num_candidates": member.num_candidates}
        elif self.backend.guidance_objectives:
            fields["strategy"] = "none"
        return fields

    def _check_last(self, role: str) -> None:
        if role == "assistant":
            raise ApiError(
                400,
                "the last message is the assistant's: there is nothing to answer",
                "messages",
                "invalid_value",
            )


class ReplicaServices:
    """The services of one replica behind one address, chosen by the model id that a client sends. The first
    has the settings of the whole endpoint, and answers where nobody says which."""

    def __init__(self, services: Sequence[ChatService]) -> None:
        self.each = tuple(services)
        self.first = self.each[0]
        self._by_name = {service.settings.model_name: service for service in services}
        self._name = secrets.token_hex(4)

    def of(self, model_id: str | None) -> ChatService:
        """The service of a model id, with or without weights behind it; ApiError 404 for an unknown one."""
        if model_id is None:
            return self.first
        service = self._by_name.get(model_id.partition("@")[0])
        if service is None:
            names = ", ".join(f"'{name}'" for name in self._by_name)
            message = f"there is no model '{shorten(model_id)}' here; this server has {names}"
            raise ApiError(404, message, "model", "model_not_found")
        return service

    def reserve(self) -> AbstractContextManager[None]:
        """Hold a place while a request is parsed, when its model is not known yet: with the service that has
        most room. ApiError 503 when none has any."""
        return min(self.each, key=lambda service: service.worker.num_held).worker.reserve()

    def check_room(self) -> None:
        """ApiError 503 when no service would take a request now: then the proxy is told that all are full."""
        try:
            min(self.each, key=lambda service: service.worker.num_held).worker.check_room()
        except Overloaded as error:
            error.full = FullReplica(self._name, error.pace_s, self.first.settings.config.replicas)
            raise

    @property
    def trouble(self) -> str | None:
        """Why a model cannot answer any more, None while all can."""
        return next((trouble for service in self.each if (trouble := service.worker.trouble)), None)

    @property
    def num_held(self) -> int:
        """Places in use: requests that run, wait or are being parsed."""
        return sum(service.worker.num_held for service in self.each)

    def drain(self) -> None:
        """Take no more requests; those that run or wait are answered."""
        for service in self.each:
            service.worker.drain()

    def close(self) -> None:
        """Answer everything unfinished with 503 and stop."""
        for service in self.each:
            service.worker.close()


def _count_characters(payload: AnswersWanted | ScoreRequest) -> int:
    """Characters (of raw prompts perhaps tokens) to be read; a conversation that is asked `n` times once."""
    if isinstance(payload, ScoreRequest):
        return sum(map(len, [*(message.text for message in payload.messages), *payload.candidates]))
    conversations = {id(request.messages): request.messages for request in payload.requests}
    raw = {id(prompt): prompt.value for prompt in payload.prompts if prompt is not None}
    contents = [Message.model_validate(m).content for messages in conversations.values() for m in messages]
    return sum(map(len, [*contents, *raw.values()]))
