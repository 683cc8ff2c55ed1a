"""The HTTP side: routes, bodies, errors, streams and the playground page, as a FastAPI app around a
ChatService.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mahalo_ray.serving.responses import END_OF_STREAM, Completion, event
from mahalo_ray.serving.schema import ApiError, ChatRequest, Payload, ScoreRequest, internal_error, parse
from mahalo_ray.serving.service import ChatService
from mahalo_ray.serving.worker import Job

RequestBody = TypeVar("RequestBody", bound=Payload)


def create_app(service: ChatService) -> FastAPI:
    """The ASGI app; closing it stops the service's worker. `app.state.service` is the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.worker.close()

    app = FastAPI(title="mahalo_ray", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    _add_api(app, service)
    _add_pages(app, service)
    return app


def _add_api(app: FastAPI, service: ChatService) -> None:
    config = service.settings.config

    async def read(request: Request, model: type[RequestBody]) -> RequestBody:
        authorise(request)
        service.worker.check_room()
        return parse(model, await _body(request, config.max_request_bytes))

    def authorise(request: Request) -> None:
        if service.settings.key is not None:
            service.settings.key.check(request.headers.get("authorization"))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted = await read(request, ChatRequest)
        job, completion = service.chat(wanted)
        if not wanted.stream:
            return JSONResponse(completion.whole(await job.result()))
        with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        return await _stream(job, completion, with_usage)

    @app.post("/v1/score")
    async def score(request: Request) -> dict[str, Any]:
        wanted = await read(request, ScoreRequest)
        scores = await service.score(wanted).result()
        data = [{"object": "score", "index": i, "scores": found} for i, found in enumerate(scores)]
        return {"object": "list", "model": service.settings.model_name, "data": data}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authorise(request)
        return service.models()


def _add_pages(app: FastAPI, service: ChatService) -> None:
    page, policy = _page()

    @app.get("/")
    async def playground() -> HTMLResponse:
        return HTMLResponse(
            page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        )

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the replica works at all."""
        if not service.worker.alive:
            raise ApiError(500, "the model's thread has ended", code="unhealthy")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether a request sent now would be taken."""
        service.worker.check_room()
        return {"status": "ready"}


async def _stream(job: Job, completion: Completion, with_usage: bool) -> Response:
    events = job.events()
    # What goes wrong before the first step still has a status of its own.
    first = await anext(events)

    async def chunks() -> AsyncIterator[str]:
        kind, value = first
        is_first = True
        try:
            while kind == "step":
                yield completion.step(value, is_first)
                is_first = False
                kind, value = await anext(events)
            yield completion.last(value)
            if with_usage:
                yield completion.usage(value)
            yield END_OF_STREAM
        except ApiError as error:
            # The status line is long gone; OpenAI's clients raise on such an event.
            yield event(error.body())
        finally:
            await events.aclose()

    return StreamingResponse(chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _body(request: Request, limit: int) -> bytes:
    """The request's bytes, never more than `limit` of them in memory; ApiError 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON with 'Content-Type: application/json'", code="unsupported_media_type")
    too_large = ApiError(
        413, f"the request is larger than this server's limit of {limit} bytes", code="too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _page() -> tuple[str, str]:
    """The playground and a Content-Security-Policy that allows exactly its own script and style, by hash."""
    page = resources.files("mahalo_ray.serving").joinpath("playground.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None, f"the page has a <{tag}>"
        return base64.b64encode(hashlib.sha256(found.group(1).encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "there is nothing at this address", 405: f"{request.method} is not for this address"}
    message = known.get(error.status_code, str(error.detail))
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(internal_error().body(), 500)
