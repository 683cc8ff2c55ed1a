"""A client for OpenAI-compatible servers: many requests at a time, a rate limit, and retries.

    with Endpoint(config) as endpoint:
        calls = (ChatCall(messages=[{"role": "user", "content": question}]) for question in questions)
        for number, answer in endpoint.chat(calls):
            ...  # EndpointReply or Failure, in the order they finish; `number` is the call's position

A call that fails for good is returned as a `Failure`: one bad reply never ends a job. The client library
takes a second to import: functions import it, so that only processes that call a server wait for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

from mahalo_ray.config import EndpointConfig


@dataclass(frozen=True, kw_only=True)
class _Call(ABC):
    """Fields of both APIs. `extra` is added to the request's body as it is: a server's own options. `model`:
    another one of the server than the endpoint's."""

    max_tokens: int = 512
    temperature: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The request's JSON body, without the endpoint's model."""

    def _common(self) -> dict[str, Any]:
        given: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        given["n"] = self.n
        if self.model is not None:
            given["model"] = self.model
        if self.seed is not None:
            given["seed"] = self.seed
        if self.stop is not None:
            given["stop"] = list(self.stop)
        return {**given, "extra_body": dict(self.extra)}


@dataclass(frozen=True)
class ChatCall(_Call):
    """For /chat/completions: messages as {"role": ..., "content": ...}."""

    messages: Sequence[Mapping[str, str]]

    def body(self) -> dict[str, Any]:
        return {"messages": [dict(message) for message in self.messages], **self._common()}


@dataclass(frozen=True)
class CompletionCall(_Call):
    """For /completions: a prompt as text or token ids. `logprobs`: how many per token, None for none."""

    prompt: str | Sequence[int]
    logprobs: int | None = field(default=None, kw_only=True)

    def body(self) -> dict[str, Any]:
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        asked = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {"prompt": prompt, **asked, **self._common()}


@dataclass(frozen=True)
class EndpointReply:
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


TextOf = Callable[[Any], str | None]  # of a choice


class Garbage(Exception):
    """A reply with status 200 that is not what the API promises."""


# The client lets the errors of a body that is not JSON through as they are.
NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)


def chat_text(choice: Any) -> str | None:
    """Of a choice of /chat/completions."""
    return choice.message.content or ""  # None: the model said nothing (refused, filtered)


def completion_text(choice: Any) -> str | None:
    """Of a choice of /completions."""
    return choice.text


def reply_of(answer: Any, text_of: TextOf) -> EndpointReply:
    """A server's answer; Garbage where it is none: a page of HTML comes as a string, for example."""
    try:
        texts = [text_of(choice) for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
        choices = [choice.model_dump() for choice in answer.choices]
        usage = answer.usage
        tokens = (0, 0) if usage is None else (int(usage.prompt_tokens), int(usage.completion_tokens or 0))
    except (AttributeError, TypeError, ValueError) as error:
        raise Garbage(f"not a completion: {answer!r}") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Garbage(f"a completion without text: {answer!r}")
    return EndpointReply([str(text) for text in texts], reasons, *tokens, choices)


def kind_of(error: Exception) -> tuple[str, bool]:
    """What went wrong, and whether another try may mend it."""
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return "timeout", True
    if isinstance(error, openai.APIStatusError):
        return f"http_{error.status_code}", error.status_code in (408, 429) or error.status_code >= 500
    if isinstance(error, openai.APIConnectionError):
        return "connection", True
    return "garbage", True


def retry_after(error: Exception) -> float | None:
    """Seconds the server asked to wait, given as a number or as a date (RFC 9110, 10.2.3)."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        return None
    header = error.response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    return None


_BACKOFF_S = 0.5  # before the first retry; doubled at each further one, with jitter
_MAX_BACKOFF_S = 30.0
_MESSAGE_CHARACTERS = 500

Answer = tuple[int, EndpointReply | Failure]
Create = Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]


class Endpoint:
    """One server. Requests run on a thread of its own, so that none times out while the caller computes.

    Raises ValueError if the environment variable of the key is not set.
    """

    def __init__(self, config: EndpointConfig) -> None:
        import openai

        self.config = config
        self.usage = Usage(cost=None if config.input_price is None else 0.0)
        self._key = _key(config)
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=self._key, timeout=config.timeout_s, max_retries=0
        )
        self._not_before = 0.0  # on time.monotonic's clock: when the next request may go out
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    def chat(self, requests: Iterable[ChatCall]) -> Iterator[Answer]:
        """Answers of /chat/completions as they finish. Requests are taken one by one, never more than
        `concurrency` ahead; leaving the iterator cancels what is under way."""
        return self._run(requests, lambda body: self._client.chat.completions.create(**body), chat_text)

    def complete(self, requests: Iterable[CompletionCall]) -> Iterator[Answer]:
        """The same for /completions."""
        return self._run(requests, self._create_completion, completion_text)

    def send_completion(self, call: CompletionCall) -> Future[EndpointReply | Failure]:
        """One call of /completions now: it counts for the rate limit, and whoever sends bounds how many are
        open. Cancelling the future leaves it."""
        return self._start(call, self._create_completion, completion_text)

    async def _create_completion(self, body: dict[str, Any]) -> Any:
        return await self._client.completions.create(**body)

    def _start(self, call: _Call, create: Create, text_of: TextOf) -> Future[EndpointReply | Failure]:
        body = {"model": self.config.model, **call.body()}
        return asyncio.run_coroutine_threadsafe(self._send(body, create, text_of), self._loop)

    def close(self) -> None:
        """End the thread. The endpoint cannot be used any more."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, requests: Iterable[ChatCall] | Iterable[CompletionCall], create: Create, text_of: TextOf
    ) -> Iterator[Answer]:
        numbered = enumerate(requests)
        finished: queue.SimpleQueue[tuple[int, Future[EndpointReply | Failure]]] = queue.SimpleQueue()
        running: dict[int, Future[EndpointReply | Failure]] = {}
        try:
            while True:
                while len(running) < self.config.concurrency:
                    number, request = next(numbered, (0, None))
                    if request is None:
                        break
                    sent = self._start(request, create, text_of)
                    running[number] = sent
                    sent.add_done_callback(lambda done, number=number: finished.put((number, done)))  # type: ignore[misc]
                if not running:
                    return
                number, done = finished.get()
                del running[number]
                yield number, done.result()
        finally:
            for future in running.values():
                future.cancel()

    async def _send(self, body: dict[str, Any], create: Create, text_of: TextOf) -> EndpointReply | Failure:
        """Send until there is a reply, an error that another try cannot mend, or no try left."""
        from openai import OpenAIError

        attempt = 0
        while True:
            attempt += 1
            await self._turn()
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    reply = reply_of(await create(body), text_of)
            except (TimeoutError, OpenAIError, Garbage, *NOT_JSON) as error:
                kind, retry = kind_of(error)
                if not retry or attempt > self.config.max_retries:
                    self.usage.requests += 1
                    self.usage.failures[kind] += 1
                    return Failure(kind, self._shown(error), attempt)
                self.usage.retries[kind] += 1
                await self._wait(error, attempt)
                continue
            self._count(reply)
            return reply

    async def _turn(self) -> None:
        """Wait until the rate limit, or a server that asked for a pause, lets the next request out."""
        while (now := time.monotonic()) < self._not_before:
            await asyncio.sleep(self._not_before - now)
        if self.config.requests_per_minute is not None:
            self._not_before = now + 60.0 / self.config.requests_per_minute

    async def _wait(self, error: Exception, attempt: int) -> None:
        asked = retry_after(error)
        if asked is not None:  # the whole server is busy: everybody waits
            self._not_before = max(self._not_before, time.monotonic() + asked)
            return
        backoff = min(_MAX_BACKOFF_S, _BACKOFF_S * 2 ** (attempt - 1))
        await asyncio.sleep(backoff * random.uniform(0.5, 1.0))

    def _count(self, reply: EndpointReply) -> None:
        usage = self.usage
        usage.requests += 1
        usage.prompt_tokens += reply.prompt_tokens
        usage.completion_tokens += reply.completion_tokens
        if self.config.input_price is not None and self.config.output_price is not None:
            spent = reply.prompt_tokens * self.config.input_price
            spent += reply.completion_tokens * self.config.output_price
            usage.cost = (usage.cost or 0.0) + spent / 1e6

    def _shown(self, error: Exception) -> str:
        """The error's text; servers like to repeat the key they were given."""
        text = str(error) or type(error).__name__
        if self.config.api_key_env is not None:
            text = text.replace(self._key, f"${self.config.api_key_env}")
        return text[:_MESSAGE_CHARACTERS]


def _key(config: EndpointConfig) -> str:
    if config.api_key_env is None:
        return "none"
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ValueError(
            f"the environment variable '{config.api_key_env}' is not set: it holds the key for "
            f"{config.base_url} ('api_key_env')"
        )
    return key
