"""What Ray Serve's HTTP proxy answers by itself, in OpenAI's form.

The proxy refuses requests beyond its queue, has no replica while one is replaced, and loses answers whose
replica dies; it says so in plain text, which OpenAI's clients cannot read. A request whose replica dies
before it has sent anything is given to another one. Ray loads `middlewares` into the proxy where `PROXY_ENV`
is in its environment: in that of `ray start`, or of the process that starts a private Ray. The proxy imports
this module, so it imports nothing heavy.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mahalo_ray.serving.schema import ApiError

PROXY_ENV = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mahalo_ray.serving.proxy:middlewares"}
_RETRY_AFTER_S = 5
MAX_ATTEMPTS = 3  # of one request, of which all replicas but the last were lost
_PAUSE_S = 0.5
_MOST_KEPT = 1_000_000  # bytes of a body; a longer one is not repeated


def middlewares() -> list[Middleware]:
    """What Ray asks for."""
    return [Middleware(OpenAIErrors)]


class OpenAIErrors:
    """Replaces the proxy's own error answers, asks another replica where one is lost that has sent nothing,
    and ends a stream that breaks off by an error event."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own addresses
            await self._app(scope, receive, send)
            return
        body = _IncomingBody(receive)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = _OutgoingAnswer(send)
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

    def __init__(self, send: Send) -> None:
        self._send = send
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
        if self._replaced:
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
        await self._send(message)

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


def _lost_replica() -> ApiError:
    message = "the replica that was answering is gone"
    return ApiError(503, message, code="replica_lost", retry_after_s=_RETRY_AFTER_S)


def _error_for(status: int, headers: Headers) -> ApiError:
    given = headers.get("retry-after", "")
    retry_after_s = float(given) if given.isdigit() else _RETRY_AFTER_S
    if status == 404:  # of the proxy: an endpoint has all addresses, so there is none
        message, code = "the endpoint is not up: it starts or stops", "not_ready"
    elif status == 503:
        message, code = "the server is busy; try again later", "overloaded"
    else:
        return ApiError(status, f"the proxy answers with status {status}", code="proxy_error")
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)
