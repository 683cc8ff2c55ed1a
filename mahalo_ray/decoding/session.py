"""A batch of guided requests, each at its own step and token; new ones join between tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mahalo_ray.decoding.cached_backbone import memory_errors_alike
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import (
    Choice,
    GuidedRequest,
    GuidedResult,
    Prompt,
    ScoreScale,
    Step,
    StepCandidate,
    TextOutgrown,
    choice_uniforms,
    with_scores,
)
from mahalo_ray.decoding.policy import HeadMix, Policy
from mahalo_ray.decoding.sampling import DrawLimits
from mahalo_ray.decoding.scorers import RewardModels, ScorerGroup
from mahalo_ray.decoding.stopping import INCOMPLETE, AnswerOnly, StopReason, StopRule, TextStop, TextTail
from mahalo_ray.errors import StageError

_STEP_GOES_ON = (StopReason.STEP, StopReason.LENGTH)


@dataclass(eq=False)  # two requests that are equal are still two
class RequestState:
    """A request in play. It ends with a `stop_reason` or an `error`: a ValueError for what is wrong with it
    alone, a StageError where a server that it needs does not answer."""

    request: GuidedRequest
    prompt: Prompt
    token_by_token: bool = False
    row: int = -1  # in the engine
    scorer_row: int = -1
    seed: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    tail: TextTail = field(default_factory=TextTail)
    # Of a step whose tokens are told as they are drawn: those in the answer before it ends, and how many
    # of them are the engine's candidate's (once it has begun anew, the others are its prefix).
    open_step: list[int] = field(default_factory=list)
    num_told: int = 0
    steps: list[Step] = field(default_factory=list)
    stop_reason: StopReason | None = None
    error: ValueError | StageError | None = None
    policy_tokens: int = 0
    reward_tokens: int = 0
    cache_bytes: int = 0
    _reported: int = 0

    @property
    def prompt_ids(self) -> list[int]:
        return self.prompt.token_ids

    @property
    def size(self) -> int:
        """Tokens in play, about: what it needs of memory."""
        return self.request.candidates_per_step * (len(self.prompt_ids) + len(self.token_ids))

    @property
    def is_over(self) -> bool:
        return self.stop_reason is not None or self.error is not None

    def new_steps(self) -> list[Step]:
        """Steps accepted since the last call."""
        new, self._reported = self.steps[self._reported :], len(self.steps)
        return new

    def result(self) -> GuidedResult:
        """The finished answer; raises the request's error if it has one."""
        if self.error is not None:
            raise self.error
        assert self.stop_reason is not None, "the request is still running"
        return GuidedResult(
            text=self.text,
            token_ids=self.token_ids,
            steps=self.steps,
            stop_reason=self.stop_reason,
            prompt_tokens=len(self.prompt_ids),
            policy_tokens=self.policy_tokens,
            reward_tokens=self.reward_tokens,
            cache_bytes=self.cache_bytes,
        )

    @property
    def step_limit(self) -> int:
        """Tokens the next candidates may have."""
        left = self.request.max_new_tokens - len(self.token_ids)
        return left if self.request.takes_whole_answers else min(left, self.request.max_step_tokens)

    @property
    def draw_limits(self) -> DrawLimits:
        """What the next candidates' draws are bound to."""
        left = max(0, self.request.min_tokens - len(self.token_ids))
        return DrawLimits(left, self.request.repetition_penalty)

    def ending(self, reason: StopReason, num_tokens: int) -> StopReason | None:
        """Why the answer is over once a candidate of so many tokens, which ended so, is accepted; None if it
        goes on. A step cut at its own limit goes on as the next step."""
        if reason not in _STEP_GOES_ON:
            return reason
        if len(self.token_ids) + num_tokens >= self.request.max_new_tokens:
            return StopReason.LENGTH
        is_last = len(self.steps) + 1 >= self.request.max_steps and not self.token_by_token
        return StopReason.STEPS if is_last else None

    def tell(self, token_id: int, decode: Callable[[Sequence[int]], str]) -> None:
        """Append a token that was just drawn to the answer, as a step, before its candidate ends."""
        text, tail = self.tail.read([token_id], decode, is_last=False)
        step = Step([StepCandidate(text, [token_id], StopReason.LENGTH, {}, None)], 0)
        self.open_step.append(token_id)
        self.num_told += 1
        self.policy_tokens += 1
        self.token_ids.append(token_id)
        self.text += text
        self.tail = tail
        self.steps.append(step)

    def choice(self, candidates: Sequence[StepCandidate]) -> Choice:
        """The candidates of the next step, for the scorers."""
        ends = [self.ending(c.reason, len(c.token_ids)) is not None for c in candidates]
        return Choice(self.scorer_row, candidates, ends, self.request.takes_whole_answers)

    def choose(self, candidates: Sequence[StepCandidate], scale: ScoreScale) -> int:
        """Which scored candidate goes on."""
        totals = [candidate.total for candidate in candidates if candidate.total is not None]
        if len(totals) < len(candidates):
            return 0  # there was nothing to choose from
        position = len(self.prompt_ids) + len(self.token_ids)
        uniform = choice_uniforms(self.seed, position, len(totals))
        silent = [not (self.text + candidate.text).strip() for candidate in candidates]
        guidance = self.request.guidance_by(scale)
        return guidance.order(torch.tensor(totals, dtype=torch.float64), silent, uniform)[0]

    def extend(self, step: Step, text: str, tail: TextTail | None = None) -> None:
        """Write an accepted step into the answer; `text` is what it adds."""
        accepted = step.accepted
        self.stop_reason = self.ending(accepted.reason, len(accepted.token_ids))
        self.policy_tokens += sum(len(candidate.token_ids) for candidate in step.candidates)
        self.token_ids += accepted.token_ids
        self.text += text
        self.tail = self.tail if tail is None else tail
        if accepted.token_ids:
            self.steps.append(step)
        self.open_step, self.num_told = [], 0


