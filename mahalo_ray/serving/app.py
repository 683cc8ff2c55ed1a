"""The HTTP side of a ChatService, as a FastAPI app: routes, bodies, errors, streams, the OpenAPI document and
the playground page.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mahalo_ray.config import ServeConfig
from mahalo_ray.serving.front import Front, PortfolioReport
from mahalo_ray.serving.model_thread import Job
from mahalo_ray.serving.prometheus import CONTENT_TYPE, CountRequests, ReplicaMetrics, exposition
from mahalo_ray.serving.responses import (
    END_OF_STREAM,
    AnswerWriter,
    ChatCompletion,
    ChatCompletionChunk,
    ErrorBody,
    ReplicaStatus,
    ScoreList,
    ServedModel,
    ServedModels,
    TextCompletion,
    event,
)
from mahalo_ray.serving.schema import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    Payload,
    SamplingFields,
    ScoreRequest,
    StreamOptions,
    StudentRequest,
    internal_error,
    parse,
)
from mahalo_ray.serving.service import ChatService, ReplicaServices
from mahalo_ray.serving.simulated import StudentReply

logger = logging.getLogger(__name__)

RequestBody = TypeVar("RequestBody", bound=Payload)

_PARSED_IN_PLACE = 32_768  # bytes; larger bodies are parsed beside the event loop
_SCHEMAS = "#/components/schemas/"

_ERRORS = {
    400: "something is wrong with the request: `param` names the field",
    401: "the API key is missing or wrong",
    404: "there is no such model or address",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the key has sent too many requests; `Retry-After` says when to try again",
    500: "a defect of the server: `message` holds the reference of its log's entry",
    503: "the server is busy, shutting down or being replaced; `Retry-After` says when to try again",
    504: "the answer took longer than the server's limit",
}

# The playground is made of its own files alone: no other host, no script or style inside the page.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def create_app(
    *services: ChatService, listening: Callable[[ASGIApp], AbstractAsyncContextManager[None]] | None = None
) -> FastAPI:
    """The ASGI app of one or several models, the first of which has the settings of the whole endpoint;
    closing it stops their workers. `app.state.services` has them. `listening`: what takes requests for it
    beside the server that it is made for, until the app is closed."""
    served = ReplicaServices(services)
    service = served.first

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with nullcontext() if listening is None else listening(app):
            yield
        served.close()

    app = FastAPI(title="mahalo_ray", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.services = served
    app.add_middleware(HeadAsGet)
    if service.settings.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    _add_api(app, served)
    _add_pages(app, served)
    _document_bodies(app, with_key=service.settings.key is not None)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(CountRequests, metrics=service.metrics, paths=paths)
    return app


class HeadAsGet:
    """HEAD is GET without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


class PageFiles(StaticFiles):
    """The playground's scripts and styles; a browser asks whether they are still the same."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(
            {name: _PAGE_HEADERS[name] for name in ("Cache-Control", "X-Content-Type-Options")}
        )
        return response


def _answers(body: type[BaseModel], *errors: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its own answer, and those errors in OpenAI's form."""
    described: dict[int | str, dict[str, Any]] = {200: {"model": body, "description": "the answer"}}
    for status in errors:
        described[status] = {"model": ErrorBody, "description": _ERRORS[status]}
    return described


