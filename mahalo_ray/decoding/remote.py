"""Guided decoding over somebody else's engine: any OpenAI-compatible /completions server samples, we choose.

Every step is one request for K completions (`n`) of the conversation so far, as token ids, up to the
boundary's stop string. A server that caches prefixes (vLLM) keeps the state that our own engine keeps. The
reward models run here, ours over their kept caches, so a candidate's tokens are scored once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Prompt, StepCandidate
from mahalo_ray.decoding.sampling import SamplingParams, draw_keys
from mahalo_ray.decoding.scorers import RewardModels, ScorerGroup
from mahalo_ray.decoding.session import RequestState, decide_steps
from mahalo_ray.decoding.stopping import AnswerOnly, Boundary, StopReason, StopRule
from mahalo_ray.endpoints import CompletionCall, Endpoint, EndpointReply, Failure
from mahalo_ray.errors import StageError
from mahalo_ray.models.scoring import StepScorer
from mahalo_ray.objectives import Weights

# Where servers say which stop string ended a completion: vLLM, SGLang. None or a number: the end token.
_STOP_FIELDS = ("stop_reason", "matched_stop")
_COUNTED = 64  # tokens


class CompletionServerError(StageError):
    """The server did not answer, or not as the API promises, however often it was asked."""


class CompletionDecoder:
    """`GuidedDecoder` with a completion server in the policy's place; same requests, same results.

    `tokenizer` must be the server's: prompts are sent as token ids, so that special tokens in what users
    write stay plain text. A server's model is one model: per-request weights are only possible as far as
    `served_weights` says what was merged into it (`mahalo export --weights ...`). Beam search and DVTS need
    an engine of our own. Whether the same seed gives the same answer is up to the server. Cache bytes are
    those of the reward models.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        reward_model: StepScorer | Sequence[StepScorer] | None,
        boundary: Boundary | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        served_weights: Weights | None = None,
    ) -> None:
        self.endpoint, self.served_weights = endpoint, served_weights
        self._models = RewardModels(reward_model, boundary, tokenizer)
        self.reward_models, self.scale = self._models.models, self._models.scale
        self.boundary, self.format = self._models.boundary, self._models.format
        # Turned off by a server that does not say what stopped a completion: steps are then cut here.
        self._reports_stops = True

    def generate(self, messages: Sequence[Any], **options: Any) -> GuidedResult:
        """Answer one conversation; options are the fields of `GuidedRequest`."""
        (result,) = self.generate_each([GuidedRequest(messages, **options)])
        if isinstance(result, ValueError):
            raise result
        return result

    def generate_each(self, requests: Sequence[GuidedRequest]) -> list[GuidedResult | ValueError]:
        """Answer many conversations, step by step together; one that cannot be answered is its error.

        CompletionServerError when the server gives up on a request that it could have answered.
        """
        scorers = self._models.follow()
        results: dict[int, GuidedResult | ValueError] = {}
        running: dict[int, RequestState] = {}
        for number, request in enumerate(requests):
            try:
                running[number] = RequestState(request, self._prompt(request, scorers), seed=request.seed)
            except ValueError as error:
                results[number] = error
        guided = [state for state in running.values() if state.request.is_guided]
        for state, row in zip(guided, scorers.open([state.prompt for state in guided]), strict=True):
            state.scorer_row = row
        for state in running.values():
            state.policy_tokens = len(state.prompt_ids)
        while running:
            self._step(running, results, scorers)
        return [results[number] for number in range(len(requests))]

    def _prompt(self, request: GuidedRequest, scorers: ScorerGroup) -> Prompt:
        """The request's prompt; ValueError for what a server cannot do."""
        if request.strategy in ("beam", "dvts"):
            raise ValueError(f"strategy '{request.strategy}' is not possible over a completion server")
        if request.strength != 1:
            raise ValueError(
                f"strength {request.strength:g} is not possible over a completion server, whose model has "
                "its heads merged: serve a merge at this strength (`mahalo export --strength`) instead"
            )
        if request.weights is not None and request.weights != self.served_weights:
            served = "none" if self.served_weights is None else self.served_weights.label()
            raise ValueError(
                f"weights {request.weights.label()} are not what {self.endpoint.config.base_url} was "
                f"declared to serve ({served}): a server's model has its weights merged in. "
                "Serve a merge at these weights (`mahalo export --weights`), or decode with our own engine"
            )
        return self._models.check(request, scorers, _max_context(scorers), "reward model reads")

    def _step(
        self,
        running: dict[int, RequestState],
        results: dict[int, GuidedResult | ValueError],
        scorers: ScorerGroup,
    ) -> None:
        """One step of all requests in play; those that end leave `running` for `results`."""
        candidates = self._candidates(running, scorers)
        numbers = [number for number in running if number in candidates]
        states = [running[number] for number in numbers]
        steps = decide_steps(states, [candidates[n] for n in numbers], scorers, self.scale)
        for state, step in zip(states, steps, strict=True):
            if step is None:
                continue
            state.extend(step, step.text)
            if state.stop_reason is None and _room(state, scorers) < 1:
                state.stop_reason = StopReason.CONTEXT
            if not state.is_over and state.request.is_guided:
                scorers.accept([state.scorer_row], [step.accepted])
        for number, state in [*running.items()]:
            if state.is_over:
                state.cache_bytes = scorers.peak_bytes
                results[number] = state.result() if state.error is None else state.error
                if state.request.is_guided:
                    scorers.drop([state.scorer_row])
                del running[number]

    def _candidates(
        self, running: dict[int, RequestState], scorers: ScorerGroup
    ) -> dict[int, list[StepCandidate]]:
        """Candidates of every request's next step; requests that the server will not answer get their
        error."""
        had_stops, numbers = self._reports_stops, list(running)
        candidates: dict[int, list[StepCandidate]] = {}
        for at, answer in self.endpoint.complete(self._request(running[n], scorers) for n in numbers):
            state = running[numbers[at]]
            if isinstance(answer, Failure):
                state.error = self._refusal(answer)
                continue
            if len(answer.texts) != state.request.candidates_per_step:
                raise CompletionServerError(
                    f"{self.endpoint.config.base_url} sent {len(answer.texts)} completions where "
                    f"{state.request.candidates_per_step} were asked for: it does not support 'n'"
                )
            unclear = any(_stops_silently(answer, k) for k in range(len(answer.texts)))
            if had_stops and unclear and self._stops(state):
                self._reports_stops = False
                return self._candidates(running, scorers)
            state.error, candidates[numbers[at]] = None, self._read(state, answer)
        return candidates

    def _request(self, state: RequestState, scorers: ScorerGroup) -> CompletionCall:
        request, sampling = state.request, state.request.sampling
        extra: dict[str, Any] = {}
        for name in ("top_p", "top_k", "min_p"):
            if getattr(sampling, name) != getattr(SamplingParams(), name):
                extra[name] = getattr(sampling, name)
        limits = state.draw_limits
        if limits.min_tokens:
            extra["min_tokens"] = limits.min_tokens
        if limits.repetition_penalty != 1:
            extra["repetition_penalty"] = limits.repetition_penalty
        stops = self._stops(state) if self._reports_stops else ()
        # Every step draws anew; the API's seeds have 31 bits with some servers.
        seed = int(draw_keys([request.seed], len(state.steps) + 1, torch.device("cpu"))[0, -1]) & 0x7FFFFFFF
        return CompletionCall(
            state.prompt_ids + state.token_ids,
            n=request.candidates_per_step,
            max_tokens=min(state.step_limit, _room(state, scorers)),
            temperature=sampling.temperature,
            seed=seed,
            stop=stops or None,
            extra=extra,
        )

    def _stops(self, state: RequestState) -> tuple[str, ...]:
        whole = state.request.takes_whole_answers
        return (*(() if whole else self.boundary.stop_strings), *state.request.stop)

    def _read(self, state: RequestState, reply: EndpointReply) -> list[StepCandidate]:
        whole = state.request.takes_whole_answers
        boundary = AnswerOnly(self.boundary) if whole else self.boundary
        rule = StopRule(boundary, state.request.stop, state.text)
        candidates = []
        for k, text in enumerate(reply.texts):
            stop = _stopped_by(reply, k)
            if isinstance(stop, str) and not text.endswith(stop):
                text += stop  # servers leave the stop string out; it belongs to the step
            text, reason = self._cut(text, rule)
            if reason is None:
                # A completion of nothing but special tokens would be asked for again and again.
                cut = reply.finish_reasons[k] == "length" and text
                reason = StopReason.LENGTH if cut else StopReason.TOKEN
            encode = self.format.encode_reply if reason is StopReason.TOKEN else self.format.encode_text
            candidates.append(StepCandidate(text, encode(text), reason, {}, None))
        return candidates

    def _cut(self, text: str, rule: StopRule) -> tuple[str, StopReason | None]:
        """The text up to where the rule ends it first, and why; the whole text and None if it does not."""
        tokens = 0
        for end in range(1, len(text) + 1):
            if not rule.is_trigger(text[end - 1]):
                continue
            if tokens < _COUNTED:  # boundaries have a least length; beyond that, nobody asks
                tokens = len(self.format.encode_text(text[:end]))
            verdict = rule.verdict(text[:end], tokens)
            if verdict is not None:
                return text[:end], verdict
        return text, None

    def _refusal(self, failure: Failure) -> ValueError:
        """An error of this request alone: the server finds it wrong, or fails at it every time. Otherwise (no
        server, a wrong key) nothing will work."""
        url = self.endpoint.config.base_url
        if failure.kind.startswith("http_5"):
            return ValueError(
                f"{url} failed at the prompt {failure.attempts} times ({failure.kind}): {failure.message}"
            )
        if failure.kind in ("http_400", "http_413", "http_422"):
            return ValueError(f"{url} refused the prompt: {failure.message}")
        raise CompletionServerError(
            f"{url} gave up after {failure.attempts} attempts ({failure.kind}): {failure.message}"
        )


def _max_context(scorers: ScorerGroup) -> int:
    """Tokens that the reward models read; the server knows its own limit."""
    return sys.maxsize if scorers.max_context is None else scorers.max_context


def _room(state: RequestState, scorers: ScorerGroup) -> int:
    return _max_context(scorers) - len(state.prompt_ids) - len(state.token_ids)


def _stopped_by(reply: EndpointReply, k: int) -> object:
    return next((reply.choices[k][key] for key in _STOP_FIELDS if key in reply.choices[k]), None)


def _stops_silently(reply: EndpointReply, k: int) -> bool:
    """Whether completion k stopped without the server saying at what."""
    return reply.finish_reasons[k] == "stop" and not any(key in reply.choices[k] for key in _STOP_FIELDS)