def score_steps(
    states: Sequence[RequestState],
    candidates: Sequence[list[StepCandidate]],
    scorers: ScorerGroup,
    scale: ScoreScale,
) -> list[list[StepCandidate] | ValueError]:
    """The candidates with scores and totals, for requests that have something to choose from, or why a
    request's candidates cannot be scored."""
    guided = [
        number
        for number, (state, own) in enumerate(zip(states, candidates, strict=True))
        if state.request.is_guided and all(candidate.token_ids for candidate in own)
    ]
    results: list[list[StepCandidate] | ValueError] = list(candidates)
    if not guided:
        return results
    scored = scorers.score([states[number].choice(candidates[number]) for number in guided])
    for number, found in zip(guided, scored, strict=True):
        states[number].reward_tokens += found.tokens
        if isinstance(found.scores, ValueError):
            results[number] = found.scores
        else:
            totals = states[number].request.guidance_by(scale).totals(found.scores)
            results[number] = with_scores(candidates[number], found.scores, totals, scale.objectives)
    return results


def decide_steps(
    states: Sequence[RequestState],
    candidates: Sequence[list[StepCandidate]],
    scorers: ScorerGroup,
    scale: ScoreScale,
) -> list[Step | None]:
    """The next step of every request: candidates scored, one chosen. None for a request that is over without
    another step: its text has outgrown a reward model, or its candidates could not be scored."""
    steps: list[Step | None] = []
    for state, own, scored in zip(
        states, candidates, score_steps(states, candidates, scorers, scale), strict=True
    ):
        if isinstance(scored, ValueError):
            state.policy_tokens += sum(len(candidate.token_ids) for candidate in own)
            if isinstance(scored, TextOutgrown):
                state.stop_reason = StopReason.CONTEXT
            else:
                state.error = scored
            steps.append(None)
        else:
            steps.append(Step(scored, state.choose(scored, scale)))
    return steps


TOKENS_AT_ONCE = 8
_SCORED_TOGETHER = 1 / 4  # of the requests in flight
_LONGEST_WAIT = 8  # tokens