def _streams(chunk: type[BaseModel]) -> dict[str, Any]:
    """The part of a route's 200 about an answer in parts: what every server-sent event holds."""
    parts = [{"$ref": _SCHEMAS + part.__name__} for part in (chunk, ErrorBody)]
    part = {"contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}
    data = {"type": "string", "if": {"const": "[DONE]"}, "else": part}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {"text/event-stream": {"schema": event}}


def _takes(body: type[Payload]) -> dict[str, Any]:
    """The part of a route's OpenAPI entry about a body that the app reads itself."""
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + body.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


def _add_api(app: FastAPI, served: ReplicaServices) -> None:
    service = served.first
    config = service.settings.config
    bodies = BodyReader(config)
    failures = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)

    async def read(request: Request, model: type[RequestBody]) -> RequestBody:
        service.rate.take(authorise(request))
        served.check_room()  # an answer that cannot be given is refused before its body is read
        body = await bodies.read(request)
        with served.reserve():
            if len(body) <= _PARSED_IN_PLACE:
                return parse(model, body, service.limits)
            return await asyncio.to_thread(parse, model, body, service.limits)

    def authorise(request: Request) -> int:
        """The number of the client's key, 0 where none is asked for; ApiError 401."""
        keys = service.settings.key
        return 0 if keys is None else keys.check(request.headers.get("authorization"))

    chat_answers = _answers(ChatCompletion, *failures)
    chat_answers[200]["content"] = _streams(ChatCompletionChunk)

    @app.post("/v1/chat/completions", responses=chat_answers, openapi_extra=_takes(ChatCompletionRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events of `ChatCompletionChunk`."""
        body = await read(request, ChatCompletionRequest)
        asked = served.of(body.model)
        job, writer = asked.chat(body)
        return await _answer(job, writer, body, asked.metrics)

    text_answers = _answers(TextCompletion, *failures)
    text_answers[200]["content"] = _streams(TextCompletion)

    @app.post("/v1/completions", responses=text_answers, openapi_extra=_takes(CompletionRequest))
    async def complete(request: Request) -> Response:
        """Go on with a text or token ids as they are; with `stream`, as events of `TextCompletion`."""
        body = await read(request, CompletionRequest)
        asked = served.of(body.model)
        job, writer = asked.complete(body)
        return await _answer(job, writer, body, asked.metrics)

    @app.post("/v1/score", responses=_answers(ScoreList, *failures), openapi_extra=_takes(ScoreRequest))
    async def score(request: Request) -> Response:
        """The reward model's scores of candidate turns."""
        body = await read(request, ScoreRequest)
        asked = served.of(body.model)
        job = asked.score(body)
        return _json(ScoreList(model=asked.settings.model_name, data=await job.result()))

    @app.post(
        "/v1/student", responses=_answers(StudentReply, *failures), openapi_extra=_takes(StudentRequest)
    )
    async def student(request: Request) -> Response:
        """What the run's simulated student answers, in a conversation that it began."""
        body = await read(request, StudentRequest)
        return _json(served.of(body.model).student(body))

    @app.get("/v1/models", responses=_answers(ServedModels, 401, 500))
    async def models(request: Request) -> Response:
        """The models with their objectives, limits and defaults, and ids that carry a portfolio's weights."""
        authorise(request)
        return _json(ServedModels(data=[model for each in served.each for model in each.models()]))

    @app.get("/v1/models/{name:path}", responses=_answers(ServedModel, 401, 404, 500))
    async def model(request: Request, name: str) -> Response:
        """One model."""
        authorise(request)
        return _json(served.of(name).model(name))

    @app.get("/v1/front", responses=_answers(Front, 401, 404, 500))
    async def front(request: Request) -> Response:
        """What the run's sweep and evaluation measured: points over the objectives."""
        authorise(request)
        return _json(service.front())

    @app.get("/v1/portfolio", responses=_answers(PortfolioReport, 400, 401, 404, 500))
    async def portfolio(request: Request, weights: str | None = None) -> Response:
        """A few weight vectors that are nearly the best everywhere, and the member for `weights`
        (`accuracy=0.7,engagement=0.3`) with its certified loss."""
        authorise(request)
        return _json(await asyncio.to_thread(service.portfolio, weights))


def _add_pages(app: FastAPI, served: ReplicaServices) -> None:
    files = Path(__file__).parent / "playground"

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> FileResponse:
        """The playground."""
        return FileResponse(files / "index.html", headers=_PAGE_HEADERS)

    app.mount("/playground", PageFiles(directory=files))

    @app.get("/health", responses=_answers(ReplicaStatus, 500))
    async def health() -> Response:
        """Whether the replica works at all."""
        if (trouble := served.trouble) is not None:
            raise ApiError(500, trouble, code="unhealthy")
        return _json(ReplicaStatus(status="ok"))

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "the figures"}})
    async def metrics() -> Response:
        """This replica's figures, as Prometheus reads them."""
        return Response(
            exposition([each.metrics for each in served.each]), headers={"Content-Type": CONTENT_TYPE}
        )

    @app.get("/ready", responses=_answers(ReplicaStatus, 500, 503))
    async def ready() -> Response:
        """Whether a request sent now would be taken."""
        served.check_room()
        return _json(ReplicaStatus(status="ready"))


