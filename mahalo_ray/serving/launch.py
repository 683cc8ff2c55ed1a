"""Starting and stopping the endpoint on Ray Serve. `ray.init` is the caller's, and so is ending Ray."""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import os
import random
import re
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from logging.handlers import RotatingFileHandler
from types import TracebackType
from typing import TYPE_CHECKING, Self

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from mahalo_ray.config import SERVED_MODEL_ID, RewardDeploymentConfig, RewardServer, ServeConfig, ServerSource
from mahalo_ray.data import storage
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.serving.api_key import KeyDigests
from mahalo_ray.serving.app import create_app
from mahalo_ray.serving.front import RunFiles
from mahalo_ray.serving.local_socket import ReplicaSocket, listening, socket_folder
from mahalo_ray.serving.service import ChatService, Defaults, ServiceSettings
from mahalo_ray.serving.simulated import SimulatedStudents

if TYPE_CHECKING:
    from torch import Tensor

    from mahalo_ray.models import TokenTrace
    from mahalo_ray.serving.remote_scorer import ScorerCard

logger = logging.getLogger(__name__)

APP_NAME = "mahalo"
# Room in Serve's own queue beyond what the service takes, so that health checks, pages and refusals get
# through.
_HEADROOM = 64
_FREE_PORTS = range(20_000, 32_000)
_READY_TIMEOUT_S = 60.0
_GONE_TIMEOUT_S = 60.0  # until Ray has forgotten Serve: a second, on a busy machine many
_REPLY_TIMEOUT_S = 5.0  # of a replica that is told to stop, when the grace time is over
_HEALTH_CHECK_S = 2.0
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class ServeError(ValueError):
    """The endpoint cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class ModelSource:
    """The folders (paths or fsspec URLs) a replica loads, where it puts them, and the domain whose steps it
    decodes; `run`: the files of what the models' run has measured.

    `policy`: a folder, or the completion server that samples; reward_url None: no guidance, strategy "none"
    only, unless `reward_server` judges.
    """

    policy: str | ServerSource
    reward_url: str | None
    domain: str
    placement: DeviceConfig
    run: RunFiles | None = None
    reward_server: RewardServer | None = None


class Serving:
    """A running endpoint: `url` (no trailing slash), `model` (the name clients use), `stop()`; a context
    manager.
    """

    def __init__(self, url: str, model: str, handle: DeploymentHandle, grace_s: float) -> None:
        self.url, self.model = url, model
        self._handle, self._grace_s = handle, grace_s
        self._is_stopped = False

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Refuse new requests, let running ones end within the grace time (or until `hurry` is set), then end
        the endpoint and Ray Serve with it. Ray itself stays. A second call does nothing.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        try:
            self._drain(hurry or threading.Event())
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the endpoint could not be told to finish what it is at: %s", error)
        finally:
            _shutdown()

    def _drain(self, hurry: threading.Event) -> None:
        deadline = time.monotonic() + self._grace_s
        self._tell("drain", deadline, hurry)
        while sum(self._tell("count_held", deadline, hurry)) and time.monotonic() < deadline:
            if hurry.wait(0.1):
                break
        if sum(self._tell("close", deadline, hurry)):
            time.sleep(0.3)  # for the last answers on their way through the proxy

    def _tell(self, method: str, deadline: float, hurry: threading.Event) -> list[int]:
        """Call a method of every replica. One that is slow to reply has as long as the answers it works at:
        given up earlier, it would be ended with them."""
        response = self._handle.broadcast(method)
        while True:
            try:
                return list(response.results(timeout_s=_REPLY_TIMEOUT_S))
            except TimeoutError:
                if hurry.is_set() or time.monotonic() > deadline:
                    raise

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
    model_name: str = SERVED_MODEL_ID,
    placement: DeviceConfig | None = None,
    key: KeyDigests | None = None,
    descriptions: Mapping[str, str] | None = None,
    run: RunFiles | None = None,
    examples: tuple[str, ...] = (),
    students: SimulatedStudents | None = None,
) -> Serving:
    """Start the endpoint and wait until it answers. The API key is `key`, else that of `serve.api_key_env`.
    `policy_url` is not read where `serve.server` samples. `descriptions`: what objectives mean, for people;
    `run`: the files of what the models' run has measured; `examples`: questions to begin with; `students`:
    who can answer in the place of a person.

    Raises ServeError if the port is taken, Ray Serve already runs on this cluster, a folder is missing or a
    replica cannot load its models; ValueError if the API key's variable is empty.
    """
    key = key or KeyDigests.configured(config)
    further = [url for model in config.models for url in (model.policy, model.reward)]
    own = policy_url if config.server is None else None
    reward_url = reward_url if config.reward_server is None else None
    for url in filter(None, (own, reward_url, *further)):
        if not storage.exists(url):
            raise ServeError(f"there is no model at '{url}': train it first, or correct the path")
    _refuse_running_serve()
    num_rewards = len({url for url in (reward_url, *(model.reward for model in config.models)) if url})
    placement = placement or DeviceConfig()
    _check_resources(config, placement, num_rewards)
    if key is None and not _is_loopback(config.host):
        logger.warning("serving on %s without an API key: whoever reaches this port can use it", config.host)
    port = free_port(config.host, config.port)
    settings = ServiceSettings(
        config, model_name, defaults or Defaults(), key, dict(descriptions or {}), examples, students
    )
    reward = None if reward_url is None else storage.absolute(reward_url)
    policy = storage.absolute(policy_url) if config.server is None else config.server
    source = ModelSource(policy, reward, domain, placement, run, config.reward_server)
    started = False
    # Serve tells at length what it does; its warnings are enough.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": port},
            logging_config=_QUIET,
        )
        handle = serve.run(
            application(settings, source),
            name=APP_NAME,
            route_prefix=config.path_prefix or "/",
            logging_config=_QUIET,
        )
        url = f"http://{_reachable(config.host)}:{port}{config.path_prefix}"
        _wait_until_healthy(url)
        started = True
    except (RuntimeError, RayError, RayServeException) as error:
        raise ServeError(f"the endpoint could not be started: {error}{_deployment_messages()}") from error
    finally:
        # Also on Ctrl-C while the models load: nothing of Serve may stay behind.
        if not started:
            _shutdown()
    return Serving(url, model_name, handle, config.shutdown_grace_s)


def _deployment_messages() -> str:
    """What Serve knows of the reason, tracebacks cut down to the exception they end with."""
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return ""
    messages = [state.message for state in application.deployments.values() if state.message]
    return "".join(f"\n{last_errors(message)}" for message in messages)


def last_errors(text: str) -> str:
    """What Ray says of a failure, tracebacks cut down to the exception that they end with; of ours, which
    explain themselves, the message alone."""
    errors = re.findall(r"^[\w.]+: .*(?:\n.*)*?(?=\n[\w.]+: |\Z)", text, re.MULTILINE)
    return re.sub(r"\Amahalo_ray\.[\w.]+: ", "", (errors[-1] if errors else text).strip())


class ChatIngress:
    """The replica, as far as Serve and `Serving` look at it between requests; the app itself is built by
    `application`."""

    app: FastAPI

    def __init__(self, *rewards: DeploymentHandle) -> None:
        """`rewards`: handles of the reward models' deployments, so that Serve deploys them with this one."""

    def check_health(self) -> None:
        """Serve replaces a replica that has ended. One that only said that it is not well would be asked
        twice more, and meanwhile get the most requests, since it refuses them so fast."""
        trouble = self.app.state.services.trouble
        if trouble is not None:
            _leave(trouble)

    def drain(self) -> int:
        """Take no more requests."""
        self.app.state.services.drain()
        return 0

    def count_held(self) -> int:
        """Requests that are not answered yet."""
        return int(self.app.state.services.num_held)

    def close(self) -> int:
        """Answer what is left with 503; returns how many there were."""
        left = self.count_held()
        self.app.state.services.close()
        return left


