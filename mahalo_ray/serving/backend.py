"""The models behind the endpoint: jobs become requests of one guided session, its steps become answers."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError

from mahalo_ray.decoding.guidance import GuidedRequest, Standardisation, StepCandidate
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.policy import DeviceConfig, MultiHeadPolicy, load_guide, load_policy
from mahalo_ray.decoding.session import RequestState
from mahalo_ray.decoding.stopping import StopReason, TurnBoundary
from mahalo_ray.serving.responses import Reply, ScoredCandidate, Step
from mahalo_ray.serving.schema import ApiError
from mahalo_ray.serving.service import ChatJob, ScoreJob
from mahalo_ray.serving.worker import Job

_CUT_SHORT = (StopReason.LENGTH, StopReason.CONTEXT, StopReason.STEPS)


class StopTrimmer:
    """Cuts a text that comes in pieces at the first stop string, which may span pieces.

    What could be the beginning of a stop string is held back until more text decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._ended = False

    def feed(self, text: str) -> str:
        """The text that can be handed out now."""
        if self._ended:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._ended, self._held = True, ""
            return text[: min(found)]
        cut = len(text) - self._suspicious(text)
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What was held back for nothing; the text has ended."""
        held, self._held = self._held, ""
        return held

    def _suspicious(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )


class _Answer:
    """A chat job in play."""

    def __init__(self, job: Job, running: RequestState) -> None:
        self.job, self.running = job, running
        self.steps: list[Step] = []
        self._trimmer = StopTrimmer(running.request.stop)

    def tell(self) -> None:
        """Hand new steps to the client, and the reply once it is complete."""
        for accepted in self.running.new_steps():
            candidates = [_scored(candidate) for candidate in accepted.candidates]
            step = Step(self._trimmer.feed(accepted.text), accepted.chosen, candidates)
            self.steps.append(step)
            self.job.step(step)
        if self.running.error is not None:
            self.job.fail(ApiError(400, str(self.running.error), "messages", "invalid_value"))
        elif self.running.stop_reason is not None:
            self.job.finish(self._reply(self.running.stop_reason))

    def _reply(self, reason: StopReason) -> Reply:
        return Reply(
            steps=self.steps,
            tail=self._trimmer.rest(),
            finish_reason="length" if reason in _CUT_SHORT else "stop",
            prompt_tokens=len(self.running.prompt_ids),
            completion_tokens=len(self.running.token_ids),
            sampled_tokens=sum(candidate.num_tokens for step in self.steps for candidate in step.candidates),
        )


class GuidedBackend:
    """A policy and, unless None, a reward model, driven by the model's thread (an `Engine` for it)."""

    def __init__(self, decoder: GuidedDecoder) -> None:
        self._decoder = decoder
        policy = decoder.policy
        self.objectives = policy.model.objectives if isinstance(policy, MultiHeadPolicy) else ()
        self.guidance_objectives = decoder.scale.objectives
        self._whole_turns = isinstance(decoder.boundary, TurnBoundary)
        # As in evaluation, where the reward models know the usual spread of their scores.
        calibrated = bool(decoder.reward_models) and decoder.scale.is_calibrated
        self._standardisation: Standardisation = "calibrated" if calibrated else "within_candidates"
        self.reset()

    @classmethod
    def load(
        cls, policy_url: str, reward_url: str | None, domain: str, placement: DeviceConfig, max_branches: int
    ) -> GuidedBackend:
        """Read the model folders and place the models."""
        policy, chat = load_policy(policy_url, placement)
        reward_models = [] if reward_url is None else [load_guide(reward_url, placement)]
        return cls(GuidedDecoder(policy, reward_models, domain, chat.tokenizer, max_branches))

    def reset(self) -> None:
        """An empty batch."""
        self._session = self._decoder.session()
        self._answers: list[_Answer] = []

    def admit(self, jobs: Sequence[Job]) -> None:
        """Let jobs join; a prompt that does not fit the context or the template fails its own job only."""
        for job in jobs:
            try:
                if isinstance(job.payload, ScoreJob):
                    job.finish(self._score(job.payload))
                else:
                    running = self._session.submit(self._request(job.payload))
                    self._answers.append(_Answer(job, running))
            except (ValueError, TemplateError) as error:
                job.fail(ApiError(400, str(error), "messages", "invalid_value"))

    def advance(self) -> None:
        """A few tokens of every answer that is still wanted."""
        for answer in self._answers:
            if not answer.job.wanted:
                self._session.cancel(answer.running)
        self._answers = [answer for answer in self._answers if answer.job.wanted]
        if self._session.is_busy:
            self._session.advance()
        for answer in self._answers:
            answer.tell()
        self._answers = [answer for answer in self._answers if not answer.job.finished]

    def _request(self, job: ChatJob) -> GuidedRequest:
        return GuidedRequest(
            job.messages,
            weights=job.weights,
            guidance=job.guidance,
            num_candidates=job.num_candidates,
            seed=job.seed,
            sampling=job.sampling,
            max_new_tokens=job.max_new_tokens,
            stop=job.stop,
            strategy=job.strategy,
            score_temperature=job.score_temperature,
            standardisation=self._standardisation,
            # Where a step is a whole turn, no shorter limit may cut it in two.
            max_step_tokens=job.max_new_tokens if self._whole_turns else GuidedRequest.max_step_tokens,
        )

    def _score(self, job: ScoreJob) -> list[dict[str, float]]:
        """{objective: score} of every candidate as the next step after the messages."""
        assert self._decoder.reward_models, "the service refuses scoring without a reward model"
        scores: list[dict[str, float]] = [{} for _ in job.candidates]
        for model in self._decoder.reward_models:
            rated = model.score_batch([(job.messages, [text]) for text in job.candidates])
            for own, found in zip(scores, rated, strict=True):
                own.update({name: values[0] for name, values in found.items()})
        return scores


def _scored(candidate: StepCandidate) -> ScoredCandidate:
    return ScoredCandidate(
        candidate.text, len(candidate.token_ids), candidate.scores or None, candidate.total
    )