def _document_bodies(app: FastAPI, with_key: bool) -> None:
    """Complete FastAPI's OpenAPI document by what it cannot see: the bodies, the chunks and the key."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = generate()
        taken = (ChatCompletionRequest, CompletionRequest, ScoreRequest, StudentRequest)
        bodies = [(model, "validation") for model in taken]
        _, schemas = models_json_schema(
            [*bodies, (ChatCompletionChunk, "serialization")],  # type: ignore[list-item]
            ref_template=_SCHEMAS + "{model}",
        )
        components = document.setdefault("components", {})
        components["schemas"] = {**schemas["$defs"], **components.get("schemas", {})}
        for route in document["paths"].values():
            for operation in route.values():
                operation["responses"].pop("422", None)  # errors of FastAPI's own that nothing here raises
        if with_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, route in document["paths"].items():
                if path.startswith("/v1/"):
                    for operation in route.values():
                        operation["security"] = [{"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


async def _answer(job: Job, writer: AnswerWriter, body: SamplingFields, metrics: ReplicaMetrics) -> Response:
    if body.stream:
        return await _stream(job, writer, body.stream_options or StreamOptions(), metrics)
    answers = await job.result()
    metrics.observe_answers(job, answers)
    return _json(writer.whole(answers))


async def _stream(
    job: Job, writer: AnswerWriter, options: StreamOptions, metrics: ReplicaMetrics
) -> Response:
    events = job.events()
    # What goes wrong before the models have taken the request still has a status of its own.
    happened = await anext(events)
    with_usage = options.continuous_usage_stats

    def written(kind: str, value: Any) -> Iterator[str]:
        if kind == "begun":
            yield from writer.stream_opening(value, with_usage)
        elif kind == "step":
            yield writer.stream_part(value, with_usage)
        else:
            metrics.observe_answers(job, value)
            yield from writer.stream_ends(value, with_usage)
            if options.include_usage:
                yield writer.stream_usage(value)
            yield END_OF_STREAM

    async def chunks() -> AsyncIterator[str]:
        try:
            # Events that are there together are sent together: none waits for another.
            yield "".join(text for one in happened for text in written(*one))
            async for more in events:
                yield "".join(text for one in more for text in written(*one))
        except ApiError as error:
            # The status line is long gone; OpenAI's clients raise on such an event.
            yield event(ErrorBody.model_validate(error.body()).model_dump_json())
        finally:
            await events.aclose()

    return StreamingResponse(chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class BodyReader:
    """Reads the bodies of requests, each within the server's time limit, and holds no place that an answer
    needs. When more arrive than `ServeConfig.max_bodies`, the one that has taken longest is refused, so that
    clients that send slowly, or not at all, keep nobody else out."""

    def __init__(self, config: ServeConfig) -> None:
        self._limit_s, self._max_bytes = config.body_timeout_s, config.max_request_bytes
        self._most = config.max_bodies
        self._reading: deque[asyncio.Timeout] = deque()

    async def read(self, request: Request) -> bytes:
        """The body's bytes; ApiError 408, 413 or 415, or 503 for one that has to go."""
        try:
            async with asyncio.timeout(self._limit_s) as limit:
                self._reading.append(limit)
                if len(self._reading) > self._most:
                    self._reading.popleft().reschedule(0)
                return await _read_body(request, self._max_bytes)
        except TimeoutError:
            if limit not in self._reading:
                message = "the server is busy: too many bodies arrive at once; try again later"
                raise ApiError(503, message, code="overloaded", retry_after_s=1) from None
            message = f"the body did not arrive within this server's limit of {self._limit_s:g} s"
            raise ApiError(408, message, code="timeout") from None
        finally:
            if limit in self._reading:
                self._reading.remove(limit)


async def _read_body(request: Request, limit: int) -> bytes:
    """The request's bytes, never more than `limit` of them in memory; ApiError 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON with 'Content-Type: application/json'", code="unsupported_media_type")
    too_large = ApiError(
        413, f"the request is larger than this server's limit of {limit} bytes", code="too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 15 or int(declared) > limit):
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        allowed = (error.headers or {}).get("Allow", "GET")
        head = ", HEAD" if "GET" in allowed else ""
        return Response(status_code=204, headers={"Allow": f"{allowed}{head}, OPTIONS"})
    known = {404: "there is nothing at this address", 405: f"{request.method} is not for this address"}
    message = known.get(error.status_code, str(error.detail))
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    reference = secrets.token_hex(4)
    logger.error("error %s: %s %s failed", reference, request.method, request.url.path, exc_info=error)
    return JSONResponse(internal_error(reference).body(), 500)
