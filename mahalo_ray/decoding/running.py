"""The state of one guided request in play."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mahalo_ray.decoding.candidates import StopReason
from mahalo_ray.decoding.guidance import choose
from mahalo_ray.decoding.guide import Prompt
from mahalo_ray.decoding.requests import GuidedRequest, GuidedResult, Step, StepCandidate

NONE_TAKEN = -1  # the text has become too long for a guide: the response ends without another step
_STEP_GOES_ON = (StopReason.STEP, StopReason.LENGTH)


@dataclass
class Running:
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
    _told: int = 0

    @property
    def prompt_ids(self) -> list[int]:
        return self.prompt.token_ids

    def news(self) -> list[Step]:
        """Steps accepted since the last call."""
        new, self._told = self.steps[self._told :], len(self.steps)
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
