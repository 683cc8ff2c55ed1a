"""What endpoints are asked, what they answer, and what it came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What both doors take. `extra` goes into the request's body as it is: a server's own options."""

    max_tokens: int = 512
    temperature: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        raise NotImplementedError

    def _common(self) -> dict[str, Any]:
        given: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        given["n"] = self.n
        if self.seed is not None:
            given["seed"] = self.seed
        if self.stop is not None:
            given["stop"] = list(self.stop)
        return {**given, "extra_body": dict(self.extra)}


@dataclass(frozen=True)
class ChatRequest(_Request):
    """For /chat/completions: messages as {"role": ..., "content": ...}."""

    messages: Sequence[Mapping[str, str]]

    def body(self) -> dict[str, Any]:
        return {"messages": [dict(message) for message in self.messages], **self._common()}


@dataclass(frozen=True)
class CompletionRequest(_Request):
    """For /completions: a prompt as text or token ids. `logprobs`: how many per token, None for none."""

    prompt: str | Sequence[int]
    logprobs: int | None = field(default=None, kw_only=True)

    def body(self) -> dict[str, Any]:
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        asked = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {"prompt": prompt, **asked, **self._common()}


@dataclass(frozen=True)
class Reply:
    """One text per completion asked for. `choices` holds them as the server gave them (log-probs, extras)."""

    texts: list[str]
    finish_reasons: list[str | None]
    prompt_tokens: int
    completion_tokens: int
    choices: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Failure:
    """A request given up: `kind` is timeout, connection, garbage (not what the API promises) or http_CODE;
    `attempts` counts how often it was sent."""

    kind: str
    message: str
    attempts: int


@dataclass
class Usage:
    """What an endpoint was asked so far. `requests` counts those that came to an end, retries not counted;
    `cost` is None without prices."""

    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "retries": dict(self.retries), "failures": dict(self.failures)}
