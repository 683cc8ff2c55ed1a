"""What the server answers: OpenAI's chat completion objects, with our `mahalo` field beside theirs."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mahalo_ray.objectives import Weights


@dataclass(frozen=True)
class ScoredCandidate:
    """One candidate step. `scores`: the reward model's score per objective; `total`: what the choice was made
    by. Both are None when no reward model was asked.
    """

    text: str
    num_tokens: int
    scores: Mapping[str, float] | None = None
    total: float | None = None

    def body(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.num_tokens,
            "scores": None if self.scores is None else dict(self.scores),
            "total": self.total,
        }


@dataclass(frozen=True)
class Step:
    """One accepted step: its candidates, which was chosen, and the text it adds to the answer (cut at a stop
    string).
    """

    text: str
    chosen: int
    candidates: list[ScoredCandidate]

    def body(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "candidates": [candidate.body() for candidate in self.candidates]}


@dataclass(frozen=True)
class Reply:
    """A finished answer. `tail`: text that was held back as the possible beginning of a stop string.

    `completion_tokens` counts the accepted tokens, `sampled_tokens` those of all candidates.
    """

    steps: list[Step]
    tail: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    sampled_tokens: int

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps) + self.tail

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Choices:
    """What decided an answer: sent back with it, so that it can be asked for again."""

    objectives: Weights | None
    guidance: Weights | None
    strategy: str
    num_candidates: int
    seed: int
    started: float = field(default_factory=time.monotonic)

    def body(self, reply: Reply) -> dict[str, Any]:
        """The `mahalo` field."""
        return {
            "objectives": None if self.objectives is None else dict(self.objectives),
            "guidance": None if self.guidance is None else dict(self.guidance),
            "strategy": self.strategy,
            "num_candidates": self.num_candidates,
            "seed": self.seed,
            "steps": [step.body() for step in reply.steps],
            "sampled_tokens": reply.sampled_tokens,
            "seconds": time.monotonic() - self.started,
        }


class Completion:
    """The identity shared by an answer's objects: one completion, or the chunks of one stream."""

    def __init__(self, model: str, choices: Choices) -> None:
        self.choices = choices
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The answer of a request without streaming."""
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": reply.usage(),
            "mahalo": self.choices.body(reply),
        }

    def step(self, step: Step, first: bool) -> str:
        """The event of one accepted step; its candidates are in `mahalo`."""
        delta = {"role": "assistant", "content": step.text} if first else {"content": step.text}
        return self._chunk(delta, None, {"mahalo": step.body()})

    def last(self, reply: Reply) -> str:
        """The event that says why the answer ended."""
        delta = {"content": reply.tail} if reply.tail else {}
        return self._chunk(delta, reply.finish_reason, {"mahalo": self.choices.body(reply)})

    def usage(self, reply: Reply) -> str:
        """The event with the token counts (`stream_options.include_usage`)."""
        return event(
            {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": reply.usage()}
        )

    def _chunk(self, delta: dict[str, str], finish_reason: str | None, extra: dict[str, Any]) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**self._common, "object": "chat.completion.chunk", "choices": [choice], **extra})


def event(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


END_OF_STREAM = "data: [DONE]\n\n"