def application(settings: ServiceSettings, source: ModelSource) -> serve.Application:
    """The Serve application: every replica loads the models once and builds its app around them.

    When it is deployed anew, one replica of the new kind starts before one of the old kind goes, so the
    cluster needs room for one replica more; without it the old ones go on and the update waits.
    """
    config = settings.config
    capacity = config.max_ongoing_requests + config.max_queued_requests + config.max_bodies + _HEADROOM

    def build_app() -> FastAPI:
        return _load_app(settings, source)

    rewards = [
        _reward_deployment(config.reward_deployment, name, url, source.placement)
        for url, name in _reward_names(settings, source).items()
        if config.reward_deployment is not None
    ]

    deployment = serve.deployment(
        name=APP_NAME,
        num_replicas=config.replicas,
        max_ongoing_requests=capacity,
        max_queued_requests=capacity,
        backpressure_config={"retry_after_s": 5},
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": source.placement.num_gpus},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.shutdown_grace_s,
        health_check_period_s=_HEALTH_CHECK_S,
        max_constructor_retry_count=1,
        max_surge_percent=math.ceil(100 / config.replicas),
    )
    return deployment(serve.ingress(build_app)(ChatIngress)).bind(*rewards)


def _each_model(
    settings: ServiceSettings, source: ModelSource
) -> Iterator[tuple[ServiceSettings, ModelSource]]:
    """The run's own model, then the further ones of `serve.models`, whose default weights are balanced."""
    yield settings, source
    defaults = replace(settings.defaults, objectives=None, guidance=None)
    for model in settings.config.models:
        reward = None if model.reward is None else storage.absolute(model.reward)
        policy = model.server if model.policy is None else storage.absolute(model.policy)
        assert policy is not None, "a configuration names one of the two"
        yield (
            replace(settings, model_name=model.id, defaults=defaults),
            replace(source, policy=policy, reward_url=reward, run=None, reward_server=model.reward_server),
        )


