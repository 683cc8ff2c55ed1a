"""What Ray Serve's HTTP proxy answers by itself, in OpenAI's form.

The proxy refuses requests beyond its queue, has no replica while one is replaced, and loses answers whose
replica dies; it says so in plain text, which OpenAI's clients cannot read. A request whose replica dies
before it has sent anything is given to another one. While all replicas are full, requests are refused
here, and each is told a time of its own to come back. Requests reach replicas on the proxy's machine over
their sockets (`upstream.py`). Ray loads `middlewares` into the proxy where
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it: in the environment of `ray start`, or of the process that
starts a private Ray. The proxy imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from pathlib import Path

import ray
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mahalo_ray.serving.local_socket import socket_folder
from mahalo_ray.serving.schema import FULL_REPLICA_HEADER, ApiError, FullReplica
from mahalo_ray.serving.upstream import LocalApplications

_RETRY_AFTER_S = 5
MAX_ATTEMPTS = 3  # of one request, of which all replicas but the last were lost
_PAUSE_S = 0.5
_MOST_KEPT = 1_000_000  # bytes of a body; a longer one is not repeated
_REFUSED_S = (0.02, 0.2)  # how long a replica counts as full, at least and at most
_LATEST_S = 20.0  # that a refused client is asked to wait


def middlewares() -> list[Middleware]:
    """What Ray asks for, in the proxy's process."""
    return [Middleware(OpenAIErrors, folder=socket_folder(ray.get_runtime_context().get_node_id()))]


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

    def expect(self, pace_s: float, wait_s: float) -> None:
        """What the proxy itself has seen: seconds between answers, and until what waits is answered."""
        self._pace_s, self._wait_s = pace_s, wait_s

    def next_return(self) -> float:
        """Seconds after which the next refused client is to come back."""
        now = time.monotonic()
        self._next = min(max(self._next + self._pace_s, now + self._wait_s), now + _LATEST_S)
        return self._next - now


class OpenAIErrors:
    """Replaces the proxy's own error answers, asks another replica where one is lost that has sent nothing,
    ends a stream that breaks off by an error event, and refuses requests while all replicas are full.
    `folder`: where replicas on this machine have their sockets; None: all requests go Ray's way."""

    def __init__(self, app: ASGIApp, folder: Path | None = None) -> None:
        self._app = app
        self._local = None if folder is None else LocalApplications(app, folder)
        self._full: dict[str, FullReplicas] = defaultdict(FullReplicas)  # by application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own addresses
            await self._app(scope, receive, send)
            return
        local = None if self._local is None else await self._local.find(scope["path"])
        full = self._full["" if local is None else local.name]
        body = _IncomingBody(receive)
        is_post = scope["method"] == "POST"
        if is_post:
            await body.begin()
            # A page elsewhere could not read a refusal without the headers that a replica gives it.
            is_from_page = any(name == b"origin" for name, _ in scope["headers"])
            if local is not None and local.is_full and not is_from_page:
                full.expect(local.pace_s, local.wait_s)
                await _OutgoingAnswer(send, full).send_error(_busy(full.next_return()))
                return
            if full.all_are_full and not is_from_page:
                await _OutgoingAnswer(send, full).send_error(_busy(full.next_return()))
                return
        attempts = 0
        while True:
            answer = _OutgoingAnswer(send, full)
            replica = None if local is None else local.choose()
            try:
                if replica is None:
                    await self._app(dict(scope), body.receive, answer.send)
                else:
                    await replica.answer(scope, body, answer.send, takes_place=is_post)
            finally:
                await answer.end_broken_stream()
            if answer.has_begun or body.sender_is_gone:
                return
            may_repeat = body.rewind()
            if replica is not None and replica.is_lost and may_repeat:
                continue  # nobody listened: it has not been tried
            attempts += 1
            if attempts == MAX_ATTEMPTS or not may_repeat:
                await answer.send_error(_lost_replica())
                return
            await asyncio.sleep(_PAUSE_S)


class _IncomingBody:
    """A request's body, which can be read again from its beginning unless it is large.
    `sender_is_gone`: the client has left, or has its answer; `is_whole`: all of it has been read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._first: asyncio.Future[Message] | None = None
        self._kept: list[Message] = []
        self._left: list[Message] = []
        self._size = 0
        self.sender_is_gone = self.is_whole = False

    async def begin(self) -> None:
        """Read what has come with the head already, which is all of a usual request."""
        self._first = asyncio.ensure_future(self._receive())
        await asyncio.sleep(0)
        if self._first.done():
            self._left.append(self._note(self._first.result()))
            self._first = None

    @property
    def at_hand(self) -> bytes | None:
        """The whole body where it has been read and kept."""
        if not self.is_whole or self._size > _MOST_KEPT:
            return None
        return b"".join(message.get("body", b"") for message in self._kept)

    async def receive(self) -> Message:
        """The next message of the client, or of those that came before `rewind`."""
        if self._left:
            return self._left.pop(0)
        first, self._first = self._first, None
        return self._note(await self._receive() if first is None else await first)

    def _note(self, message: Message) -> Message:
        self.sender_is_gone = message["type"] == "http.disconnect"
        if message["type"] == "http.request":
            self.is_whole = not message.get("more_body", False)
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
