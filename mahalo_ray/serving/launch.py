"""Starting and stopping the endpoint on Ray Serve. `ray.init` is the caller's, and so is ending Ray."""

from __future__ import annotations

import errno
import inspect
import ipaddress
import logging
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import ray
from fastapi import FastAPI
from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from ray import serve
from ray.serve.exceptions import RayServeException

from mahalo_ray.config import ServeConfig
from mahalo_ray.data import storage
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.errors import StageError
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.app import create_app
from mahalo_ray.serving.service import ChatService, Defaults, KeyDigest, ServiceSettings

logger = logging.getLogger(__name__)

APP_NAME = "mahalo"
DEFAULT_MODEL_NAME = "mahalo"
# Room in Serve's own queue beyond what the service takes, so that health checks, pages and refusals get
# through.
_HEADROOM = 64
_READY_TIMEOUT_S = 60.0
_GONE_TIMEOUT_S = 10.0
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class ServeError(ValueError):
    """The endpoint cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class ModelSource:
    """The folders (paths or fsspec URLs) a replica loads, where it puts them, and the domain whose steps it
    decodes.

    reward_url None: no guidance, strategy "none" only.
    """

    policy_url: str
    reward_url: str | None
    domain: str
    placement: DeviceConfig


class Serving:
    """A running endpoint: `url` (no trailing slash), `model` (the name clients use), `stop()`; a context
    manager.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def stop(self) -> None:
        """End the endpoint and Ray Serve with it. Ray itself stays."""
        _shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(
    config: ServeConfig,
    policy_url: str,
    reward_url: str | None,
    domain: str = "tutoring",
    defaults: Defaults | None = None,
    model_name: str = DEFAULT_MODEL_NAME,
    use_gpu: bool = False,
    dtype: str = "float32",
) -> Serving:
    """Start the endpoint and wait until it answers.

    Raises ServeError if the port is taken, Ray Serve already runs on this cluster, a folder is missing or a
    replica cannot load its models; ValueError if the API key's variable is empty.
    """
    key = KeyDigest.from_environment(config)
    for url in filter(None, (policy_url, reward_url)):
        if not storage.exists(url):
            raise ServeError(f"there is no model at '{url}': train it first, or correct the path")
    _refuse_running_serve()
    _check_resources(config, use_gpu)
    if key is None and not _is_loopback(config.host):
        logger.warning("serving on %s without an API key: whoever reaches this port can use it", config.host)
    port = free_port(config.host, config.port)
    settings = ServiceSettings(config, model_name, defaults or Defaults(), key)
    reward = None if reward_url is None else storage.absolute(reward_url)
    placement = DeviceConfig("cuda" if use_gpu else "cpu", dtype)
    source = ModelSource(storage.absolute(policy_url), reward, domain, placement)
    serving = Serving(f"http://{_reachable(config.host)}:{port}", model_name)
    started = False
    # Serve tells at length what it does; its warnings are enough.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": port},
            logging_config=_QUIET,
        )
        serve.run(
            application(settings, source, use_gpu),
            name=APP_NAME,
            route_prefix="/",
            logging_config=_QUIET,
        )
        _wait_until_healthy(serving.url)
        started = True
    except (RuntimeError, RayServeException) as error:
        raise ServeError(f"the endpoint could not be started: {error}{_deployment_messages()}") from error
    finally:
        # Also on Ctrl-C while the models load: nothing of Serve may stay behind.
        if not started:
            _shutdown()
    return serving


def _deployment_messages() -> str:
    """What Serve knows of the reason, tracebacks cut down to the exception they end with."""
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return ""
    messages = [state.message for state in application.deployments.values() if state.message]
    raised = [re.findall(r"^[\w.]+: .*(?:\n.*)*?(?=\n[\w.]+: |\Z)", text, re.MULTILINE) for text in messages]
    return "".join(f"\n{own[-1] if own else text}" for own, text in zip(raised, messages, strict=True))


