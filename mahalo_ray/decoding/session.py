"""A batch of guided requests, each at its own step and token; new ones join between tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine, InFlight
from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Step, StepCandidate, choose, with_totals
from mahalo_ray.decoding.policy import Policy
from mahalo_ray.decoding.scorers import Guides, Prompt, check_guidance
from mahalo_ray.decoding.stopping import (
    AnswerOnly,
    Boundary,
    Candidates,
    StopReason,
    StopRule,
    TextStop,
    TokenTexts,
)

NONE_TAKEN = -1  # the text has become too long for a guide: the response ends without another step
_STEP_GOES_ON = (StopReason.STEP, StopReason.LENGTH)


@dataclass
class RequestState:
    """A request in play."""

    request: GuidedRequest
    prompt: Prompt
    token_by_token: bool
    row: int = -1
    guide_row: int = -1
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    open_step: list[int] = field(default_factory=list)  # tokens of a step handed out token by token
    steps: list[Step] = field(default_factory=list)
    stop_reason: StopReason | None = None
    policy_tokens: int = 0
    reward_tokens: int = 0
    cache_bytes: int = 0
    seed: int = 0
    _reported: int = 0

    @property
    def prompt_ids(self) -> list[int]:
        return self.prompt.token_ids

    def new_steps(self) -> list[Step]:
        """Steps accepted since the last call."""
        new, self._reported = self.steps[self._reported :], len(self.steps)
        return new

    def result(self) -> GuidedResult:
        """The finished response."""
        assert self.stop_reason is not None, "the request is still running"
        return GuidedResult(
            self.text,
            self.token_ids,
            self.steps,
            self.stop_reason,
            len(self.prompt_ids),
            self.policy_tokens,
            self.reward_tokens,
            self.cache_bytes,
        )

    @property
    def step_limit(self) -> int:
        """Tokens the next candidates may have."""
        left = self.request.max_new_tokens - len(self.token_ids)
        if self.token_by_token:
            return 1
        return left if self.request.strategy == "best_of_n" else min(left, self.request.max_step_tokens)

    def choice(self, own: Sequence[StepCandidate]) -> int:
        """Which candidate of the next step goes on, or NONE_TAKEN."""
        if not self.request.is_guided or any(not candidate.token_ids for candidate in own):
            return 0  # there is nothing to choose from
        compared = [candidate.total for candidate in own if candidate.total is not None]
        if len(compared) < len(own):
            return NONE_TAKEN
        # An answer that says nothing is taken only if no candidate says anything.
        silent = [not self.text and not candidate.text.strip() for candidate in own]
        passed_over = [quiet and not all(silent) for quiet in silent]
        values = [float("-inf") if out else t for out, t in zip(passed_over, compared, strict=True)]
        position = len(self.prompt_ids) + len(self.token_ids)
        return choose(torch.tensor(values, dtype=torch.float64), self.request, position)

    def ending(self, reason: StopReason) -> StopReason | None:
        """Why the response is over after a step that ended so, or None. A step cut at its own limit goes on
        as the next step."""
        if reason not in _STEP_GOES_ON:
            return reason
        if len(self.token_ids) >= self.request.max_new_tokens:
            return StopReason.LENGTH
        many = len(self.steps) >= self.request.max_steps and not self.token_by_token
        return StopReason.STEPS if many else None


TOKENS_AT_ONCE = 8
_SCORED_TOGETHER = 1 / 8  # of the requests in flight
_LONGEST_WAIT = 4  # tokens


class GuidedSession:
    """Requests in play over one policy and its guides. None waits for another: a request whose candidates are
    all done is scored, and its next step goes on among the others' tokens.
    """

    def __init__(
        self,
        policy: Policy,
        guides: Guides | None,
        boundary: Boundary,
        chat: ChatFormat,
        vocabulary: TokenTexts,
        max_branches: int,
        max_context: int | None,
    ) -> None:
        self._boundary, self._chat, self._vocabulary = boundary, chat, vocabulary
        self._max_branches = max_branches
        self.guides = guides
        context = policy.max_context if max_context is None else max_context
        if guides is not None and guides.max_context is not None:
            context = min(context, guides.max_context)
        self.engine = Engine(policy, context)
        self.in_flight = InFlight(self.engine, [chat.end_id], vocabulary)
        self._waiting: deque[RequestState] = deque()
        self._done: list[RequestState] = []  # whose candidates have ended, not yet scored
        self._held = 0  # tokens since the first of them
        self._active: list[RequestState] = []

    @property
    def is_busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._active)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values there have been, of all models."""
        return self.engine.peak_bytes + (0 if self.guides is None else self.guides.peak_bytes)

    def submit(self, request: GuidedRequest, token_by_token: bool = False) -> RequestState:
        """Queue a request. ValueError if it can never run: too long, no reward model for it, unknown
        objectives.
        """
        if token_by_token and request.is_guided:
            raise ValueError("single tokens can only be streamed without candidates: use num_candidates=1")
        if request.strategy in ("beam", "dvts"):
            raise ValueError(
                f"strategy '{request.strategy}' needs more than one row: use GuidedDecoder.generate"
            )
        prompt = self.check(request)
        running = RequestState(request, prompt, token_by_token, seed=request.seed)
        self._waiting.append(running)
        return running

    def check(self, request: GuidedRequest) -> Prompt:
        """The request's prompt, encoded. ValueError as `submit` says; any strategy."""
        if request.candidates_per_step > self._max_branches:
            raise ValueError(
                f"num_candidates is {request.num_candidates}: at most {self._max_branches} run at once"
            )
        self.engine.policy.check_weights(request.weights)
        messages = [Message.model_validate(message) for message in request.messages]
        check_guidance(request, self.guides, messages)
        prompt = Prompt(messages, self._chat.prompt_ids(messages))
        if len(prompt.token_ids) >= self.engine.max_context:
            raise ValueError(
                f"the prompt has {len(prompt.token_ids)} tokens and the context holds "
                f"{self.engine.max_context}: there is no room for an answer"
            )
        return prompt

    def cancel(self, running: RequestState) -> None:
        """Take a request out, whether it waits or runs."""
        if running in self._waiting:
            self._waiting.remove(running)
        elif running in self._active:
            self._leave(running)

    def advance(self) -> None:
        """Decode until a step of some request has been decided, but at most `TOKENS_AT_ONCE` tokens, so that
        the caller can let others join or leave."""
        self._begin(self.admit())
        by_row = {one.row: one for one in self._active}
        for _ in range(TOKENS_AT_ONCE):
            if not self._active:
                return
            self._done += [by_row[row] for row in self.in_flight.step()]
            if self._is_time():
                self._decide()
                return

    def _is_time(self) -> bool:
        """Whether those who are done are scored now.

        Scoring is a forward of its own, which costs about as much for one request as for a few. So where many
        are in flight, one that is done waits, a few tokens at most, until some others are done too.
        """
        if not self._done:
            return False
        self._held += 1
        some = len(self._done) >= _SCORED_TOGETHER * len(self._active)
        alone = not self.in_flight.is_busy or not all(one.request.is_guided for one in self._done)
        return some or alone or self._held > _LONGEST_WAIT

    def _decide(self) -> None:
        """Scores, choice and next step of the requests that are done. Finished ones leave."""
        done, self._done, self._held = self._done, [], 0
        candidates = self.in_flight.collect([one.row for one in done])
        offered = self._offered(done, candidates)
        choice = [one.choice(own) for one, own in zip(done, offered, strict=True)]
        self.engine.accept(candidates, choice)
        for one, own, chosen in zip(done, offered, choice, strict=True):
            self._take(one, own, chosen)
        self._begin([one for one in done if one.stop_reason is None])

    def _begin(self, requests: list[RequestState]) -> None:
        """Let the next steps of these requests begin."""
        self.in_flight.start(
            [one.row for one in requests],
            [one.request.candidates_per_step for one in requests],
            [one.request.sampling for one in requests],
            [one.seed for one in requests],
            [one.step_limit for one in requests],
            [self._rule(one) for one in requests],
        )

    def offer(
        self, active: list[RequestState], counts: list[int]
    ) -> tuple[Candidates, list[list[StepCandidate]]]:
        """Candidates of these requests' next steps, all sampled to their ends, scored where there is
        something to choose from. For searches whose rows are compared with each other."""
        candidates = self.engine.sample(
            [one.row for one in active],
            counts,
            [one.request.sampling for one in active],
            [one.seed for one in active],
            [one.step_limit for one in active],
            [self._chat.end_id],
            TextStop(self._vocabulary, [self._rule(one) for one in active]),
        )
        return candidates, self._offered(active, candidates)

    def _offered(self, active: list[RequestState], candidates: Candidates) -> list[list[StepCandidate]]:
        """What was sampled for these requests, with scores."""
        offered = [
            [
                StepCandidate(self._text_after(one, ids), ids, reason, {}, None)
                for ids, reason in zip(own, reasons, strict=True)
            ]
            for one, own, reasons in zip(active, candidates.token_ids, candidates.reasons, strict=True)
        ]
        return self._scored(active, offered)

    def admit(self) -> list[RequestState]:
        """Let waiting requests in while there is room for their branches: those that join now, read by the
        models."""
        busy = sum(one.request.candidates_per_step for one in self._active)
        joining = []
        while self._waiting and busy + self._waiting[0].request.candidates_per_step <= self._max_branches:
            joining.append(self._waiting.popleft())
            busy += joining[-1].request.candidates_per_step
        if not joining:
            return []
        rows = self.engine.add(len(joining), [one.request.weights for one in joining])
        for one, row in zip(joining, rows, strict=True):
            one.row = row
            one.policy_tokens = len(one.prompt_ids)
        self._active += joining
        self.engine.append(rows, [one.prompt_ids for one in joining])
        guided = [one for one in joining if one.request.is_guided]
        if self.guides is not None and guided:
            opened = self.guides.open([one.prompt for one in guided])
            for one, row in zip(guided, opened, strict=True):
                one.guide_row = row
        return joining

    def _rule(self, one: RequestState) -> StopRule:
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

    def _scored(
        self, active: list[RequestState], offered: list[list[StepCandidate]]
    ) -> list[list[StepCandidate]]:
        """The candidates with scores and totals, for requests that have something to choose from."""
        guided = [
            i
            for i, one in enumerate(active)
            if one.request.is_guided and all(c.token_ids for c in offered[i])
        ]
        if not guided:
            return offered
        assert self.guides is not None
        scores, encoded = self.guides.score(
            [active[i].guide_row for i in guided],
            [offered[i] for i in guided],
            [active[i].request.strategy == "best_of_n" for i in guided],
        )
        result = list(offered)
        for at, i in enumerate(guided):
            active[i].reward_tokens += encoded[at]
            own = scores[at, : len(offered[i])]
            if not own.isnan().any():
                result[i] = with_totals(offered[i], own, active[i].request, self.guides.scale)
        return result

    def _take(self, one: RequestState, own: list[StepCandidate], chosen: int) -> None:
        """Make the chosen candidate part of the response, and finish the request if that ends it."""
        if chosen == NONE_TAKEN:
            one.policy_tokens += sum(len(candidate.token_ids) for candidate in own)
            one.stop_reason = StopReason.CONTEXT
        else:
            self.extend(one, own, chosen)
        if one.stop_reason is not None:
            self._leave(one)
        elif self.guides is not None and one.request.is_guided:
            self.guides.accept([one.guide_row], [own[chosen]])

    def extend(self, one: RequestState, own: list[StepCandidate], chosen: int) -> None:
        """Write the chosen candidate into the response."""
        accepted = own[chosen]
        one.policy_tokens += sum(len(candidate.token_ids) for candidate in own)
        one.token_ids += accepted.token_ids
        one.text = self._chat.decode(one.token_ids)
        if accepted.token_ids:
            one.steps.append(Step(own, chosen))
        one.stop_reason = one.ending(accepted.reason)
        if one.token_by_token:
            one.open_step = [] if accepted.reason is StopReason.STEP else one.open_step + accepted.token_ids

    def _leave(self, one: RequestState) -> None:
        one.cache_bytes = self.peak_bytes
        self._active.remove(one)
        if one in self._done:
            self._done.remove(one)
        self.in_flight.abort([one.row])
        self.engine.drop([one.row])
        if self.guides is not None and one.request.is_guided:
            self.guides.drop([one.guide_row])

    def _text_after(self, one: RequestState, ids: list[int]) -> str:
        """The text these tokens add to the response, without special tokens."""
        whole = self._chat.decode(one.token_ids + ids)
        return whole[len(one.text) :] if whole.startswith(one.text) else self._chat.decode(ids)