def _reward_names(settings: ServiceSettings, source: ModelSource) -> dict[str, str]:
    """The deployments of all reward models by the models' URLs; one for those that several policies share."""
    urls = dict.fromkeys(each.reward_url for _, each in _each_model(settings, source) if each.reward_url)
    return {url: f"{APP_NAME}-reward-{number}" for number, url in enumerate(urls, start=1)}


class RewardReplica:
    """A replica of a reward model's deployment. One call is computed while the next one arrives."""

    def __init__(self, url: str, placement: DeviceConfig) -> None:
        from mahalo_ray.serving.remote_scorer import TraceWorker

        self._worker = TraceWorker(url, placement)
        self._computing = threading.Lock()

    def card(self) -> ScorerCard:
        """What describes the model."""
        return self._worker.card()

    def score(self, traces: Sequence[TokenTrace]) -> list[Tensor]:
        """Scores [S, H] of every trace."""
        with self._computing:
            return self._worker.score(traces)


def _reward_deployment(
    config: RewardDeploymentConfig, name: str, url: str, placement: DeviceConfig
) -> serve.Application:
    deployment = serve.deployment(
        name=name,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        },
        max_ongoing_requests=max(2, math.ceil(config.target_requests)),
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica * placement.num_gpus,
        },
        health_check_period_s=_HEALTH_CHECK_S,
        max_constructor_retry_count=1,
    )
    return deployment(RewardReplica).bind(url, placement)


def _load_app(settings: ServiceSettings, source: ModelSource) -> FastAPI:
    _keep_error_log(error_log_folder(settings.config))
    # A thread without an event loop: the models are tried, and a reward model elsewhere is waited for.
    with ThreadPoolExecutor(1) as loader:
        services = loader.submit(_load_services, settings, source).result()
    return create_app(*services, listening=_listening(settings.config) if settings.config.sockets else None)


def _listening(config: ServeConfig) -> Callable[[ASGIApp], AbstractAsyncContextManager[None]]:
    """Takes the requests of a proxy on this machine."""
    folder = socket_folder(ray.get_runtime_context().get_node_id())
    num_models = 1 + len(config.models)
    running, places = config.max_ongoing_requests, config.max_ongoing_requests + config.max_queued_requests
    its_socket = ReplicaSocket.new(
        serve.get_replica_context().app_name, config.replicas, num_models * running, num_models * places
    )
    return lambda app: listening(app, folder, its_socket)


