"""A real OpenAI-compatible HTTP server on this machine that answers from a script."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, Self

import pytest

from mahalo_ray import endpoints
from mahalo_ray.config import EndpointConfig


@dataclass(frozen=True)
class Scripted:
    """One HTTP answer. `hang`: never answer while the server lives; `after`: not before this is set."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    after: threading.Event | None = None


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]

    @property
    def content(self) -> str:
        """The last message of a chat, or the prompt of a completion."""
        return self.body["messages"][-1]["content"] if "messages" in self.body else self.body["prompt"]


def says(*texts: str, prompt_tokens: int = 10, completion_tokens: int = 5) -> Scripted:
    """A completion with these texts, readable as a chat's and as a plain one."""
    choices = [
        {"index": i, "finish_reason": "stop", "text": t, "message": {"role": "assistant", "content": t}}
        for i, t in enumerate(texts)
    ]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return Scripted(body=json.dumps({**body, "choices": choices, "usage": usage}).encode())


def fails(status: int, message: str = "no", retry_after: str | None = None) -> Scripted:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Scripted(status, json.dumps({"error": {"message": message}}).encode(), headers)


GARBAGE = Scripted(body=b"<html>bad gateway</html>")
HANGS = Scripted(hang=True)


class TimeRunsOut:
    """The time of an attempt of this process's endpoints runs out when a server has its request and will not
    answer it: not before, however slow the machine, and without waiting. `limits_s`: what each attempt had.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.limits_s: list[float] = []
        self._attempts: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Timeout]] = {}
        # In place of the module as the endpoints see it, not of everybody's.
        patch.setattr(endpoints, "asyncio", SimpleNamespace(**{**vars(asyncio), "timeout": self._timeout}))

    def _timeout(self, seconds: float) -> asyncio.Timeout:
        task = asyncio.current_task()
        assert task is not None
        body = inspect.getcoroutinelocals(task.get_coro())["body"]  # type: ignore[arg-type]
        timeout = asyncio.timeout(None)
        self.limits_s.append(seconds)
        self._attempts[_key(body)] = asyncio.get_running_loop(), timeout
        return timeout

    def run_out(self, received: Received) -> None:
        """End the attempt that sent this."""
        loop, timeout = self._attempts[_key(received.body)]
        loop.call_soon_threadsafe(lambda: timeout.reschedule(loop.time()))


def _key(body: dict[str, Any]) -> str:
    return json.dumps([body.get(name) for name in ("messages", "prompt", "seed")])


class LocalEndpoint:
    """Answers by `script`: a function of the request, or answers given one after the other (the last for
    ever). What hangs does so until the client's time is over, which `time` may hasten.

    with LocalEndpoint([fails(500), says("4")]) as server:
        Endpoint(server.config())
    """

    def __init__(
        self, script: Callable[[Received], Scripted] | Iterable[Scripted], time: TimeRunsOut | None = None
    ) -> None:
        self._time = time
        self.received: list[Received] = []
        self.most_at_once = 0
        self._script = script if callable(script) else _one_by_one(list(script))
        self._open = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.02), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def config(self, **settings: Any) -> EndpointConfig:
        return EndpointConfig(base_url=self.url, model="m", **settings)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, received: Received) -> Scripted:
        with self._lock:
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            self.received.append(received)
            answer = self._script(received)
        if answer.hang:
            if self._time is not None:
                self._time.run_out(received)
            self._end.wait()
        if answer.after is not None:
            answer.after.wait()
        with self._lock:
            self._open -= 1
        return answer

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        local = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = local._answer(Received(self.path, headers, body))
                if answer.hang:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                always = {"Content-Type": "application/json", "Content-Length": str(len(answer.body))}
                for name, value in {**always, **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None: ...

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of 5 that come at once to a slow machine, the sixth would wait for a second


def _one_by_one(answers: list[Scripted]) -> Callable[[Received], Scripted]:
    def script(_: Received) -> Scripted:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    return script