class ChatIngress:
    """The replica, as far as Serve looks at it between requests; the app itself is built by `application`."""

    app: FastAPI

    def check_health(self) -> None:
        """Serve replaces a replica whose model thread has ended."""
        if not self.app.state.service.worker.alive:
            raise RuntimeError("the model's thread has ended")


def application(settings: ServiceSettings, source: ModelSource, use_gpu: bool) -> serve.Application:
    """The Serve application: every replica loads the models once and builds its app around them."""
    config = settings.config
    capacity = config.max_ongoing_requests + config.max_queued_requests + _HEADROOM

    def build_app() -> FastAPI:
        return _load_app(settings, source)

    options: dict[str, Any] = {
        "num_replicas": config.replicas,
        "max_ongoing_requests": capacity,
        "max_queued_requests": capacity,
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": 1 if use_gpu else 0},
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": 10.0,
        "max_constructor_retry_count": 1,
    }
    known = inspect.signature(serve.deployment).parameters
    # Newer Ray only: Retry-After on the refusals of Serve's own queue too, which only a flood reaches.
    if "backpressure_config" in known:
        options["backpressure_config"] = {"retry_after_s": 5}
    if "max_constructor_retry_count" not in known:
        del options["max_constructor_retry_count"]
    return serve.deployment(name=APP_NAME, **options)(serve.ingress(build_app)(ChatIngress)).bind()


def _load_app(settings: ServiceSettings, source: ModelSource) -> FastAPI:
    # Models are the replica's business: the process that starts serving needs neither torch nor a GPU for it.
    from mahalo_ray.serving.backend import GuidedBackend

    config = settings.config
    # Everything that may run at once runs at once.
    branches = config.max_ongoing_requests * config.max_candidates
    backend = GuidedBackend.load(
        source.policy_url, source.reward_url, source.domain, source.placement, branches
    )
    return create_app(ChatService(backend, settings))


def _shutdown() -> None:
    """End Serve and wait until Ray has forgotten it, so that the next start does not meet its remains."""
    serve.shutdown()
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while _serve_runs() and time.monotonic() < deadline:
        time.sleep(0.05)


def _serve_runs() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _refuse_running_serve() -> None:
    if not _serve_runs():
        return
    raise ServeError(
        "Ray Serve already runs on this Ray cluster, and its port cannot be changed: stop it with "
        "'serve shutdown', or use another cluster"
    )


def _check_resources(config: ServeConfig, use_gpu: bool) -> None:
    """Serve would wait for ever for replicas that the cluster cannot hold."""
    needed = {"CPU": config.replicas * config.cpus_per_replica, "GPU": config.replicas if use_gpu else 0}
    total = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > total.get(name, 0):
            raise ServeError(
                f"{config.replicas} replica(s) need {amount:g} {name}, the Ray cluster has "
                f"{total.get(name, 0):g}: lower serve.replicas or serve.cpus_per_replica, or use a larger one"
            )


def free_port(host: str, port: int) -> int:
    """The port itself if it can be bound on `host`, a free one for 0. ServeError if it is busy or not ours to
    take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ServeError(f"serve.host '{host}' is no address of this machine: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            # Only listening clashes with a server that shares its port.
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServeError(
                    f"port {port} on {host} is already in use: stop what uses it, or choose another port "
                    "with --set serve.port=NUMBER (0 takes a free one)"
                ) from error
            raise ServeError(f"cannot serve on {host}, port {port}: {error.strerror}") from error
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str) -> None:
    """serve.run returns when the replica is up; the proxy learns of it a moment later."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url} does not answer: {error}") from error
        time.sleep(0.1)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reachable(host: str) -> str:
    """The host part of a URL that reaches a server bound to `host`."""
    if host in ("0.0.0.0", "::"):
        host = ray.util.get_node_ip_address()
    return f"[{host}]" if ":" in host else host


