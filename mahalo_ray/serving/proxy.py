"""What Ray Serve's HTTP proxy answers by itself, in OpenAI's form.

The proxy refuses requests beyond its queue, has no replica while one is replaced, and loses answers whose
replica dies; it says so in plain text, which OpenAI's clients cannot read. A request whose replica dies
before it has sent anything is given to another one. While all replicas are full, requests are refused
here, and each is told a time of its own to come back. Ray loads `middlewares` into the proxy where
`PROXY_ENV` is in its environment: in that of `ray start`, or of the process that starts a private Ray. The
proxy imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mahalo_ray.serving.schema import FULL_REPLICA_HEADER, ApiError, FullReplica

PROXY_ENV = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mahalo_ray.serving.proxy:middlewares"}
_RETRY_AFTER_S = 5
MAX_ATTEMPTS = 3  # of one request, of which all replicas but the last were lost
_PAUSE_S = 0.5
_MOST_KEPT = 1_000_000  # bytes of a body; a longer one is not repeated
_REFUSED_S = (0.02, 0.2)  # how long a replica counts as full, at least and at most
_LATEST_S = 20.0  # that a refused client is asked to wait


def middlewares() -> list[Middleware]:
    """What Ray asks for."""
    return [Middleware(OpenAIErrors)]


class FullReplicas:
    """Which replicas have said just now that they are full, and when the clients they refuse are to come
    back.

    A replica counts as full for about the time in which a place becomes free there, so at least one request
    in that time asks it again. Refused clients are given times that lie as far apart as places become free:
    told one and the same time, they would all come at once and be refused again.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._num_replicas, self._pace_s, self._wait_s, self._next = 1, 1.0, 1.0, 0.0

    def note(self, full: FullReplica, retry_after_s: float) -> None:
        """A replica has refused a request, and named the seconds after which it expects to have room."""
        now, (least, most) = time.monotonic(), _REFUSED_S
        self._until = {name: until for name, until in self._until.items() if until > now}
        self._until[full.name] = now + min(most, max(least, full.pace_s))
        self._num_replicas, self._wait_s = full.num_replicas, retry_after_s
        self._pace_s = full.pace_s / full.num_replicas

    @property
    def all_are_full(self) -> bool:
        """Whether no replica would take a request now, as far as they have said."""
        now = time.monotonic()
        return sum(until > now for until in self._until.values()) >= self._num_replicas

    def next_return(self) -> float:
        """Seconds after which the next refused client is to come back."""
        now = time.monotonic()
        self._next = min(max(self._next + self._pace_s, now + self._wait_s), now + _LATEST_S)
        return self._next - now


class OpenAIErrors:
    """Replaces the proxy's own error answers, asks another replica where one is lost that has sent nothing,
    ends a stream that breaks off by an error event, and refuses requests while all replicas are full."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._full = FullReplicas()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own addresses
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST" and self._full.all_are_full:
            await _OutgoingAnswer(send, self._full).send_error(_busy(self._full.next_return()))
            return
        body = _IncomingBody(receive)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = _OutgoingAnswer(send, self._full)
            try:
                await self._app(dict(scope), body.receive, answer.send)
            finally:
                await answer.end_broken_stream()
            if answer.has_begun or body.sender_is_gone:
                return
            if attempt == MAX_ATTEMPTS or not body.rewind():
                await answer.send_error(_lost_replica())
                return
            await asyncio.sleep(_PAUSE_S)


class _IncomingBody:
    """A request's body, which can be read again from its beginning unless it is large.
    `sender_is_gone`: the client has left, or has its answer."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._left: list[Message] = []
        self._size = 0
        self.sender_is_gone = False

    async def receive(self) -> Message:
        """The next message of the client, or of those that came before `rewind`."""
        if self._left:
            return self._left.pop(0)
        message = await self._receive()
        self.sender_is_gone = message["type"] == "http.disconnect"
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size <= _MOST_KEPT:
                self._kept.append(message)
        return message

    def rewind(self) -> bool:
        """Begin again; False for a body that was too large to be kept."""
        self._left = list(self._kept)
        return self._size <= _MOST_KEPT


class _OutgoingAnswer:
    """One answer on its way out. `has_begun`: some of it was sent. It has not where its replica was lost
    before it said anything: there the proxy sends nothing, or a bare status 500."""

    def __init__(self, send: Send, full: FullReplicas) -> None:
        self._send, self._full = send, full
        self._replaced = self._streams = self._ended = self.has_begun = False

    async def send(self, message: Message) -> None:
        """Pass a message on, or what replaces it."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message.get("headers", []))
            kind = headers.get("content-type", "")
            self._streams = kind.startswith("text/event-stream")
            if message["status"] >= 400 and not kind.startswith("application/json"):
                self._replaced = self._ended = True
                if message["status"] != 500:
                    await self.send_error(_error_for(message["status"], headers))
                return
            self.has_begun = True
            if (told := headers.get(FULL_REPLICA_HEADER)) is not None:
                message = self._without_note(message, told, headers)
        if self._replaced:
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
        await self._send(message)

    def _without_note(self, message: Message, told: str, headers: Headers) -> Message:
        """The beginning of a full replica's refusal as the client gets it."""
        self._full.note(FullReplica.parse(told), float(headers["retry-after"]))
        changed = MutableHeaders(raw=list(message["headers"]))
        del changed[FULL_REPLICA_HEADER]
        changed.update(_busy(self._full.next_return()).headers())
        return {**message, "headers": changed.raw}

    async def end_broken_stream(self) -> None:
        """If a stream stopped in the middle, say so in a last event."""
        if self._streams and not self._ended:
            body = b"data: " + _lost_replica().encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def send_error(self, error: ApiError) -> None:
        """The whole answer is this error."""
        self.has_begun = True
        body = error.encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def _busy(retry_after_s: float) -> ApiError:
    message = "the server is busy; try again later"
    return ApiError(503, message, code="overloaded", retry_after_s=retry_after_s)


def _lost_replica() -> ApiError:
    message = "the replica that was answering is gone"
    return ApiError(503, message, code="replica_lost", retry_after_s=_RETRY_AFTER_S)


def _error_for(status: int, headers: Headers) -> ApiError:
    given = headers.get("retry-after", "")
    retry_after_s = float(given) if given.isdigit() else _RETRY_AFTER_S
    if status == 404:  # of the proxy: an endpoint has all addresses, so there is none
        message, code = "the endpoint is not up: it starts or stops", "not_ready"
    elif status == 503:
        return _busy(retry_after_s)
    else:
        return ApiError(status, f"the proxy answers with status {status}", code="proxy_error")
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)
