"""From checked requests to jobs of the model's thread: defaults filled in, weights resolved, limits kept."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from mahalo_ray.config import SamplingConfig, ServeConfig
from mahalo_ray.data.records import Message
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.responses import Choices, Completion
from mahalo_ray.serving.schema import ApiError, ChatRequest, Limits, ScoreRequest, ServedStrategy, weights_of
from mahalo_ray.serving.worker import Engine, Job, Worker


@dataclass(frozen=True, repr=False)
class KeyDigest:
    """A salted digest of the key: what travels through Ray to the replicas instead of the key itself."""

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, key: str) -> KeyDigest:
        """Digest with a fresh salt."""
        salt = os.urandom(16)
        return cls(salt, _digest(salt, key))

    @classmethod
    def from_environment(cls, config: ServeConfig) -> KeyDigest | None:
        """The digest of the key in the variable that `api_key_env` names; None if no key is configured.

        ValueError if the variable is unset or empty: an endpoint meant to be protected must not start open.
        """
        if config.api_key_env is None:
            return None
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            raise ValueError(
                f"serve.api_key_env names the environment variable '{config.api_key_env}', which is unset or "
                "empty: put the API key into it, or remove api_key_env to serve without a key"
            )
        return cls.of(key)

    def check(self, authorization: str | None) -> None:
        """Raise ApiError 401 unless the header reads `Bearer KEY` with the right key."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "this server wants an API key: send it as 'Authorization: Bearer KEY'",
                code="missing_api_key",
            )
        # Digests of equal length are compared in constant time; neither key is in the message.
        if not hmac.compare_digest(_digest(self.salt, key.strip()), self.digest):
            raise ApiError(401, "the API key is not the right one", code="invalid_api_key")


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.blake2b(key.encode(), salt=salt, digest_size=32).digest()


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
    """All a service needs beside its models."""

    config: ServeConfig
    model_name: str
    defaults: Defaults = field(default_factory=Defaults)
    key: KeyDigest | None = None


@dataclass(frozen=True)
class ChatJob:
    """One answer to decode. weights None: a policy with a single head; guidance None: no reward model is
    asked.
    """

    messages: list[Message]
    weights: Weights | None
    guidance: Weights | None
    num_candidates: int
    sampling: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int
    strategy: ServedStrategy
    score_temperature: float


@dataclass(frozen=True)
class ScoreJob:
    """Candidate turns to rate."""

    messages: list[Message]
    candidates: list[str]


class Backend(Engine, Protocol):
    """The models: an engine for ChatJob and ScoreJob payloads, run by the model's thread only.

    A ChatJob gets `step(Step)` for every accepted step, then `finish(Reply)`; a ScoreJob gets `finish` with
    one {objective: score} per candidate.
    """

    objectives: tuple[str, ...]  # empty: an ordinary model with a single head
    guidance_objectives: tuple[str, ...]  # empty: no reward model


