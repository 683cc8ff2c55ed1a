"""The models behind the endpoint: jobs become requests of one guided session, its steps parts of answers."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from jinja2 import TemplateError

from mahalo_ray.config import RewardServer, ServerSource, Standardisation
from mahalo_ray.data import storage
from mahalo_ray.data.records import Message
from mahalo_ray.decoding.guidance import GuidedResult, Prompt, PromptTooLong
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.kv_cache import split_by_size
from mahalo_ray.decoding.likelihood import TokenLogps, token_logps
from mahalo_ray.decoding.policy import (
    DeviceConfig,
    HeadMix,
    MultiHeadPolicy,
    Policy,
    load_policy,
    load_step_scorer,
)
from mahalo_ray.decoding.remote import CompletionDecoder, CompletionSession, ScoringServerError, VerdictScorer
from mahalo_ray.decoding.session import GuidedSession, RequestState
from mahalo_ray.decoding.stopping import INCOMPLETE, StopReason, TokenTexts, TurnBoundary
from mahalo_ray.endpoints import Endpoint
from mahalo_ray.errors import StageError
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.models.scoring import StepScorer
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.answer_job import Answer, AnswerPart, AnswersWanted, ModelLoad, RawPrompt, TokenReport
from mahalo_ray.serving.model_thread import Job
from mahalo_ray.serving.responses import ScoredCandidate
from mahalo_ray.serving.schema import ApiError, ScoreRequest, internal_error

logger = logging.getLogger(__name__)

_LOOKED_UP_AT_ONCE = 4096  # tokens whose log-probabilities are asked for, where no answer is decoded
_LOOKED_UP_BETWEEN = 512  # and between the tokens of answers
_SERVER_BACK_S = 5  # after which a client may ask again where a completion server did not answer
_SCORED_AT_ONCE = 8  # candidates of POST /v1/score, where no answer waits for its next tokens


class VisibleText:
    """What a client sees of an answer that grows: cut at the first stop string, without incomplete characters
    at its end, and without what could be the beginning of a stop string until more text decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._shown = ""

    def grow(self, text: str) -> str:
        """What can be shown beyond what has been, now that the whole answer is `text`."""
        visible = self.cut(text)
        if len(visible) == len(text):
            visible = text.rstrip(INCOMPLETE)
            visible = visible[: len(visible) - self._longest_stop_prefix(visible)]
        if not visible.startswith(self._shown):  # the decoder may still change what it has not shown
            return ""
        added, self._shown = visible[len(self._shown) :], visible
        return added

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        positions = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        return text[: min(positions)] if positions else text

    def _longest_stop_prefix(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )


class _AnswersInPlay:
    """A job for answers in play: several, if `n` or several prompts were asked for."""

    def __init__(self, job: Job, wanted: AnswersWanted, prompts: list[Prompt], echoed: list[str]) -> None:
        self.job, self.wanted, self.prompts, self.echoed = job, wanted, prompts, echoed
        self.states: list[RequestState] = []
        self._visible = [VisibleText(request.stop) for request in wanted.requests]

    def report(self) -> None:
        """Hand new steps to the client."""
        for index, state in enumerate(self.states):
            for step in state.new_steps():
                added = self._visible[index].grow(state.text)
                counts = len(state.prompt_ids), len(state.token_ids)
                self.job.step(AnswerPart(index, added, step, *counts))
            if state.error is not None:
                self.job.fail(refusal_of(state.error))
                return

    @property
    def is_complete(self) -> bool:
        """Whether all answers have ended."""
        return all(state.stop_reason is not None for state in self.states)

    def results(self) -> list[GuidedResult]:
        """The finished answers, cut at their stop strings."""
        if not self.wanted.generates:
            return [_nothing_added(prompt) for prompt in self.prompts]
        results = [state.result() for state in self.states]
        return [
            replace(result, text=visible.cut(result.text))
            for result, visible in zip(results, self._visible, strict=True)
        ]

    def answers(self, tokens: Sequence[list[TokenReport] | None]) -> list[Answer]:
        """The finished answers with the reports of their tokens."""
        parts = zip(self.results(), self.echoed, tokens, strict=True)
        return [Answer(result, echoed, reports) for result, echoed, reports in parts]


def _nothing_added(prompt: Prompt) -> GuidedResult:
    """The result of a request for a prompt's own log-probabilities."""
    count = len(prompt.token_ids)
    return GuidedResult("", [], [], StopReason.LENGTH, count, count, 0, 0)


