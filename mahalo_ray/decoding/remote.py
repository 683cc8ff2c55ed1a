"""Guided decoding over somebody else's engine: any OpenAI-compatible /completions server samples, we choose.

Every step is one request for K completions (`n`) of the conversation so far, as token ids, up to the
boundary's stop string. A server that caches prefixes (vLLM) keeps the state that our own engine keeps. The
reward models run here, ours over their kept caches, so a candidate's tokens are scored once.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Prompt, StepCandidate
from mahalo_ray.decoding.sampling import SamplingParams, draw_keys
from mahalo_ray.decoding.scorers import RewardModels
from mahalo_ray.decoding.session import RequestState, decide_steps
from mahalo_ray.decoding.stopping import AnswerOnly, Boundary, StopReason, StopRule
from mahalo_ray.endpoints import CompletionCall, Endpoint, EndpointReply, Failure
from mahalo_ray.errors import StageError
from mahalo_ray.models.scoring import AnswerScorer, Messages, StepScorer, check_steps
from mahalo_ray.objectives import Weights

# Where servers say which stop string ended a completion: vLLM, SGLang. None or a number: the end token.
_STOP_FIELDS = ("stop_reason", "matched_stop")
_COUNTED = 64  # tokens
_TOP_WORDS = 20  # likeliest next words that a judging server tells: vLLM's limit
_MOMENT_S = 0.02  # that the caller waits before others may join


class CompletionServerError(StageError):
    """The server did not answer, or not as the API promises, however often it was asked."""


class ScoringServerError(ValueError):
    """The same of a server that judges candidates: it ends the request whose candidates these are."""


class CompletionDecoder:
    """`GuidedDecoder` with a completion server in the policy's place; same requests, same results.

    `tokenizer` must be the server's: prompts are sent as token ids, so that special tokens in what users
    write stay plain text. A model of a server has its heads merged, so a request can have the weights that
    were merged and no others: `served_weights` those of the endpoint's model (`mahalo export --weights ...`),
    `further_models` the names of other models of the same server by theirs. Beam search and DVTS need
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
        further_models: Mapping[Weights, str] | None = None,
    ) -> None:
        self.endpoint, self.served_weights = endpoint, served_weights
        own = {} if served_weights is None else {served_weights: endpoint.config.model}
        self.models_by_weights = {**own, **(further_models or {})}
        self.models = RewardModels(reward_model, boundary, tokenizer)
        self.reward_models, self.scale = self.models.models, self.models.scale
        self.boundary, self.format = self.models.boundary, self.models.format
        self.vocabulary = self.models.vocabulary
        # Turned off by a server that does not say what stopped a completion: steps are then cut here.
        self.reports_stops = True

    def session(self) -> CompletionSession:
        """An empty batch that requests can join at any time."""
        return CompletionSession(self)

    def generate(self, messages: Sequence[Any], **options: Any) -> GuidedResult:
        """Answer one conversation; options are the fields of `GuidedRequest`."""
        (result,) = self.generate_each([GuidedRequest(messages, **options)])
        if isinstance(result, ValueError):
            raise result
        return result

    def generate_each(self, requests: Sequence[GuidedRequest]) -> list[GuidedResult | ValueError]:
        """Answer many conversations; one that cannot be answered is its error.

        CompletionServerError when the server gives up on a request that it could have answered.
        """
        session = self.session()
        states: list[RequestState | ValueError] = []
        for request in requests:
            try:
                states.append(session.submit(request))
            except ValueError as error:
                states.append(error)
        try:
            while session.is_busy:
                session.advance()
                for state in states:
                    if isinstance(state, RequestState) and isinstance(state.error, StageError):
                        raise state.error
        finally:
            session.close()
        return [_result(state) for state in states]


def _result(state: RequestState | ValueError) -> GuidedResult | ValueError:
    if isinstance(state, ValueError):
        return state
    return state.error if isinstance(state.error, ValueError) else state.result()


@dataclass(frozen=True)
class _Asked:
    """A step that the server is at. `with_stops`: it was told where steps end."""

    state: RequestState
    with_stops: bool