class ChatService:
    """One replica's service. Constructed once its models are loaded."""

    def __init__(self, backend: Backend, settings: ServiceSettings) -> None:
        self.backend, self.settings = backend, settings
        config, defaults = settings.config, settings.defaults
        self.limits = Limits(
            config.max_candidates, config.max_new_tokens, config.max_messages, config.max_request_bytes
        )
        self.weights: Weights | None = None
        if backend.objectives:
            self.weights = defaults.objectives or Weights.balanced(backend.objectives)
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
        self.worker = Worker(
            backend,
            config.max_ongoing_requests,
            config.max_queued_requests,
            config.batch_window_s,
        )

    def chat(self, request: ChatRequest) -> tuple[Job, Completion]:
        """Queue an answer. ApiError if the request asks for what this server does not have or allow."""
        request.check(self.limits)
        self._check_model(request.model)
        self._check_last(request.messages[-1].role)
        defaults = self.settings.defaults
        weights = self._weights(request)
        strategy = self._strategy(request)
        guidance = self._guidance(request, strategy, weights)
        payload = ChatJob(
            messages=[message.as_record() for message in request.messages],
            weights=weights,
            guidance=guidance,
            num_candidates=1 if guidance is None else request.num_candidates or defaults.num_candidates,
            sampling=self._sampling(request),
            max_new_tokens=request.token_limit
            or min(defaults.sampling.max_new_tokens, self.limits.max_new_tokens),
            stop=tuple(request.stop),
            seed=secrets.randbits(31) if request.seed is None else request.seed,
            strategy=strategy,
            score_temperature=1.0 if request.score_temperature is None else request.score_temperature,
        )
        choices = Choices(weights, guidance, strategy, payload.num_candidates, payload.seed)
        return self._submit(payload), Completion(self.settings.model_name, choices)

    def score(self, request: ScoreRequest) -> Job:
        """Queue a rating of candidate turns."""
        request.check(self.limits)
        if request.model is not None:
            self._check_model(request.model)
        if not self.backend.guidance_objectives:
            raise ApiError(400, "this server has no reward model to score with", code="no_reward_model")
        payload = ScoreJob([message.as_record() for message in request.messages], request.candidates)
        return self._submit(payload)

    def models(self) -> dict[str, Any]:
        """The answer of GET /v1/models; objectives, limits and defaults beside OpenAI's fields."""
        defaults = self.settings.defaults
        model = {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "mahalo_ray",
            "objectives": list(self.backend.objectives),
            "guidance_objectives": list(self.backend.guidance_objectives),
            "limits": {
                "max_candidates": self.limits.max_candidates,
                "max_tokens": self.limits.max_new_tokens,
            },
            "defaults": {
                "objectives": dict(self.weights or {}),
                "guidance": None
                if not self.backend.guidance_objectives
                else dict(self._default_guidance(self.weights)),
                "num_candidates": defaults.num_candidates,
            },
        }
        return {"object": "list", "data": [model]}

    def _submit(self, payload: ChatJob | ScoreJob) -> Job:
        job = Job(payload, self.settings.config.request_timeout_s)
        self.worker.submit(job)
        return job

    def _weights(self, request: ChatRequest) -> Weights | None:
        if self.weights is None:
            if request.objectives is not None:
                raise ApiError(400, "the model here has a single head: leave 'objectives' out", "objectives")
            return None
        return weights_of(request.objectives, self.backend.objectives, self.weights, "objectives")

    def _strategy(self, request: ChatRequest) -> ServedStrategy:
        """The asked-for strategy: with a reward model "argmax" unless said otherwise, without one "none"."""
        if self.backend.guidance_objectives:
            return request.strategy or "argmax"
        for name, given in (
            ("strategy", request.strategy not in (None, "none")),
            ("guidance", request.guidance is not None),
            ("num_candidates", request.num_candidates not in (None, 1)),
        ):
            if given:
                message = f"this server has no reward model to choose with: leave '{name}' out"
                raise ApiError(400, message, name, "no_reward_model")
        return "none"

    def _guidance(
        self, request: ChatRequest, strategy: ServedStrategy, weights: Weights | None
    ) -> Weights | None:
        if strategy == "none":
            return None
        known = self.backend.guidance_objectives
        # Who asks for other objectives wants to be guided by them too, unless told otherwise.
        default = self._shared(weights) if request.objectives is not None else self._default_guidance(weights)
        return weights_of(request.guidance, known, default, "guidance")

    def _default_guidance(self, weights: Weights | None) -> Weights:
        configured = self.settings.defaults.guidance
        return self._shared(weights) if configured is None else configured

    def _shared(self, weights: Weights | None) -> Weights:
        """The decoding weights over the reward model's objectives; balanced if it has none of them."""
        known = self.backend.guidance_objectives
        shared = {name: value for name, value in (weights or {}).items() if name in known and value > 0}
        return Weights(shared) if shared else Weights.balanced(known)

    def _sampling(self, request: ChatRequest) -> SamplingParams:
        names = set(SamplingParams.model_fields)
        given = request.model_dump(include=names, exclude_none=True)
        defaults = self.settings.defaults.sampling.model_dump(include=names)
        return SamplingParams.model_validate(defaults | given)

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            raise ApiError(
                404,
                f"there is no model '{name}' here; this server has '{self.settings.model_name}'",
                "model",
                "model_not_found",
            )

    def _check_last(self, role: str) -> None:
        if role == "assistant":
            raise ApiError(
                400,
                "the last message is the assistant's: there is nothing to answer",
                "messages",
                "invalid_value",
            )