class _Likelihoods:
    """The tokens of a job's answers that are still to be looked up, and those that were."""

    def __init__(self, answers: _AnswersInPlay) -> None:
        self.answers, self.job = answers, answers.job
        self._results = answers.results()
        pairs = zip(answers.prompts, self._results, strict=True)
        self._left = [prompt.token_ids + result.token_ids for prompt, result in pairs]
        self._reports: list[list[TokenReport] | None] = []

    def advance(self, policy: Policy, vocabulary: TokenTexts, num_tokens: int) -> None:
        """Look up the next sequences, about `num_tokens` tokens of them; finish the job after the last."""
        count = next(iter(split_by_size([len(ids) for ids in self._left], num_tokens))).stop
        batch, self._left = self._left[:count], self._left[count:]
        first = len(self._reports)
        requests = self.answers.wanted.requests[first : first + count]
        mixes = [HeadMix(request.weights, request.strength) for request in requests]
        found = token_logps(policy, batch, mixes, self.answers.wanted.top_logprobs or 0)
        for number, logps in enumerate(found, start=first):
            self._reports.append(self._report(number, logps, vocabulary))
        if not self._left:
            self.job.finish(self.answers.answers(self._reports))

    def _report(self, number: int, logps: TokenLogps, vocabulary: TokenTexts) -> list[TokenReport]:
        """The tokens of one answer, without those that a stop string cut off."""
        prompt, result = self.answers.prompts[number], self._results[number]
        start = len(prompt.token_ids)
        shown = start + _tokens_shown(result, vocabulary)
        reports = [
            replace(
                _token(vocabulary, token_id, logp),
                top=tuple(_token(vocabulary, one.token_id, one.logp) for one in top),
            )
            for token_id, logp, top in zip(logps.token_ids, logps.logps, logps.top, strict=True)
        ]
        return reports[0 if self.answers.wanted.echo else start : shown]


def _tokens_shown(result: GuidedResult, vocabulary: TokenTexts) -> int:
    """How many of an answer's tokens its text shows, the token that ended it included."""
    if result.stop_reason is not StopReason.STRING:
        return len(result.token_ids)
    count = len(result.token_ids)
    while count and len(vocabulary.words(result.token_ids[: count - 1])) >= len(result.text):
        count -= 1
    return count


def _token(vocabulary: TokenTexts, token_id: int, logp: float | None) -> TokenReport:
    text, raw = vocabulary.piece(token_id), vocabulary.raw_bytes(token_id)
    if INCOMPLETE not in text:
        return TokenReport(text, raw, True, logp)
    return TokenReport(vocabulary.name(token_id), raw, False, logp)


class _Scoring:
    """A score job in play: its candidates are rated a few at a time, between the tokens of the answers."""

    def __init__(self, job: Job, request: ScoreRequest) -> None:
        self.job = job
        self._messages = [message.as_record() for message in request.messages]
        self._left = list(request.candidates)
        self._scored: list[ScoredCandidate] = []

    def advance(self, reward_models: Sequence[StepScorer], num_candidates: int) -> None:
        """Rate the next candidates as the next turn after the messages; finish the job after the last."""
        texts, self._left = self._left[:num_candidates], self._left[num_candidates:]
        scores: list[dict[str, float]] = [{} for _ in texts]
        for model in reward_models:
            rated = model.score_batch([(self._messages, [text]) for text in texts])
            for all_scores, steps in zip(scores, rated, strict=True):
                all_scores.update({name: values[0] for name, values in steps.items()})
        for candidate_scores in scores:
            self._scored.append(ScoredCandidate(index=len(self._scored), scores=candidate_scores))
        if not self._left:
            self.job.finish(self._scored)


