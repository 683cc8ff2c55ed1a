"""A batch of guided requests, each at its own step; new ones join between steps."""

from __future__ import annotations

from collections import deque

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.batch import BatchedConversations
from mahalo_ray.decoding.boundaries import AnswerOnly, Boundary
from mahalo_ray.decoding.candidates import Candidates, StopReason
from mahalo_ray.decoding.guidance import with_totals
from mahalo_ray.decoding.guide import Prompt
from mahalo_ray.decoding.guides import Guides, check_guidance
from mahalo_ray.decoding.policy import Policy
from mahalo_ray.decoding.requests import GuidedRequest, Step, StepCandidate
from mahalo_ray.decoding.running import NONE_TAKEN, Running
from mahalo_ray.decoding.stopping import StopRule, TextStop, Vocabulary


class GuidedSession:
    """Requests in play over one policy and its guides. `advance` takes every active request one step
    on.
    """

    def __init__(
        self,
        policy: Policy,
        guides: Guides | None,
        boundary: Boundary,
        chat: ChatFormat,
        vocabulary: Vocabulary,
        max_branches: int,
        max_context: int | None,
    ) -> None:
        self._boundary, self._chat, self._vocabulary = boundary, chat, vocabulary
        self._max_branches = max_branches
        self.guides = guides
        context = policy.max_context if max_context is None else max_context
        if guides is not None and guides.max_context is not None:
            context = min(context, guides.max_context)
        self.engine = BatchedConversations(policy, context)
        self._waiting: deque[Running] = deque()
        self._active: list[Running] = []

    @property
    def is_busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._active)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values there have been, of all models."""
        return self.engine.peak_bytes + (0 if self.guides is None else self.guides.peak_bytes)

    def submit(self, request: GuidedRequest, token_by_token: bool = False) -> Running:
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
        running = Running(request, prompt, token_by_token, seed=request.seed)
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
        choice = [one.choice(own) for one, own in zip(active, offered, strict=True)]
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
        if self.guides is not None and guided:
            opened = self.guides.open([one.prompt for one in guided])
            for one, row in zip(guided, opened, strict=True):
                one.guide_row = row

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

    def _take(self, one: Running, own: list[StepCandidate], chosen: int) -> None:
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

    def extend(self, one: Running, own: list[StepCandidate], chosen: int) -> None:
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

    def _leave(self, one: Running) -> None:
        one.cache_bytes = self.peak_bytes
        self._active.remove(one)
        self.engine.drop([one.row])
        if self.guides is not None and one.request.is_guided:
            self.guides.drop([one.guide_row])

    def _text_after(self, one: Running, ids: list[int]) -> str:
        """The text these tokens add to the response, without special tokens."""
        whole = self._chat.decode(one.token_ids + ids)
        return whole[len(one.text) :] if whole.startswith(one.text) else self._chat.decode(ids)
