"""A batch of guided requests, each at its own step; new ones join between steps."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.batch import BatchedConversations
from mahalo_ray.decoding.boundaries import AnswerOnly, Boundary
from mahalo_ray.decoding.candidates import Candidates, StopReason
from mahalo_ray.decoding.guidance import choose, totals
from mahalo_ray.decoding.policy import Policy
from mahalo_ray.decoding.requests import GuidedRequest, Step, StepCandidate
from mahalo_ray.decoding.reward_cache import RewardConversations
from mahalo_ray.decoding.running import Running
from mahalo_ray.decoding.stopping import StopRule, TextStop, Vocabulary, step_starts
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.objectives import Weights

# Room for the tokens that close a step the policy left open, when it is scored.
_CLOSING_ROOM = 16
_STEP_GOES_ON = (StopReason.STEP, StopReason.LENGTH)


class GuidedSession:
    """Requests in play over one policy and one reward model. `advance` takes every active request one step
    on.
    """

    def __init__(
        self,
        policy: Policy,
        reward_model: ProcessRewardModel | None,
        boundary: Boundary,
        chat: ChatFormat,
        vocabulary: Vocabulary,
        max_branches: int,
        max_context: int | None,
    ) -> None:
        self._model, self._boundary, self._chat, self._vocabulary = reward_model, boundary, chat, vocabulary
        self._max_branches = max_branches
        self.scorer = None if reward_model is None else RewardConversations(reward_model)
        context = policy.max_context if max_context is None else max_context
        if self.scorer is not None:
            context = min(context, self.scorer.max_context - _CLOSING_ROOM)
        self.engine = BatchedConversations(policy, context)
        self._waiting: deque[Running] = deque()
        self._active: list[Running] = []

    @property
    def is_busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._active)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values there have been, of both models."""
        return self.engine.peak_bytes + (0 if self.scorer is None else self.scorer.peak_bytes)

    def submit(self, request: GuidedRequest, token_by_token: bool = False) -> Running:
        """Queue a request. ValueError if it can never run: too long, no reward model for it, unknown
        objectives.
        """
        if request.candidates_per_step > self._max_branches:
            raise ValueError(
                f"num_candidates is {request.num_candidates}: at most {self._max_branches} run at once"
            )
        if token_by_token and request.is_guided:
            raise ValueError("single tokens can only be streamed without candidates: use num_candidates=1")
        if request.strategy in ("beam", "dvts"):
            raise ValueError(
                f"strategy '{request.strategy}' needs more than one row: use GuidedDecoder.generate"
            )
        self.engine.policy.check_weights(request.weights)
        guidance = None
        if request.is_guided:
            if self._model is None:
                raise ValueError(f"strategy '{request.strategy}' needs a reward model; this decoder has none")
            guidance = request.guidance_over(self._model.objectives)
            guidance.over(self._model.objectives)
        elif request.guidance is not None and request.strategy == "none":
            raise ValueError("guidance was given with strategy 'none', which does not use it")
        prompt = self._chat.prompt_ids([Message.model_validate(message) for message in request.messages])
        if len(prompt) >= self.engine.max_context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.engine.max_context}: "
                "there is no room for an answer"
            )
        running = Running(request, guidance, prompt, token_by_token, seed=request.seed)
        self._waiting.append(running)
        return running

    def cancel(self, running: Running) -> None:
        """Take a request out, whether it waits or runs."""
        if running in self._waiting:
            self._waiting.remove(running)
        elif running in self._active:
            self._leave(running)

    def advance(self) -> None:
        """One step of every active request: candidates, scores, choice. Finished ones leave, others join."""
        self.admit()
        active = list(self._active)
        if not active:
            return
        candidates, offered = self.offer(active, [one.request.candidates_per_step for one in active])
        choice = [self._choice(one, own) for one, own in zip(active, offered, strict=True)]
        self.engine.accept(candidates, choice)
        for one, own, chosen in zip(active, offered, choice, strict=True):
            self._take(one, own, chosen)

    def offer(self, active: list[Running], counts: list[int]) -> tuple[Candidates, list[list[StepCandidate]]]:
        """Candidates of these requests' next steps, scored where there is something to choose from."""
        candidates = self.engine.sample(
            [one.row for one in active],
            counts,
            [one.request.sampling for one in active],
            [one.seed for one in active],
            [one.step_limit for one in active],
            [self._chat.end_id],
            TextStop(self._vocabulary, [self._rule(one) for one in active]),
        )
        offered = [
            [
                StepCandidate(self._text_after(one, ids), ids, reason, {}, None)
                for ids, reason in zip(own, reasons, strict=True)
            ]
            for one, own, reasons in zip(active, candidates.token_ids, candidates.reasons, strict=True)
        ]
        return candidates, self._scored(active, offered)

    def admit(self) -> None:
        """Let waiting requests in while there is room for their branches."""
        busy = sum(one.request.candidates_per_step for one in self._active)
        joining = []
        while self._waiting and busy + self._waiting[0].request.candidates_per_step <= self._max_branches:
            joining.append(self._waiting.popleft())
            busy += joining[-1].request.candidates_per_step
        if not joining:
            return
        rows = self.engine.add(len(joining), [one.request.weights for one in joining])
        for one, row in zip(joining, rows, strict=True):
            one.row = row
            one.policy_tokens = len(one.prompt_ids)
        self._active += joining
        self.engine.append(rows, [one.prompt_ids for one in joining])
        guided = [one for one in joining if one.request.is_guided]
        if self.scorer is not None and guided:
            for one, row in zip(guided, self.scorer.add(len(guided)), strict=True):
                one.reward_row = row
                one.reward_tokens = len(one.prompt_ids)
            self.scorer.append([one.reward_row for one in guided], [one.prompt_ids for one in guided])

    def _rule(self, one: Running) -> StopRule:
        """How this request's next candidates may end. Whole responses are not cut at steps."""
        whole = one.request.strategy == "best_of_n"
        before = self._vocabulary.decode(one.open_step) if one.open_step else ""
        return StopRule(
            AnswerOnly(self._boundary) if whole else self._boundary,
            one.request.stop,
            one.text,
            before,
            len(one.open_step),
        )

    def _scored(self, active: list[Running], offered: list[list[StepCandidate]]) -> list[list[StepCandidate]]:
        """The candidates with scores and totals, for requests that have something to choose from."""
        guided = [
            i
            for i, one in enumerate(active)
            if one.request.is_guided and all(c.token_ids for c in offered[i])
        ]
        if not guided:
            return offered
        assert self.scorer is not None and self._model is not None
        views = [[self._as_scored(active[i], candidate) for candidate in offered[i]] for i in guided]
        scores = self.scorer.score_candidates(
            [active[i].reward_row for i in guided],
            [[ids for ids, _ in own] for own in views],
            [[start for _, start in own] for own in views],
        )
        result = list(offered)
        for at, i in enumerate(guided):
            one, own = active[i], offered[i]
            one.reward_tokens += sum(map(len, {tuple(ids) for ids, _ in views[at]}))
            assert one.guidance is not None
            result[i] = self._with_totals(own, scores[at, : len(own)], one, one.guidance)
        return result

    def _with_totals(
        self, own: list[StepCandidate], scores: Tensor, one: Running, guidance: Weights
    ) -> list[StepCandidate]:
        assert self._model is not None
        total = totals(scores, guidance, one.request, self._model).tolist()
        names = self._model.objectives
        return [
            StepCandidate(c.text, c.token_ids, c.reason, dict(zip(names, row, strict=True)), t)
            for c, row, t in zip(own, scores.tolist(), total, strict=True)
        ]

    def _as_scored(self, one: Running, candidate: StepCandidate) -> tuple[list[int], int]:
        """Token ids as the reward model learned to read them, and where the step to score begins in them.

        Where steps end with a separator, a response that ended without one is given it, as in training.
        """
        assert self._model is not None
        ids, separator = candidate.token_ids, self._model.step_separator
        start = 0
        if one.request.strategy == "best_of_n":
            start = step_starts(ids, self._boundary, self._vocabulary)[-1]
        if separator is None or candidate.reason in (StopReason.STEP, StopReason.LENGTH, StopReason.CONTEXT):
            return ids, start
        text = self._chat.decode(ids[start:])
        closed = text if text.endswith(separator) else text + separator
        return ids[:start] + self._chat.encode_reply(closed)[:-1], start

    def _choice(self, one: Running, own: list[StepCandidate]) -> int:
        compared = [candidate.total for candidate in own if candidate.total is not None]
        if len(compared) < len(own):  # there was nothing to choose from
            return 0
        # An answer that says nothing is taken only if no candidate says anything.
        silent = [not one.text and not candidate.text.strip() for candidate in own]
        passed_over = [quiet and not all(silent) for quiet in silent]
        values = [float("-inf") if out else t for out, t in zip(passed_over, compared, strict=True)]
        return choose(
            torch.tensor(values, dtype=torch.float64), one.request, len(one.prompt_ids) + len(one.token_ids)
        )

    def _take(self, one: Running, own: list[StepCandidate], chosen: int) -> None:
        """Make the chosen candidate part of the response, and finish the request if that ends it."""
        self.extend(one, own, chosen)
        if one.stop_reason is not None:
            self._leave(one)
        elif self.scorer is not None and one.request.is_guided:
            self.scorer.accept([one.reward_row], [own[chosen].token_ids])

    def extend(self, one: Running, own: list[StepCandidate], chosen: int) -> None:
        """Write the chosen candidate into the response."""
        accepted = own[chosen]
        one.policy_tokens += sum(len(candidate.token_ids) for candidate in own)
        one.token_ids += accepted.token_ids
        one.text = self._chat.decode(one.token_ids)
        if accepted.token_ids:
            one.steps.append(Step(own, chosen))
        one.stop_reason = self._end(one, accepted.reason)
        if one.token_by_token:
            one.open_step = [] if accepted.reason is StopReason.STEP else one.open_step + accepted.token_ids

    def _end(self, one: Running, reason: StopReason) -> StopReason | None:
        """Why the response is over, or None. A step cut at its own limit goes on as the next step."""
        if reason not in _STEP_GOES_ON:
            return reason
        if len(one.token_ids) >= one.request.max_new_tokens:
            return StopReason.LENGTH
        return (
            StopReason.STEPS if len(one.steps) >= one.request.max_steps and not one.token_by_token else None
        )

    def _leave(self, one: Running) -> None:
        one.cache_bytes = self.peak_bytes
        self._active.remove(one)
        self.engine.drop([one.row])
        if self.scorer is not None and one.request.is_guided:
            self.scorer.drop([one.reward_row])

    def _text_after(self, one: Running, ids: list[int]) -> str:
        """The text these tokens add to the response, without special tokens."""
        whole = self._chat.decode(one.token_ids + ids)
        return whole[len(one.text) :] if whole.startswith(one.text) else self._chat.decode(ids)
