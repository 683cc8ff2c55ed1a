"""The state of one guided request in play."""

from __future__ import annotations

from dataclasses import dataclass, field

from mahalo_ray.decoding.candidates import StopReason
from mahalo_ray.decoding.requests import GuidedRequest, GuidedResult, Step
from mahalo_ray.objectives import Weights


@dataclass
class Running:
    """A request in play."""

    request: GuidedRequest
    guidance: Weights | None
    prompt_ids: list[int]
    token_by_token: bool
    row: int = -1
    reward_row: int = -1
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