def serve_forever(serving: Serving) -> None:
    """Keep serving until Ctrl-C or SIGTERM, then stop. Main thread only, as signal handlers are."""
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        serving.stop()


SEED = 7


class SmokeError(StageError):
    """The endpoint answered, but not as it should, or did not answer."""


def smoke(
    url: str,
    model: str,
    messages: Sequence[dict[str, str]],
    weightings: Sequence[Weights],
    api_key: str | None = None,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Ask once per weighting (`extra_body={"objectives": ...}`), then stream the first one once.

    Returns {"model", "answers": [{"objectives", "text", "latency_s", "completion_tokens", "candidates"}],
    "streamed": {"text", "chunks", "latency_s"}}. Raises SmokeError with the reason if anything is off; the
    same seed must give the same text streamed and whole.
    """
    # The client insists on a key; a server without one ignores it.
    client = OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", timeout=timeout_s, max_retries=0)
    try:
        names = [known.id for known in client.models.list()]
        if model not in names:
            raise SmokeError(f"{url} serves {', '.join(names)}, not '{model}'")
        answers = [_ask(client, model, messages, weights) for weights in weightings]
        streamed = _ask_streaming(client, model, messages, weightings[0])
    except OpenAIError as error:
        raise SmokeError(f"{url} did not answer as it should: {error}") from error
    finally:
        client.close()
    if streamed["text"] != answers[0]["text"]:
        raise SmokeError(
            f"with one seed the streamed answer is {streamed['text']!r}, the whole one {answers[0]['text']!r}"
        )
    return {"model": model, "answers": answers, "streamed": streamed}


def _typed(messages: Sequence[dict[str, str]]) -> list[ChatCompletionMessageParam]:
    return [cast(ChatCompletionMessageParam, message) for message in messages]


def _ask(client: OpenAI, model: str, messages: Sequence[dict[str, str]], weights: Weights) -> dict[str, Any]:
    started = time.monotonic()
    completion = client.chat.completions.create(
        model=model,
        messages=_typed(messages),
        seed=SEED,
        extra_body={"objectives": dict(weights)},
    )
    latency = time.monotonic() - started
    text = completion.choices[0].message.content
    details = (completion.model_extra or {}).get("mahalo")
    if not text or not text.strip():
        raise SmokeError(f"the answer with {weights.label()} is empty")
    if completion.usage is None or completion.usage.completion_tokens < 1:
        raise SmokeError(f"the answer with {weights.label()} has no token counts")
    if details is None or Weights(details["objectives"]) != weights:
        raise SmokeError(f"the answer does not say that it was decoded with {weights.label()}: {details}")
    for number, step in enumerate(details["steps"]):
        if not 0 <= step["chosen"] < len(step["candidates"]):
            raise SmokeError(f"step {number} chose candidate {step['chosen']} of {len(step['candidates'])}")
    return {
        "objectives": dict(weights),
        "text": text,
        "latency_s": latency,
        "completion_tokens": completion.usage.completion_tokens,
        "candidates": sum(len(step["candidates"]) for step in details["steps"]),
    }


def _ask_streaming(
    client: OpenAI, model: str, messages: Sequence[dict[str, str]], weights: Weights
) -> dict[str, Any]:
    started = time.monotonic()
    text, chunks, ended = "", 0, None
    stream = client.chat.completions.create(
        model=model,
        messages=_typed(messages),
        seed=SEED,
        stream=True,
        extra_body={"objectives": dict(weights)},
    )
    for chunk in stream:
        assert isinstance(chunk, ChatCompletionChunk)
        chunks += 1
        for choice in chunk.choices:
            text += choice.delta.content or ""
            ended = choice.finish_reason or ended
    if ended is None:
        raise SmokeError("the stream ended without a finish_reason")
    return {"text": text, "chunks": chunks, "latency_s": time.monotonic() - started}
