"""The models behind the endpoint: jobs become requests of one guided session, its steps parts of answers."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace

from jinja2 import TemplateError

from mahalo_ray.config import Standardisation
from mahalo_ray.data.records import Message
from mahalo_ray.decoding.guidance import GuidedRequest, PromptTooLong
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.policy import DeviceConfig, MultiHeadPolicy, load_policy, load_step_scorer
from mahalo_ray.decoding.session import GuidedSession, RequestState
from mahalo_ray.decoding.stopping import TurnBoundary
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.model_thread import Job
from mahalo_ray.serving.responses import AnswerPart, ScoredCandidate, TokenUsage
from mahalo_ray.serving.schema import ApiError, ScoreRequest, internal_error

logger = logging.getLogger(__name__)

_SCORED_AT_ONCE = 8  # candidates of POST /v1/score, where no answer waits for its next tokens
_INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


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
            visible = text.rstrip(_INCOMPLETE)
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


class _AnswerInPlay:
    """A chat job in play."""

    def __init__(self, job: Job, state: RequestState) -> None:
        self.job, self.state = job, state
        self._visible = VisibleText(state.request.stop)

    def report(self) -> None:
        """Hand new steps to the client, and the result once it is complete."""
        for step in self.state.new_steps():
            usage = TokenUsage.of(len(self.state.prompt_ids), len(self.state.token_ids))
            self.job.step(AnswerPart(self._visible.grow(self.state.text), step, usage))
        if self.state.error is not None:
            self.job.fail(refusal_of(self.state.error))
        elif self.state.stop_reason is not None:
            result = self.state.result()
            self.job.finish(replace(result, text=self._visible.cut(result.text)))


class _Scoring:
    """A score job in play: its candidates are rated a few at a time, between the tokens of the answers."""

    def __init__(self, job: Job, request: ScoreRequest) -> None:
        self.job = job
        self._messages = [message.as_record() for message in request.messages]
        self._left = list(request.candidates)
        self._scored: list[ScoredCandidate] = []

    def advance(self, decoder: GuidedDecoder, num_candidates: int) -> None:
        """Rate the next candidates as the next turn after the messages; finish the job after the last."""
        texts, self._left = self._left[:num_candidates], self._left[num_candidates:]
        scores: list[dict[str, float]] = [{} for _ in texts]
        for model in decoder.reward_models:
            rated = model.score_batch([(self._messages, [text]) for text in texts])
            for all_scores, steps in zip(scores, rated, strict=True):
                all_scores.update({name: values[0] for name, values in steps.items()})
        for candidate_scores in scores:
            self._scored.append(ScoredCandidate(index=len(self._scored), scores=candidate_scores))
        if not self._left:
            self.job.finish(self._scored)


class GuidedBackend:
    """A policy and, unless None, a reward model, driven by the model's thread (a `Backend` for it).

    A `GuidedRequest` gets `step(AnswerPart)` for every accepted step (every token where there is nothing to
    choose from), then `finish(GuidedResult)`, its text cut at the first stop string. A `ScoreRequest` gets
    `finish(list[ScoredCandidate])`.
    """

    def __init__(self, decoder: GuidedDecoder) -> None:
        self._decoder = decoder
        policy = decoder.policy
        self.objectives = policy.model.objectives if isinstance(policy, MultiHeadPolicy) else ()
        self.has_strength = isinstance(policy, MultiHeadPolicy) and policy.model.base_head is not None
        self.guidance_objectives = decoder.scale.objectives
        self.steps_are_turns = isinstance(decoder.boundary, TurnBoundary)
        # As in evaluation, where the reward models know the usual spread of their scores.
        calibrated = bool(decoder.reward_models) and decoder.scale.is_calibrated
        self.standardisation: Standardisation = "calibrated" if calibrated else "within_candidates"
        self.reset()

    @classmethod
    def load(
        cls, policy_url: str, reward_url: str | None, domain: str, placement: DeviceConfig, max_branches: int
    ) -> GuidedBackend:
        """Read the model folders, place the models and see that they answer."""
        policy, chat = load_policy(policy_url, placement)
        reward_models = [] if reward_url is None else [load_step_scorer(reward_url, placement)]
        backend = cls(GuidedDecoder(policy, reward_models, domain, chat.tokenizer, max_branches))
        backend.probe()
        return backend

    def reset(self) -> None:
        """An empty batch."""
        self._session: GuidedSession = self._decoder.session()
        self._answers: list[_AnswerInPlay] = []
        self._scorings: list[_Scoring] = []

    def probe(self) -> None:
        """Answer a small request, guided where there is a reward model; whatever it raises says why not."""
        guided = bool(self._decoder.reward_models) and self._decoder.max_branches > 1
        self._decoder.generate(
            [Message(role="user", content="1 + 1 = ?")],
            weights=Weights.balanced(self.objectives) if self.objectives else None,
            num_candidates=2 if guided else 1,
            strategy="argmax" if guided else "none",
            max_new_tokens=2,
            standardisation=self.standardisation,
        )

    def admit(self, jobs: Sequence[Job]) -> None:
        """Let jobs join. What is wrong with one of them fails that one."""
        for job in jobs:
            try:
                if isinstance(job.payload, ScoreRequest):
                    self._scorings.append(_Scoring(job, job.payload))
                else:
                    self._answers.append(self._begin(job, job.payload))
            except ValueError as error:
                job.fail(refusal_of(error))
            except Exception:
                # Nothing of the batch has been touched yet: the error is this request's own.
                reference = secrets.token_hex(4)
                logger.exception("error %s: a request could not be begun", reference)
                job.fail(internal_error(reference))

    def _begin(self, job: Job, request: GuidedRequest) -> _AnswerInPlay:
        return _AnswerInPlay(
            job, self._session.submit(request, token_by_token=job.streams and not request.is_guided)
        )

    def advance(self) -> None:
        """A few tokens of every answer that is still wanted, and a few candidates of one rating."""
        for answer in self._answers:
            if not answer.job.wanted:
                self._session.cancel(answer.state)
        self._answers = [answer for answer in self._answers if answer.job.wanted]
        self._scorings = [scoring for scoring in self._scorings if scoring.job.wanted]
        if self._session.is_busy:
            self._session.advance()
        for answer in self._answers:
            answer.report()
        if self._scorings:
            self._advance_scoring(self._scorings[0])
        self._answers = [answer for answer in self._answers if not answer.job.finished]
        self._scorings = [scoring for scoring in self._scorings if not scoring.job.finished]

    def _advance_scoring(self, scoring: _Scoring) -> None:
        try:
            scoring.advance(self._decoder, 1 if self._answers else _SCORED_AT_ONCE)
        except (ValueError, TemplateError) as error:
            scoring.job.fail(refusal_of(error))


def refusal_of(error: Exception) -> ApiError:
    """Why the models cannot take a request, as an answer to its client."""
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else "invalid_value"
    return ApiError(400, str(error), "messages", code)
