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

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.guidance import (
    GuidedRequest,
    GuidedResult,
    ScoreScale,
    Step,
    StepCandidate,
    with_totals,
)
from mahalo_ray.decoding.guided import shared_tokenizer
from mahalo_ray.decoding.sampling import SamplingParams, draw_keys
from mahalo_ray.decoding.scorers import Guides, Prompt, backbones_of, check_guidance
from mahalo_ray.decoding.session import NONE_TAKEN, RequestState
from mahalo_ray.decoding.stopping import AnswerOnly, Boundary, StopReason, StopRule, TokenTexts, boundary_for
from mahalo_ray.endpoints import CompletionCall, Endpoint, EndpointReply, Failure
from mahalo_ray.errors import StageError
from mahalo_ray.models.scoring import StepScorer
from mahalo_ray.objectives import Weights

# Where servers say which stop string ended a completion: vLLM, SGLang. None or a number: the end token.
_TOLD_BY = ("stop_reason", "matched_stop")


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
        given = [reward_model] if isinstance(reward_model, StepScorer) else reward_model or []
        self.reward_models = tuple(given)
        self.scale = ScoreScale.of(self.reward_models)
        self.boundary = boundary_for(boundary) if isinstance(boundary, str) else boundary
        self.format = ChatFormat(shared_tokenizer(self.reward_models, tokenizer))
        self._vocabulary = TokenTexts(self.format.tokenizer)
        self._backbones = backbones_of(self.reward_models)
        # Turned off by a server that does not say what stopped a completion: steps are then cut here.
        self._stops_are_told = True

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
        guides = self._guides()
        results: list[GuidedResult | ValueError | None] = []
        running: dict[int, RequestState] = {}
        for number, request in enumerate(requests):
            try:
                running[number] = RequestState(
                    request, self._prompt(request, guides), False, seed=request.seed
                )
                results.append(None)
            except ValueError as error:
                results.append(error)
        guided = [one for one in running.values() if one.request.is_guided]
        if guides is not None and guided:
            for one, row in zip(guided, guides.open([one.prompt for one in guided]), strict=True):
                one.guide_row = row
        for one in running.values():
            one.policy_tokens = len(one.prompt_ids)
        while running:
            self._step(running, results, guides)
        return [result for result in results if result is not None]

    def _guides(self) -> Guides | None:
        if not self.reward_models:
            return None
        return Guides(self.reward_models, self._backbones, self.boundary, self.format, self._vocabulary)

    def _prompt(self, request: GuidedRequest, guides: Guides | None) -> Prompt:
        """The request's prompt; ValueError for what a server cannot do."""
        if request.strategy in ("beam", "dvts"):
            raise ValueError(f"strategy '{request.strategy}' is not possible over a completion server")
        if request.weights is not None and request.weights != self.served_weights:
            served = "none" if self.served_weights is None else self.served_weights.label()
            raise ValueError(
                f"weights {request.weights.label()} are not what {self.endpoint.config.base_url} was "
                f"declared to serve ({served}): a server's model has its weights merged in. "
                "Serve a merge at these weights (`mahalo export --weights`), or decode with our own engine"
            )
        messages = [Message.model_validate(message) for message in request.messages]
        check_guidance(request, guides, messages)
        prompt = Prompt(messages, self.format.prompt_ids(messages))
        if len(prompt.token_ids) >= self._max_context(guides):
            raise ValueError(
                f"the prompt has {len(prompt.token_ids)} tokens and the reward model reads "
                f"{self._max_context(guides)}: there is no room for an answer"
            )
        return prompt

    def _max_context(self, guides: Guides | None) -> int:
        """Tokens that the reward models read; the server knows its own limit."""
        known = None if guides is None else guides.max_context
        return sys.maxsize if known is None else known

    def _step(
        self,
        running: dict[int, RequestState],
        results: list[GuidedResult | ValueError | None],
        guides: Guides | None,
    ) -> None:
        """One step of all requests in play; those that end leave `running` for `results`."""
        offered, refused = self._offered(running, guides)
        for number, error in refused.items():
            results[number] = error
        if guides is not None:
            offered = _scored(running, offered, guides)
            gone = [running[number].guide_row for number in refused if running[number].request.is_guided]
            guides.drop(gone)
        for number in refused:
            del running[number]
        for number, own in offered.items():
            one = running[number]
            one.policy_tokens += sum(len(candidate.token_ids) for candidate in own)
            chosen = one.choice(own)
            if chosen == NONE_TAKEN:
                one.stop_reason = StopReason.CONTEXT
            else:
                one.token_ids += own[chosen].token_ids
                one.text += own[chosen].text
                one.steps.append(Step(own, chosen))
                one.stop_reason = one.ending(own[chosen].reason)
                if one.stop_reason is None and self._room(one, guides) < 1:
                    one.stop_reason = StopReason.CONTEXT
            if one.stop_reason is not None:
                one.cache_bytes = 0 if guides is None else guides.peak_bytes
                results[number] = one.result()
                del running[number]
            if guides is not None and one.request.is_guided:
                if one.stop_reason is None:
                    guides.accept([one.guide_row], [own[chosen]])
                else:
                    guides.drop([one.guide_row])

    def _room(self, one: RequestState, guides: Guides | None) -> int:
        return self._max_context(guides) - len(one.prompt_ids) - len(one.token_ids)

    def _offered(
        self, running: dict[int, RequestState], guides: Guides | None
    ) -> tuple[dict[int, list[StepCandidate]], dict[int, ValueError]]:
        """Candidates of every request's next step, and the requests that the server will not answer."""
        told, numbers = self._stops_are_told, list(running)
        offered: dict[int, list[StepCandidate]] = {}
        refused: dict[int, ValueError] = {}
        for at, answer in self.endpoint.complete(self._request(running[n], guides) for n in numbers):
            one = running[numbers[at]]
            if isinstance(answer, Failure):
                refused[numbers[at]] = self._refusal(answer)
                continue
            if len(answer.texts) != one.request.candidates_per_step:
                raise CompletionServerError(
                    f"{self.endpoint.config.base_url} sent {len(answer.texts)} completions where "
                    f"{one.request.candidates_per_step} were asked for: it does not support 'n'"
                )
            if told and any(_is_untold(answer, k) for k in range(len(answer.texts))) and self._stops(one):
                self._stops_are_told = False
                return self._offered(running, guides)
            offered[numbers[at]] = self._candidates(one, answer)
        return {number: offered[number] for number in numbers if number in offered}, refused

    def _request(self, one: RequestState, guides: Guides | None) -> CompletionCall:
        request, sampling = one.request, one.request.sampling
        extra: dict[str, Any] = {}
        for name in ("top_p", "top_k", "min_p"):
            if getattr(sampling, name) != getattr(SamplingParams(), name):
                extra[name] = getattr(sampling, name)
        stops = self._stops(one) if self._stops_are_told else ()
        # Every step draws anew; the API's seeds have 31 bits with some servers.
        seed = int(draw_keys([request.seed], len(one.steps) + 1, torch.device("cpu"))[0, -1]) & 0x7FFFFFFF
        return CompletionCall(
            one.prompt_ids + one.token_ids,
            n=request.candidates_per_step,
            max_tokens=min(one.step_limit, self._room(one, guides)),
            temperature=sampling.temperature,
            seed=seed,
            stop=stops or None,
            extra=extra,
        )

    def _stops(self, one: RequestState) -> tuple[str, ...]:
        whole = one.request.strategy == "best_of_n"
        return (*(() if whole else self.boundary.stop_strings), *one.request.stop)

    def _candidates(self, one: RequestState, reply: EndpointReply) -> list[StepCandidate]:
        whole = one.request.strategy == "best_of_n"
        boundary = AnswerOnly(self.boundary) if whole else self.boundary
        rule = StopRule(boundary, one.request.stop, one.text)
        found = []
        for k, text in enumerate(reply.texts):
            told = _stopped_by(reply, k)
            if isinstance(told, str) and not text.endswith(told):
                text += told  # servers leave the stop string out; it belongs to the step
            text, reason = self._cut(text, rule)
            if reason is None:
                # A completion of nothing but special tokens would be asked for again and again.
                cut = reply.finish_reasons[k] == "length" and text
                reason = StopReason.LENGTH if cut else StopReason.TOKEN
            ids = self.format.encode_reply(text)
            found.append(
                StepCandidate(text, ids if reason is StopReason.TOKEN else ids[:-1], reason, {}, None)
            )
        return found

    def _cut(self, text: str, rule: StopRule) -> tuple[str, StopReason | None]:
        """The text up to where the rule ends it first, and why; the whole text and None if it does not."""
        for end in range(1, len(text) + 1):
            if not rule.is_trigger(text[end - 1]):
                continue
            tokens = len(self.format.encode_reply(text[:end])) - 1
            verdict = rule.verdict(text[:end], tokens)
            if verdict is not None:
                return text[:end], verdict
        return text, None

    def _refusal(self, failure: Failure) -> ValueError:
        """An error of this request alone (the server finds it wrong); otherwise nothing will work."""
        url = self.endpoint.config.base_url
        if failure.kind in ("http_400", "http_413", "http_422"):
            return ValueError(f"{url} refused the prompt: {failure.message}")
        raise CompletionServerError(
            f"{url} gave up after {failure.attempts} attempts ({failure.kind}): {failure.message}"
        )


def _scored(
    running: dict[int, RequestState], offered: dict[int, list[StepCandidate]], guides: Guides
) -> dict[int, list[StepCandidate]]:
    """The candidates with scores and totals, for requests that have something to choose from."""
    guided = [
        number
        for number, own in offered.items()
        if running[number].request.is_guided and all(candidate.token_ids for candidate in own)
    ]
    if not guided:
        return offered
    scores, encoded = guides.score(
        [running[number].guide_row for number in guided],
        [offered[number] for number in guided],
        [running[number].request.strategy == "best_of_n" for number in guided],
    )
    result = dict(offered)
    for at, number in enumerate(guided):
        own = scores[at, : len(offered[number])]
        running[number].reward_tokens += encoded[at]
        if not own.isnan().any():
            result[number] = with_totals(offered[number], own, running[number].request, guides.scale)
    return result


def _stopped_by(reply: EndpointReply, k: int) -> object:
    return next((reply.choices[k][key] for key in _TOLD_BY if key in reply.choices[k]), None)


def _is_untold(reply: EndpointReply, k: int) -> bool:
    """Whether completion k stopped without the server saying at what."""
    return reply.finish_reasons[k] == "stop" and not any(key in reply.choices[k] for key in _TOLD_BY)
