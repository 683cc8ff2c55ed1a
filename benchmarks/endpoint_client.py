"""Clients of an OpenAI-compatible endpoint over raw sockets: how `serving.py` asks, in another process."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

CHAT = "/v1/chat/completions"
# `transformers serve` gives a reason and no `[DONE]`.
_ENDED = re.compile(rb'data: \[DONE\]|"finish_reason":\s*"(stop|length)"')
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-type: application/json\r\n"
    b'content-length: 13\r\nconnection: close\r\n\r\n{"error": {}}'
)
_SOME_TEXT = re.compile(rb'"content":\s*"[^"]')


@dataclass(frozen=True)
class Outcome:
    """One request: seconds to the first text and to the end, status, whether what came was whole and, where
    it was an error, in OpenAI's form, and the seconds of its Retry-After."""

    status: int
    first_s: float
    whole_s: float
    text: str
    is_whole: bool
    retry_after_s: float | None = None


async def ask(address: tuple[str, int], prefix: str, body: bytes, since: float | None = None) -> Outcome:
    """One streamed request over a socket of its own. `since`: when it was due, if that was before now."""
    started = time.perf_counter() if since is None else since
    first = 0.0
    received = bytearray()
    try:
        reader, writer = await asyncio.open_connection(*address)
        try:
            head = (
                f"POST {prefix}{CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            while part := await reader.read(65536):
                received += part
                if not first and _SOME_TEXT.search(received):
                    first = time.perf_counter() - started
        finally:
            writer.close()
    except OSError:
        pass  # a connection that was refused or broke off: status 0, or an answer that is not whole
    whole = time.perf_counter() - started
    head_bytes, _, answer = bytes(received).partition(b"\r\n\r\n")
    status = int(head_bytes.split(b" ", 2)[1]) if head_bytes else 0
    if status == 200:
        return Outcome(200, first, whole, text_of(answer), _ENDED.search(answer) is not None)
    told = re.search(rb"\r\nretry-after: (\d+)", head_bytes.lower())
    is_error = b'"error":' in answer.replace(b'"error" :', b'"error":')
    return Outcome(status, whole, whole, "", is_error, float(told[1]) if told else None)


def text_of(answer: bytes) -> str:
    """The text of a stream's events."""
    text = ""
    for line in answer.decode(errors="replace").splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                text += choice["delta"].get("content") or ""
    return text


def address_of(url: str) -> tuple[tuple[str, int], str]:
    """Host and port, and the path before every address."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return (parts.hostname, parts.port), parts.path.rstrip("/")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest."""
    if not values:
        return {}
    found = np.percentile(values, (50, 95, 99, 100))
    return dict(zip(("p50", "p95", "p99", "max"), (round(float(value), 4) for value in found), strict=True))


def summary(outcomes: Sequence[Outcome], seconds: float, right: Sequence[str | None]) -> dict[str, Any]:
    """What a measurement came to. `right`: what each answer has to be, None where nobody knows."""
    good = [outcome for outcome in outcomes if outcome.status == 200 and outcome.is_whole]
    refused = [outcome for outcome in outcomes if outcome.status not in (0, 200)]
    pairs = list(zip(outcomes, right, strict=True))
    return {
        "requests": len(outcomes),
        "answers_per_s": len(good) / seconds,
        "statuses": {
            str(s): sum(o.status == s for o in outcomes) for s in sorted({o.status for o in outcomes})
        },
        "not_whole": sum(not outcome.is_whole for outcome in outcomes),
        "wrong": sum(o.status == 200 and known is not None and o.text != known for o, known in pairs),
        "first_text_s": percentiles([outcome.first_s for outcome in good]),
        "whole_s": percentiles([outcome.whole_s for outcome in good]),
        "refusal_s": percentiles([outcome.whole_s for outcome in refused]),
    }


# -- what runs in the client's process: a URL and bodies in, a summary or the outcomes out


def at_once(url: str, bodies: Sequence[bytes], clients: int) -> tuple[list[Outcome], float]:
    """All bodies once, so many at a time: each client asks again when it has its answer. What became of each,
    and the seconds until all were answered."""

    async def measure() -> tuple[list[Outcome], float]:
        address, prefix = address_of(url)
        outcomes: dict[int, Outcome] = {}
        numbers = itertools.count()

        async def client() -> None:
            while (number := next(numbers)) < len(bodies):
                outcomes[number] = await ask(address, prefix, bodies[number])

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return [outcomes[number] for number in range(len(bodies))], time.perf_counter() - started

    return asyncio.run(measure())


def at_rate(
    url: str, bodies: Sequence[bytes], right: Sequence[str], per_second: float, seconds: float
) -> dict[str, Any]:
    """Open loop: requests at random times, whatever becomes of those before; times count from when a request
    was due. GET /health is asked meanwhile."""

    async def measure() -> tuple[list[Outcome], list[float], float]:
        address, prefix = address_of(url)
        rng = random.Random(0)
        asked: list[asyncio.Task[Outcome]] = []
        health: list[float] = []
        over = asyncio.Event()

        async def look() -> None:
            while not over.is_set():
                began = time.perf_counter()
                reader, writer = await asyncio.open_connection(*address)
                writer.write(f"GET {prefix}/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                await reader.read()
                writer.close()
                health.append(time.perf_counter() - began)
                await asyncio.sleep(0.25)

        looking = asyncio.create_task(look())
        due = started = time.perf_counter()
        for number in itertools.count():
            due += rng.expovariate(per_second)
            if due - started > seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(ask(address, prefix, bodies[number % len(bodies)], due)))
        outcomes = await asyncio.gather(*asked)
        took = time.perf_counter() - started
        over.set()
        await looking
        return list(outcomes), health, took

    outcomes, health, took = asyncio.run(measure())
    known = [right[number % len(right)] for number in range(len(outcomes))]
    return {"per_second": per_second, **summary(outcomes, took, known), "health_s": percentiles(health)}


def with_retries(
    url: str, bodies: Sequence[bytes], right: Sequence[str], clients: int, seconds: float
) -> dict[str, Any]:
    """Clients that ask without a pause and come back as Retry-After says when they are refused."""

    async def measure() -> tuple[list[Outcome], list[int], float]:
        address, prefix = address_of(url)
        outcomes: list[Outcome] = []
        asked: list[int] = []
        numbers = itertools.count()
        started = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - started < seconds:
                number = next(numbers) % len(bodies)
                outcome = await ask(address, prefix, bodies[number])
                outcomes.append(outcome)
                asked.append(number)
                if outcome.status != 200:
                    left = seconds - (time.perf_counter() - started)
                    await asyncio.sleep(max(0.0, min(outcome.retry_after_s or 1.0, left)))

        await asyncio.gather(*(client() for _ in range(clients)))
        return outcomes, asked, time.perf_counter() - started

    outcomes, asked, took = asyncio.run(measure())
    return {"clients": clients, **summary(outcomes, took, [right[number] for number in asked])}


def in_one_instant(url: str, body: bytes, clients: int) -> dict[str, float]:
    """So many requests at the same moment, once to warm up and once measured: seconds until each was
    answered."""

    async def measure() -> list[Outcome]:
        address, prefix = address_of(url)
        return list(await asyncio.gather(*(ask(address, prefix, body) for _ in range(clients))))

    asyncio.run(measure())
    return percentiles([outcome.whole_s for outcome in asyncio.run(measure())])


# -- in a process of its own: what the clients are compared with --------------------------------------------


def refuse_everything(told: multiprocessing.Queue[int]) -> None:
    """A server that answers whatever comes with the same refusal, unread. `told` gets its port."""

    class Refusal(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            self._transport.write(_REFUSAL)
            self._transport.close()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Refusal, "127.0.0.1", 0, backlog=2048)
        told.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())