class GuidedBackend:
    """A policy, or a completion server in its place, and, unless None, a reward model, driven by the model's
    thread (a `Backend` for it).

    A job for `AnswersWanted` gets `step(AnswerPart)` for every accepted step (every token where there is
    nothing to choose from), then `finish(list[Answer])`. A `ScoreRequest` gets
    `finish(list[ScoredCandidate])`. Log-probabilities and ratings are computed a little at a time, between
    the tokens of the answers.
    """

    def __init__(self, decoder: GuidedDecoder | CompletionDecoder) -> None:
        self._decoder = decoder
        # None: of a model on a server nothing but samples can be had.
        self._policy = decoder.policy if isinstance(decoder, GuidedDecoder) else None
        policy = self._policy
        self.served_weights: tuple[Weights, ...] = ()
        self.objectives = policy.model.objectives if isinstance(policy, MultiHeadPolicy) else ()
        if isinstance(decoder, CompletionDecoder):
            self.served_weights = tuple(decoder.models_by_weights)
            self.objectives = tuple(dict.fromkeys(name for each in self.served_weights for name in each))
        self.has_strength = isinstance(policy, MultiHeadPolicy) and policy.model.base_head is not None
        self.has_logprobs = policy is not None
        self.guidance_objectives = decoder.scale.objectives
        self.steps_are_turns = isinstance(decoder.boundary, TurnBoundary)
        # As in evaluation, where the reward models know the usual spread of their scores.
        calibrated = bool(decoder.reward_models) and decoder.scale.is_calibrated
        self.standardisation: Standardisation = "calibrated" if calibrated else "within_candidates"
        self.reset()

    @classmethod
    def load(
        cls,
        policy: str | ServerSource,
        reward: str | RewardServer | StepScorer | None,
        domain: str,
        placement: DeviceConfig,
        max_branches: int,
    ) -> GuidedBackend:
        """Read the model folders, place the models and see that they answer. `policy`: a folder, or the
        completion server that samples; `reward`: a folder, the server of a model that judges, or a reward
        model that is somewhere else."""
        scorer: StepScorer | None
        if isinstance(reward, str):
            scorer = load_step_scorer(reward, placement)
        elif isinstance(reward, RewardServer):
            words = reward.yes, reward.no
            judging = load_tokenizer(storage.local_copy(reward.tokenizer))
            scorer = VerdictScorer(
                Endpoint(reward.endpoint), reward.questions, judging, reward.max_length, words
            )
        else:
            scorer = reward
        reward_models = [] if scorer is None else [scorer]
        decoder: GuidedDecoder | CompletionDecoder
        if isinstance(policy, ServerSource):
            tokenizer = load_tokenizer(storage.local_copy(policy.tokenizer))
            served = policy.models_by_weights
            endpoint = Endpoint(policy.endpoint)
            decoder = CompletionDecoder(endpoint, reward_models, domain, tokenizer, None, served)
        else:
            loaded, chat = load_policy(policy, placement)
            decoder = GuidedDecoder(loaded, reward_models, domain, chat.tokenizer, max_branches)
        backend = cls(decoder)
        backend.probe()
        return backend

    def reset(self) -> None:
        """An empty batch."""
        self._session: GuidedSession | CompletionSession = self._decoder.session()
        self._answers: list[_AnswersInPlay] = []
        self._scorings: list[_Scoring] = []
        self._likelihoods: list[_Likelihoods] = []
        self._note_load()

    def probe(self) -> None:
        """Answer a small request, guided where there is a reward model; whatever it raises says why not."""
        guided = bool(self._decoder.reward_models)
        if isinstance(self._decoder, GuidedDecoder):
            guided = guided and self._decoder.max_branches > 1
        weights = Weights.balanced(self.objectives) if self.objectives else None
        self._decoder.generate(
            [Message(role="user", content="1 + 1 = ?")],
            weights=self.served_weights[0] if self.served_weights else weights,
            num_candidates=2 if guided else 1,
            strategy="argmax" if guided else "none",
            max_new_tokens=2,
            standardisation=self.standardisation,
        )

    def prepare(self, job: Job) -> None:
        """Encode a request's texts, whichever thread calls. What is wrong with them fails the job."""
        with _own_errors(job):
            if not isinstance(job.payload, ScoreRequest):
                job.prepared = self._read_prompts(job.payload)
                return
            messages = [message.as_record() for message in job.payload.messages]
            for model in self._decoder.reward_models:
                for candidate in job.payload.candidates:
                    model.check_length(messages, [candidate])

    def admit(self, jobs: Sequence[Job]) -> None:
        """Let jobs join. What is wrong with one of them fails that one."""
        for job in jobs:
            with _own_errors(job):
                if isinstance(job.payload, ScoreRequest):
                    self._scorings.append(_Scoring(job, job.payload))
                else:
                    self._begin(job, job.payload)

    def _read_prompts(self, wanted: AnswersWanted) -> list[Prompt]:
        pairs = zip(wanted.requests, wanted.prompts, strict=True)
        # The same prompt several times (`n`) is read once.
        read: dict[int, Prompt] = {}
        prompts = []
        for request, raw in pairs:
            key = id(request.messages if raw is None else raw)
            if key not in read:
                read[key] = self._session.check(request) if raw is None else self._raw_prompt(raw, wanted)
            prompts.append(read[key])
        return prompts

    def _begin(self, job: Job, wanted: AnswersWanted) -> None:
        prompts = self._read_prompts(wanted) if job.prepared is None else job.prepared
        echoed = [self._decoder.vocabulary.decode(p.token_ids) if wanted.echo else "" for p in prompts]
        for number, raw in enumerate(wanted.prompts):
            if wanted.echo and raw is not None and isinstance(raw.value, str):
                echoed[number] = raw.value  # as it was sent: decoding may not give it back to the letter
        answers = _AnswersInPlay(job, wanted, prompts, echoed)
        if wanted.generates:
            answers.states = [
                self._session.submit(request, job.streams and not request.is_guided, prompt)
                for request, prompt in zip(wanted.requests, prompts, strict=True)
            ]
        job.begin(echoed)
        self._answers.append(answers)

    def _raw_prompt(self, raw: RawPrompt, wanted: AnswersWanted) -> Prompt:
        """A prompt without a template, as tokens; ApiError or PromptTooLong for one that cannot be read."""
        tokenizer, session = self._decoder.format.tokenizer, self._session
        ids = list(tokenizer.encode(raw.value) if isinstance(raw.value, str) else raw.value)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        if not ids:
            raise ApiError(400, "the prompt is empty, and this model has no token to begin with", "prompt")
        if max(ids) >= session.vocab_size:
            message = f"token id {max(ids)} is not one of the model's {session.vocab_size}"
            raise ApiError(400, message, "prompt", "invalid_value")
        limit = session.max_context - wanted.generates
        if len(ids) > limit:
            message = f"the prompt has {len(ids)} tokens, and the context holds {limit} of them"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        return Prompt([], ids)

    def advance(self) -> None:
        """A few tokens of every answer that is still wanted, and a few candidates of one rating."""
        for answers in self._answers:
            if not answers.job.wanted:
                self._cancel(answers)
        self._answers = [answers for answers in self._answers if answers.job.wanted]
        self._scorings = [scoring for scoring in self._scorings if scoring.job.wanted]
        self._likelihoods = [one for one in self._likelihoods if one.job.wanted]
        if self._session.is_busy:
            self._session.advance()
        self._note_load()  # before anybody has the answer that has just ended
        for answers in self._answers:
            answers.report()
            if answers.job.finished:  # one of several answers has failed
                self._cancel(answers)
            elif answers.is_complete:
                self._complete(answers)
        self._answers = [a for a in self._answers if not a.job.finished and not a.is_complete]
        if self._likelihoods and self._policy is not None:
            budget = _LOOKED_UP_BETWEEN if self._answers else _LOOKED_UP_AT_ONCE
            self._likelihoods[0].advance(self._policy, self._decoder.vocabulary, budget)
        if self._scorings:
            self._advance_scoring(self._scorings[0])
        self._scorings = [scoring for scoring in self._scorings if not scoring.job.finished]
        self._likelihoods = [one for one in self._likelihoods if not one.job.finished]
        self._note_load()

    def _note_load(self) -> None:
        self.usage = ModelLoad(self._session.num_branches, self._session.nbytes)

    def _complete(self, answers: _AnswersInPlay) -> None:
        if answers.wanted.top_logprobs is None:
            answers.job.finish(answers.answers([None] * len(answers.prompts)))
        else:
            self._likelihoods.append(_Likelihoods(answers))

    def _cancel(self, answers: _AnswersInPlay) -> None:
        for state in answers.states:
            self._session.cancel(state)

    def _advance_scoring(self, scoring: _Scoring) -> None:
        try:
            scoring.advance(self._decoder.reward_models, 1 if self._answers else _SCORED_AT_ONCE)
        except (ValueError, TemplateError) as error:
            scoring.job.fail(refusal_of(error))


@contextmanager
def _own_errors(job: Job) -> Iterator[None]:
    """Before a request joins the batch, any error is its own: it fails the job and goes no further."""
    try:
        yield
    except ApiError as error:
        job.fail(error)
    except (ValueError, TemplateError) as error:
        job.fail(refusal_of(error))
    except Exception:
        reference = secrets.token_hex(4)
        logger.exception("error %s: a request could not be begun", reference)
        job.fail(internal_error(reference))


def refusal_of(error: Exception) -> ApiError:
    """Why the models cannot take a request, as an answer to its client."""
    if isinstance(error, StageError | ScoringServerError):  # what is wrong with the server is for the log
        reference = secrets.token_hex(4)
        logger.error("error %s: %s", reference, error)
        message = (
            f"the completion server behind this model does not answer; the log has it under '{reference}'"
        )
        return ApiError(503, message, code="server_unavailable", retry_after_s=_SERVER_BACK_S)
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else "invalid_value"
    return ApiError(400, str(error), "messages", code)