def _load_services(settings: ServiceSettings, source: ModelSource) -> list[ChatService]:
    # Models are the replica's business: the process that starts serving needs neither torch nor a GPU for it.
    from mahalo_ray.serving.backend import GuidedBackend
    from mahalo_ray.serving.remote_scorer import RemoteScorer

    config = settings.config
    scorers: dict[str | None, RemoteScorer] = {}
    if config.reward_deployment is not None:
        app_name = serve.get_replica_context().app_name
        for url, name in _reward_names(settings, source).items():
            scorers[url] = RemoteScorer(serve.get_deployment_handle(name, app_name))
    # Everything that may run at once runs at once.
    branches = config.max_ongoing_requests * config.max_candidates
    services = []
    for its_settings, its_source in _each_model(settings, source):
        reward_url = its_source.reward_url
        reward = its_source.reward_server or scorers.get(reward_url) or reward_url
        backend = GuidedBackend.load(its_source.policy, reward, source.domain, source.placement, branches)
        measured = None if its_source.run is None else its_source.run.read()
        services.append(ChatService(backend, its_settings, measured, _leave))
    return services


def _leave(reason: str = "its models cannot answer any more") -> None:
    """End this replica's process at once: the proxy gives its requests to another replica."""
    logger.error("the replica %d ends: %s", os.getpid(), reason)
    os._exit(1)


def error_log_folder(config: ServeConfig) -> str:
    """Where replicas keep the log of internal errors."""
    return config.log_folder or os.path.join(tempfile.gettempdir(), "mahalo_serve_logs")


def _keep_error_log(folder: str) -> None:
    """Write this replica's errors into a file of its own, which outlives Ray's session."""
    os.makedirs(folder, exist_ok=True)
    name = f"errors-{socket.gethostname()}-{os.getpid()}.log"
    handler = RotatingFileHandler(
        os.path.join(folder, name), maxBytes=10_000_000, backupCount=2, encoding="utf-8", delay=True
    )
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logging.getLogger("mahalo_ray.serving").addHandler(handler)


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


def _check_resources(config: ServeConfig, placement: DeviceConfig, num_rewards: int) -> None:
    """Serve would wait for ever for replicas that the cluster cannot hold. `num_rewards`: different reward
    models."""
    cpus, gpus = config.cpus(num_rewards), float(config.replicas)
    what, advice = f"{config.replicas} replica(s)", "lower serve.replicas or serve.cpus_per_replica"
    if config.reward_deployment is not None:
        count = num_rewards * config.reward_deployment.max_replicas
        gpus += count * config.reward_deployment.gpus_per_replica
        what += f" and {count} of reward models"
        advice += ", or those of serve.reward_deployment"
    total = ray.cluster_resources()
    for name, amount in {"CPU": cpus, "GPU": gpus * placement.num_gpus}.items():
        if amount > total.get(name, 0):
            raise ServeError(
                f"{what} need {amount:g} {name}, the Ray cluster has {total.get(name, 0):g}: {advice}, or "
                "use a larger one"
            )


def free_port(host: str, port: int) -> int:
    """The port itself if it can be bound on `host`, a free one for 0. ServeError if it is busy or not ours to
    take.

    A free one lies below the ports that systems hand out by themselves: no other program is given it in the
    seconds until Serve binds it.
    """
    for number in [port] if port else random.SystemRandom().sample(_FREE_PORTS, 50):
        if _is_free(host, number):
            return number
    if port:
        raise ServeError(
            f"port {port} on {host} is already in use: stop what uses it, or choose another port "
            "with --set serve.port=NUMBER (0 takes a free one)"
        )
    raise ServeError(f"no port from {_FREE_PORTS[0]} to {_FREE_PORTS[-1]} on {host} is free: set serve.port")


def _is_free(host: str, port: int) -> bool:
    """Whether nothing listens there. ServeError where nothing could."""
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
                return False
            raise ServeError(f"cannot serve on {host}, port {port}: {error.strerror}") from error
    return True


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
    """Keep serving until Ctrl-C or SIGTERM, then stop; a second signal ends the wait for running answers.
    Main thread only, as signal handlers are."""
    ended, hurry = threading.Event(), threading.Event()

    def note_signal(*_: object) -> None:
        (hurry if ended.is_set() else ended).set()

    before = {number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ended.wait()
        serving.stop(hurry)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