class GuidedSession:
    """Requests in play over one policy and its reward models. None waits for another: a request whose
    candidates are all done is scored, and its next step goes on among the others' tokens.
    """

    def __init__(
        self, policy: Policy, models: RewardModels, max_branches: int, max_context: int | None
    ) -> None:
        self.models, self.scorers = models, models.follow()
        self._boundary, self._chat, self._vocabulary = models.boundary, models.format, models.vocabulary
        self._max_branches = max_branches
        context = policy.max_context if max_context is None else max_context
        if self.scorers.max_context is not None:
            context = min(context, self.scorers.max_context)
        self.engine = self._new_engine(policy, context)
        self._waiting: deque[RequestState] = deque()
        self._active: list[RequestState] = []
        self._done: list[RequestState] = []  # whose candidates have ended, not yet scored
        self._held = 0  # tokens since the first of them

    def _new_engine(self, policy: Policy, max_context: int) -> Engine:
        return Engine(policy, max_context, stop_ids=self._chat.end_ids, texts=self._vocabulary)

    @property
    def is_busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._active)

    @property
    def num_branches(self) -> int:
        """Candidates that are being decoded."""
        return sum(state.request.candidates_per_step for state in self._active)

    @property
    def nbytes(self) -> int:
        """Bytes of the policy's keys and values now."""
        return self.engine.nbytes

    @property
    def max_context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.engine.max_context

    @property
    def vocab_size(self) -> int:
        """Token ids that the policy knows."""
        return self.engine.policy.vocab_size

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values there have been, of all models."""
        return self.engine.peak_bytes + self.scorers.peak_bytes

    def submit(
        self, request: GuidedRequest, token_by_token: bool = False, prompt: Prompt | None = None
    ) -> RequestState:
        """Queue a request; `prompt`: what `check` gave for it. ValueError if it can never run: too long, no
        reward model for it, unknown objectives.
        """
        if token_by_token and request.is_guided:
            raise ValueError("single tokens can only be streamed without candidates: use num_candidates=1")
        if request.strategy in ("beam", "dvts"):
            raise ValueError(
                f"strategy '{request.strategy}' needs more than one row: use GuidedDecoder.generate"
            )
        prompt = self.check(request) if prompt is None else prompt
        state = RequestState(request, prompt, token_by_token, seed=request.seed)
        self._waiting.append(state)
        return state

    def check(self, request: GuidedRequest) -> Prompt:
        """The request's prompt, encoded. ValueError as `submit` says; any strategy."""
        if request.candidates_per_step > self._max_branches:
            raise ValueError(
                f"num_candidates is {request.num_candidates}: at most {self._max_branches} run at once"
            )
        self.engine.policy.check_mix(HeadMix(request.weights, request.strength))
        return self.models.check(request, self.scorers, self.engine.max_context, "context holds")

    def cancel(self, state: RequestState) -> None:
        """Take a request out, whether it waits or runs."""
        if state in self._waiting:
            self._waiting.remove(state)
        elif state in self._active:
            self._remove(state)

    def advance(self) -> None:
        """Decode until a step of some request has been decided, but at most `TOKENS_AT_ONCE` tokens, so that
        the caller can let others join or leave."""
        try:
            with memory_errors_alike():
                self._advance()
        except torch.OutOfMemoryError:
            self._recover()

    def _advance(self) -> None:
        self._start(self.admit())
        by_row = {state.row: state for state in self._active}
        for _ in range(TOKENS_AT_ONCE):
            if not self._active:
                return
            self._done += [by_row[row] for row in self.engine.step()]
            told = self._tell()
            if self._is_time():
                self._decide()
                return
            if told:
                return

    def _tell(self) -> bool:
        """Write the tokens just drawn into the answers that grow token by token; whether there are any."""
        growing = [state for state in self._active if state.token_by_token and state not in self._done]
        if not growing:
            return False
        for state, token_id in zip(growing, self.engine.last_drawn([s.row for s in growing]), strict=True):
            state.tell(token_id, self._chat.decode)
        return True

    def _is_time(self) -> bool:
        """Whether those who are done are scored now.

        Scoring is a forward of its own, which costs about as much for one request as for a few. So where many
        are in flight, one that is done waits, a few tokens at most, until a quarter of them are.
        """
        if not self._done:
            return False
        self._held += 1
        some = len(self._done) >= _SCORED_TOGETHER * len(self._active)
        alone = not self.engine.is_busy or not all(state.request.is_guided for state in self._done)
        return some or alone or self._held > _LONGEST_WAIT

    def _decide(self) -> None:
        """Scores, choice and next step of the requests that are done. Finished ones leave."""
        done, self._done, self._held = self._done, [], 0
        sampled = self.engine.collect([state.row for state in done])
        steps = decide_steps(done, self._candidates(done, sampled), self.scorers, self.models.scale)
        self.engine.accept(sampled, [-1 if step is None else step.chosen for step in steps])
        for state, step in zip(done, steps, strict=True):
            if step is not None:
                self.extend(state, step)
            if state.is_over:
                self._remove(state)
            elif step is not None and state.request.is_guided:
                self.scorers.accept([state.scorer_row], [step.accepted])
        self._start([state for state in done if not state.is_over])

    def _start(self, states: list[RequestState]) -> None:
        """Let the next steps of these requests begin."""
        self.engine.start(
            [state.row for state in states],
            [state.request.candidates_per_step for state in states],
            [state.request.sampling for state in states],
            [state.seed for state in states],
            [state.step_limit for state in states],
            [self._rule(state) for state in states],
            [state.draw_limits for state in states],
        )

    def sample(
        self, states: list[RequestState], counts: list[int]
    ) -> tuple[Candidates, list[list[StepCandidate]]]:
        """Candidates of these requests' next steps, all sampled to their ends: for searches whose rows are
        compared with each other."""
        sampled = self.engine.sample(
            [state.row for state in states],
            counts,
            [state.request.sampling for state in states],
            [state.seed for state in states],
            [state.step_limit for state in states],
            self._chat.end_ids,
            TextStop(self._vocabulary, [self._rule(state) for state in states]),
        )
        return sampled, self._candidates(states, sampled)

    def _candidates(self, states: list[RequestState], sampled: Candidates) -> list[list[StepCandidate]]:
        """What was sampled for these requests, as text, without what is in their answers already."""
        new: list[list[StepCandidate]] = []
        for state, token_ids, reasons in zip(states, sampled.token_ids, sampled.reasons, strict=True):
            candidates = []
            for all_ids, reason in zip(token_ids, reasons, strict=True):
                ids = all_ids[state.num_told :]
                text, _ = self._text_after(state, ids, reason)
                candidates.append(StepCandidate(text, ids, reason, {}, None))
            new.append(candidates)
        return new

    def _text_after(
        self, state: RequestState, ids: Sequence[int], reason: StopReason
    ) -> tuple[str, TextTail]:
        """The text these tokens add to the answer, without special tokens."""
        return state.tail.read(ids, self._chat.decode, state.ending(reason, len(ids)) is not None)

    def admit(self) -> list[RequestState]:
        """Let waiting requests in while there is room for their branches: those that join now, read by the
        models."""
        busy = sum(state.request.candidates_per_step for state in self._active)
        joining = []
        while self._waiting and busy + self._waiting[0].request.candidates_per_step <= self._max_branches:
            joining.append(self._waiting.popleft())
            busy += joining[-1].request.candidates_per_step
        if not joining:
            return []
        self._active += joining
        for state in joining:
            state.policy_tokens = len(state.prompt_ids)
        self._read(joining)
        return [state for state in joining if state.error is None]

    def _read(self, states: list[RequestState]) -> None:
        """Give these requests rows and let the models read what there is of them. One that needs more memory
        than there is fails alone."""
        rows = self.engine.add(
            len(states),
            [state.request.weights for state in states],
            [len(state.steps) if state.request.is_guided else 0 for state in states],
            [state.request.strength for state in states],
        )
        for state, row in zip(states, rows, strict=True):
            state.row = row
        guided = [state for state in states if state.request.is_guided]
        opened = self.scorers.open([state.prompt for state in guided])
        for state, row in zip(guided, opened, strict=True):
            state.scorer_row = row
            for step in state.steps:
                self.scorers.accept([row], [step.accepted])
        texts = [state.prompt_ids + state.token_ids for state in states]
        try:
            with memory_errors_alike():
                self.engine.append(rows, texts)
        except torch.OutOfMemoryError:
            for state in states:
                try:
                    with memory_errors_alike():
                        self.engine.append([state.row], [[]])  # its own text alone
                except torch.OutOfMemoryError:
                    self._fail(state)

    def _recover(self) -> None:
        """A forward needed more memory than there is: the largest request fails, and the others begin their
        steps again in a fresh batch. Draws depend on step and position, so their answers stay the same."""
        self._fail(max(self._active, key=lambda state: state.size))
        old, self._done, self._held = self.engine, [], 0
        self.engine = self._new_engine(old.policy, old.max_context)
        self.engine.tokens_forwarded, self.engine.peak_bytes = old.tokens_forwarded, old.peak_bytes
        self.scorers = self.models.follow()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for state in self._active:
            state.num_told = 0
        self._read(list(self._active))
        self._start(list(self._active))

    def _fail(self, state: RequestState) -> None:
        state.error = ValueError(
            "the request needs more memory than there is: ask for fewer candidates or a shorter text"
        )
        self._remove(state)

    def _rule(self, state: RequestState) -> StopRule:
        """How this request's next candidates may end. Whole answers are not cut at steps."""
        boundary = AnswerOnly(self._boundary) if state.request.takes_whole_answers else self._boundary
        begun = self._vocabulary.decode(state.open_step).rstrip(INCOMPLETE) if state.open_step else ""
        return StopRule(
            boundary,
            state.request.stop,
            before=state.text,
            begun=begun,
            begun_tokens=len(state.open_step),
            context_ids=state.tail.token_ids,
        )

    def extend(self, state: RequestState, step: Step) -> None:
        """Write the chosen candidate into the answer."""
        accepted = step.accepted
        state.extend(step, *self._text_after(state, accepted.token_ids, accepted.reason))

    def _remove(self, state: RequestState) -> None:
        state.cache_bytes = self.peak_bytes
        self._active.remove(state)
        if state in self._done:
            self._done.remove(state)
        self.engine.drop([state.row])
        if state.request.is_guided:
            self.scorers.drop([state.scorer_row])
