"""What Ray Serve's HTTP proxy answers by itself, in OpenAI's form.

The proxy refuses requests beyond its queue, has no replica while one is replaced, and loses answers whose
replica dies; it says so in plain text, which OpenAI's clients cannot read. Ray loads `middlewares` into the
proxy where `PROXY_ENV` is in its environment: in that of `ray start`, or of the process that starts a private
Ray. The proxy imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mahalo_ray.serving.schema import ApiError

PROXY_ENV = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mahalo_ray.serving.proxy:middlewares"}
_RETRY_AFTER_S = 5


def middlewares() -> list[Middleware]:
    """What Ray asks for."""
    return [Middleware(OpenAIErrors)]


class OpenAIErrors:
    """Replaces the proxy's own error answers, and ends a stream that breaks off by an error event."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own addresses
            await self._app(scope, receive, send)
            return
        answer = _OutgoingAnswer(send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            await answer.end_broken_stream()


class _OutgoingAnswer:
    """One answer on its way out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._replaced = self._streams = self._ended = False

    async def send(self, message: Message) -> None:
        """Pass a message on, or what replaces it."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message.get("headers", []))
            kind = headers.get("content-type", "")
            self._streams = kind.startswith("text/event-stream")
            if message["status"] >= 400 and not kind.startswith("application/json"):
                self._replaced = self._ended = True
                await self._send_error(_error_for(message["status"], headers))
                return
        if self._replaced:
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
        await self._send(message)

    async def end_broken_stream(self) -> None:
        """If a stream stopped in the middle, say so in a last event."""
        if self._streams and not self._ended:
            error = ApiError(503, "the replica that was answering is gone", code="replica_lost")
            body = b"data: " + error.encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_error(self, error: ApiError) -> None:
        body = error.encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def _error_for(status: int, headers: Headers) -> ApiError:
    given = headers.get("retry-after", "")
    retry_after_s = float(given) if given.isdigit() else _RETRY_AFTER_S
    if status == 404:  # of the proxy: an endpoint has all addresses, so there is none
        message, code = "the endpoint is not up: it starts or stops", "not_ready"
    elif status == 500:
        message, code = "the replica that was answering is gone", "replica_lost"
    elif status == 503:
        message, code = "the server is busy; try again later", "overloaded"
    else:
        return ApiError(status, f"the proxy answers with status {status}", code="proxy_error")
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)