class CompletionSession:
    """Requests in play over a completion server. None waits for another: each asks for its next step when its
    last one is decided, as far as the endpoint's `concurrency` goes, and steps that have come are scored
    together."""

    def __init__(self, decoder: CompletionDecoder) -> None:
        self._decoder = decoder
        self.scorers = decoder.models.follow()
        self._waiting: deque[RequestState] = deque()  # for a step
        self._asked: dict[Future[EndpointReply | Failure], _Asked] = {}

    @property
    def is_busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._asked)

    @property
    def num_branches(self) -> int:
        """Candidates that the server is at."""
        return sum(asked.state.request.candidates_per_step for asked in self._asked.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the policy's keys and values here: none, they are the server's."""
        return 0

    @property
    def max_context(self) -> int:
        """Tokens that the reward models read; the server knows its own limit."""
        return sys.maxsize if self.scorers.max_context is None else self.scorers.max_context

    @property
    def vocab_size(self) -> int:
        """Token ids that the tokenizer knows."""
        return len(self._decoder.format.tokenizer)

    def check(self, request: GuidedRequest) -> Prompt:
        """The request's prompt, encoded; ValueError for what a server cannot do."""
        if request.strategy in ("beam", "dvts"):
            raise ValueError(f"strategy '{request.strategy}' is not possible over a completion server")
        if request.strength != 1:
            raise ValueError(
                f"strength {request.strength:g} is not possible over a completion server, whose model has "
                "its heads merged: serve a merge at this strength (`mahalo export --strength`) instead"
            )
        known = self._decoder.models_by_weights
        if request.weights is not None and request.weights not in known:
            served = ", ".join(f"({weights.label()})" for weights in known) or "(none)"
            raise ValueError(
                f"weights {request.weights.label()} are not what the completion server was declared to serve "
                f"{served}: a server's model has its weights merged in. Serve a merge at these weights "
                "(`mahalo export --weights`), or decode with our own engine"
            )
        return self._decoder.models.check(request, self.scorers, self.max_context, "reward model reads")

    def submit(
        self, request: GuidedRequest, token_by_token: bool = False, prompt: Prompt | None = None
    ) -> RequestState:
        """Queue a request; `prompt`: what `check` gave for it. `token_by_token` has no effect: a step
        comes whole. ValueError for a request that can never run."""
        prompt = self.check(request) if prompt is None else prompt
        state = RequestState(request, prompt, seed=request.seed, policy_tokens=len(prompt.token_ids))
        if request.is_guided:
            (state.scorer_row,) = self.scorers.open([prompt])
        self._waiting.append(state)
        return state

    def cancel(self, state: RequestState) -> None:
        """Take a request out, whether it waits or runs."""
        asked = [future for future, asked in self._asked.items() if asked.state is state]
        if not asked and state not in self._waiting:
            return
        if state in self._waiting:
            self._waiting.remove(state)
        for future in asked:
            future.cancel()
            del self._asked[future]
        self._forget(state)

    def close(self) -> None:
        """Leave what the server is still at."""
        for state in [*self._waiting, *(asked.state for asked in self._asked.values())]:
            self.cancel(state)

    def advance(self) -> None:
        """Ask for the next steps, wait a moment for the server, and decide the steps that have come."""
        while self._waiting and len(self._asked) < self._decoder.endpoint.config.concurrency:
            state, with_stops = self._waiting.popleft(), self._decoder.reports_stops
            future = self._decoder.endpoint.send_completion(self._call(state, with_stops))
            self._asked[future] = _Asked(state, with_stops)
        done, _ = wait(self._asked, _MOMENT_S, FIRST_COMPLETED)
        # In the order in which they were asked for, so that equal work is done alike.
        come = [(self._asked.pop(future), future.result()) for future in list(self._asked) if future in done]
        read = [(asked.state, self._read(asked, reply)) for asked, reply in come]
        self._decide([(state, candidates) for state, candidates in read if candidates])

    def _read(self, asked: _Asked, reply: EndpointReply | Failure) -> list[StepCandidate]:
        """The candidates in a reply; none where the request is over with an error, or asks again."""
        state, decoder = asked.state, self._decoder
        if isinstance(reply, Failure):
            self._end(state, _refusal(decoder.endpoint, reply))
            return []
        count = state.request.candidates_per_step
        if len(reply.texts) != count:
            message = (
                f"{decoder.endpoint.config.base_url} sent {len(reply.texts)} completions where {count} were "
                "asked for: it does not support 'n'"
            )
            self._end(state, CompletionServerError(message))
            return []
        if asked.with_stops and self._stops(state) and any(_stops_silently(reply, k) for k in range(count)):
            decoder.reports_stops = False
            self._waiting.appendleft(state)
            return []
        return self._candidates(state, reply)

    def _decide(self, come: Sequence[tuple[RequestState, list[StepCandidate]]]) -> None:
        """The next step of every request whose candidates have come."""
        if not come:
            return
        states = [state for state, _ in come]
        sampled = [candidates for _, candidates in come]
        for state, step in zip(
            states, decide_steps(states, sampled, self.scorers, self._decoder.scale), strict=True
        ):
            if step is not None:
                state.extend(step, step.text)
                if state.stop_reason is None and self._room(state) < 1:
                    state.stop_reason = StopReason.CONTEXT
            if state.is_over:
                state.cache_bytes = self.scorers.peak_bytes
                self._forget(state)
                continue
            if step is not None and state.request.is_guided:
                self.scorers.accept([state.scorer_row], [step.accepted])
            self._waiting.append(state)

    def _end(self, state: RequestState, error: ValueError | StageError) -> None:
        state.error = error
        self._forget(state)

    def _forget(self, state: RequestState) -> None:
        if state.request.is_guided:
            self.scorers.drop([state.scorer_row])

    def _room(self, state: RequestState) -> int:
        return self.max_context - len(state.prompt_ids) - len(state.token_ids)

    def _call(self, state: RequestState, with_stops: bool) -> CompletionCall:
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
        stops = self._stops(state) if with_stops else ()
        # Every step draws anew; the API's seeds have 31 bits with some servers.
        seed = int(draw_keys([request.seed], len(state.steps) + 1, torch.device("cpu"))[0, -1]) & 0x7FFFFFFF
        return CompletionCall(
            state.prompt_ids + state.token_ids,
            n=request.candidates_per_step,
            max_tokens=min(state.step_limit, self._room(state)),
            temperature=sampling.temperature,
            seed=seed,
            stop=stops or None,
            extra=extra,
            model=None if request.weights is None else self._decoder.models_by_weights[request.weights],
        )

    def _stops(self, state: RequestState) -> tuple[str, ...]:
        whole = state.request.takes_whole_answers
        return (*(() if whole else self._decoder.boundary.stop_strings), *state.request.stop)

    def _candidates(self, state: RequestState, reply: EndpointReply) -> list[StepCandidate]:
        whole, chat = state.request.takes_whole_answers, self._decoder.format
        boundary = AnswerOnly(self._decoder.boundary) if whole else self._decoder.boundary
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
            encode = chat.encode_reply if reason is StopReason.TOKEN else chat.encode_text
            candidates.append(StepCandidate(text, encode(text), reason, {}, None))
        return candidates

    def _cut(self, text: str, rule: StopRule) -> tuple[str, StopReason | None]:
        """The text up to where the rule ends it first, and why; the whole text and None if it does not."""
        tokens = 0
        for end in range(1, len(text) + 1):
            if not rule.is_trigger(text[end - 1]):
                continue
            if tokens < _COUNTED:  # boundaries have a least length; beyond that, nobody asks
                tokens = len(self._decoder.format.encode_text(text[:end]))
            verdict = rule.verdict(text[:end], tokens)
            if verdict is not None:
                return text[:end], verdict
        return text, None


def _refusal(endpoint: Endpoint, failure: Failure) -> ValueError | CompletionServerError:
    """An error of this request alone: the server finds it wrong, or fails at it every time. Otherwise (no
    server, a wrong key) nothing will work."""
    if failure.kind.startswith("http_5") and failure.kind not in ("http_502", "http_503"):
        return ValueError(
            f"the completion server failed at the prompt {failure.attempts} times ({failure.kind}): "
            f"{failure.message}"
        )
    if failure.kind in ("http_400", "http_413", "http_422"):
        return ValueError(f"the completion server refused the prompt: {failure.message}")
    return CompletionServerError(
        f"{endpoint.config.base_url} gave up after {failure.attempts} attempts ({failure.kind}): "
        f"{failure.message}"
    )


def _stopped_by(reply: EndpointReply, k: int) -> object:
    return next((reply.choices[k][key] for key in _STOP_FIELDS if key in reply.choices[k]), None)


def _stops_silently(reply: EndpointReply, k: int) -> bool:
    """Whether completion k stopped without the server saying at what."""
    return reply.finish_reasons[k] == "stop" and not any(key in reply.choices[k] for key in _STOP_FIELDS)


class VerdictScorer(AnswerScorer):
    """A language model on a completion server as a reward model: how likely it says yes.

    For every objective it is asked a question about the conversation with the answer in it. The score is
    p(yes) / (p(yes) + p(no)) of its next token: Zhang et al., "Generative verifiers: reward modeling as
    next-token prediction", 2024, arXiv 2408.15240. `questions` by objective, as "Is the last reply correct?";
    `words`: what it may say, in any case and with blanks around; `max_length`: tokens that the server reads.
    """

    step_separator = "\n\n"

    def __init__(
        self,
        endpoint: Endpoint,
        questions: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        words: tuple[str, str] = ("Yes", "No"),
    ) -> None:
        self.objectives = tuple(questions)
        self.output_kinds = dict.fromkeys(questions, "probability")
        self.calibration = {}
        self._endpoint, self._questions, self._words = endpoint, dict(questions), words
        self._format, self._max_length = ChatFormat(tokenizer), max_length

    @property
    def max_length(self) -> int:
        return self._max_length

    def length(self, prompt: Sequence[Message], answer: str) -> int:
        return max(len(self._ids(prompt, answer, objective)) for objective in self.objectives)

    def check_length(self, prompt: Messages, steps: Sequence[str]) -> None:
        messages = [Message.model_validate(message) for message in prompt]
        self._check_tokens(self.length(messages, self.step_separator.join(steps)))

    def _check_tokens(self, tokens: int) -> None:
        if tokens > self._max_length:
            raise ValueError(f"a conversation has {tokens} tokens, the model reads {self._max_length}")

    def score_batch(
        self, traces: Sequence[tuple[Messages, Sequence[str]]], batch_size: int = 16
    ) -> list[dict[str, list[float]]]:
        """`batch_size` is the server's business. ScoringServerError when it gives up."""
        calls = []
        for prompt, steps in traces:
            check_steps(steps)
            messages = [Message.model_validate(message) for message in prompt]
            for count in range(1, len(steps) + 1):
                answer = self.step_separator.join(steps[:count])
                calls += [self._call(messages, answer, objective) for objective in self.objectives]
        found = {number: self._share(reply) for number, reply in self._endpoint.complete(calls)}
        values = iter(found[number] for number in range(len(calls)))
        scored: list[dict[str, list[float]]] = []
        for _, steps in traces:
            scored.append({name: [] for name in self.objectives})
            for _step in steps:
                for name in self.objectives:
                    scored[-1][name].append(next(values))
        return scored

    def _call(self, messages: Sequence[Message], answer: str, objective: str) -> CompletionCall:
        ids = self._ids(messages, answer, objective)
        self._check_tokens(len(ids))
        return CompletionCall(ids, max_tokens=1, temperature=0.0, logprobs=_TOP_WORDS)

    def _ids(self, messages: Sequence[Message], answer: str, objective: str) -> list[int]:
        """The question as a user's message. What people wrote in it stays plain text."""
        turns = [*messages, Message(role="assistant", content=answer)]
        said = "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)
        yes, no = self._words
        asked = f"{said}\n\n{self._questions[objective]} Answer with {yes} or {no}."
        return self._format.prompt_ids([Message(role="user", content=asked)])

    def _share(self, reply: EndpointReply | Failure) -> float:
        """The probability of yes against no."""
        if isinstance(reply, Failure):
            error = _refusal(self._endpoint, reply)
            raise ScoringServerError(str(error)) if isinstance(error, CompletionServerError) else error
        logprobs = reply.choices[0].get("logprobs") or {}
        likeliest = (logprobs.get("top_logprobs") or [None])[0]
        if likeliest is None:
            raise ScoringServerError(f"{self._endpoint.config.base_url} gives no 'logprobs': it cannot judge")
        yes, no = (
            sum(math.exp(logp) for token, logp in likeliest.items() if token.strip().lower() == word.lower())
            for word in self._words
        )
        if yes + no == 0:
            raise ValueError(
                f"the judging model wants to say {next(iter(likeliest))!r}, and neither {self._words[0]} nor "
                f"{self._words[1]} is among its likeliest words"
            )
        return yes / (yes + no)
