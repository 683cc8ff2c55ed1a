"""The Ray a run works on: the cluster it is given, or a private one that ends with the run."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import ray
import ray._private.parameter
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # written in Cython

from mahalo_ray.config import ActorsConfig, ClusterConfig, ConfigError
from mahalo_ray.data.temporary import make_owned_folder
from mahalo_ray.pipeline.stages import sigterm_raises

# A unix socket's path may have 107 bytes; Ray appends up to 75 to its temporary folder.
LONGEST_TEMP_DIR = 30
OPEN_FILES, FEWEST_OPEN_FILES = 65536, 1024
CONNECT_TIMEOUT_S, HEALTH_TIMEOUT_S = 10, 40  # together below a minute
KILLED_TIMEOUT_S = 60  # until the system has cleared a killed process away: at once, unless it is very busy
OBJECT_STORE_BYTES = (100 * 2**20, 1024 * 2**20)

# Set for the driver and all workers, unless the user has set them.
WORKER_ENV = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mahalo_ray.serving.proxy:middlewares",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # torch 2.13 prints one at every collective
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # it gates report(): the default costs 2 s each
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray Tune's newer output cannot be switched off
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 is too short on a busy machine: Serve kills the proxy
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # 60 is too short on a busy machine
    # Ray prints that a call failed and will be tried again, also of every call that is open when Serve ends.
    # Calls that fail for good raise their error all the same.
    "RAY_enable_output_error_log_if_still_retry": "0",
    # Ray's own handler of signals prints a stack of C++, also at a SIGTERM while it starts; Python's
    # says where a process crashed.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "PYTHONFAULTHANDLER": "1",
    # Workers start a second earlier; read where the package is imported.
    "MAHALO_GC_THRESHOLD": "10000",
}
PRIVATE_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_preload_python_modules": "mahalo_ray",  # MAHALO_GC_THRESHOLD counts in Ray's own actors too
}
# Ray lowers its workers' priority by 15: beside any other program an endpoint would hardly run, nor start.
SERVING_ENV = {"RAY_worker_niceness": "0"}


class Needs(NamedTuple):
    """What the largest of the stages asks Ray for, with one CPU to spare for the actors that steer it. `keys`
    say so."""

    cpus: int
    gpus: int
    keys: str


@contextlib.contextmanager
def ray_session(
    cluster: ActorsConfig, serve_cpus: float = 0, rollouts: bool = True, serves: bool = False
) -> Iterator[None]:
    """Ray is connected while the block runs, and left or shut down after it, also on errors and signals.

    The cluster is `cluster.address`, else RAY_ADDRESS (as `ray job submit` sets it), else a private one with
    its own ports and temporary folder, which another Ray on this machine neither sees nor disturbs. SIGTERM
    raises SystemExit(143) in the main thread. Raises ConfigError when the cluster does not answer within a
    minute or is too small. `serves`: a private Ray's workers get this process's own priority.
    """
    if ray.is_initialized():
        raise ConfigError("Ray is already running in this process: call ray.shutdown() first")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    needs = needs_of(cluster, serve_cpus, rollouts)
    private = not address or address == "local"
    opened = _private(needs, SERVING_ENV if serves else {}) if private else _connected(str(address), needs)
    try:
        with sigterm_raises(), opened, sigterm_raises():  # `ray.init` sets a handler of its own
            yield
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None  # Ray's handler gives the signal's number alone


@contextlib.contextmanager
def _connected(address: str, needs: Needs) -> Iterator[None]:
    missing = {key: value for key, value in WORKER_ENV.items() if key not in os.environ}
    _check_answers(address)
    with _environment(missing):
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": missing},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError) as error:  # RuntimeError: of another version, for example
            raise ConfigError(f"the Ray cluster at '{address}' cannot be joined: {error}") from error
        try:
            _check_size(needs)
            yield
        finally:
            _disconnect()


def _check_answers(address: str) -> None:
    """ConfigError unless a Ray cluster answers at the address: `ray.init` would wait for it for ever."""
    advice = "start it, or unset RAY_ADDRESS and 'cluster.address' to work on a private Ray"
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(f"no Ray cluster answers at '{address}' ({error}): {advice}") from error
    if address.startswith("ray://"):
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check"]
    try:
        done = subprocess.run(
            [*command, "--address", address], capture_output=True, timeout=HEALTH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"what listens at '{address}' does not answer as a Ray cluster: {advice}"
        ) from error
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"no Ray cluster answers at '{address}' ({' '.join(reason)}): {advice}")


@contextlib.contextmanager
def _private(needs: Needs, further: dict[str, str]) -> Iterator[None]:
    _raise_open_files_limit()
    folder = make_owned_folder("mahalo-", Path(_short_temp_dir()))
    before = {process.pid for process in psutil.Process().children()}
    # Ray Train builds with the interpreter's own tools (ninja), which a venv has beside it.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    wanted = WORKER_ENV | PRIVATE_ENV | further
    missing = {key: value for key, value in wanted.items() if key not in os.environ}
    with _environment({**missing, "PATH": path}):
        try:
            with _fewer_processes():
                _init_private(needs, folder)
            _check_size(needs)
            yield
        finally:
            _end_private(before)
            shutil.rmtree(folder, ignore_errors=True)


def _init_private(needs: Needs, folder: str) -> None:
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, needs.cpus),
        object_store_memory=_object_store_bytes(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
    )


@contextlib.contextmanager
def _fewer_processes() -> Iterator[None]:
    """What `ray.init` has no arguments for: no autoscaler, no reader of logs, and the agent on a free port.

    A private Ray has one node and shows no logs, and each of those processes costs a second of CPU and 80 MB.
    The agent's fixed port, 52365, would be taken from a Ray that is started on this machine later: that one
    could not take jobs.
    """
    usual = ray._private.parameter.RayParams
    ray._private.parameter.RayParams = functools.partial(
        usual, dashboard_agent_listen_port=0, no_monitor=True, include_log_monitor=False
    )
    try:
        yield
    finally:
        ray._private.parameter.RayParams = usual


def _raise_open_files_limit() -> None:
    """Ray holds many files and connections open; ConfigError where the system allows too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if allowed < FEWEST_OPEN_FILES:
        raise ConfigError(
            f"this process may hold {hard} files open at most, and Ray needs {FEWEST_OPEN_FILES}: raise the "
            f"limit (`ulimit -Hn {OPEN_FILES}`)"
        )
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def needs_of(cluster: ActorsConfig, serve_cpus: float = 0, rollouts: bool = True) -> Needs:
    """What Ray must have: training workers (where the section has any), rollout actors and endpoint run one
    after the other."""
    users: dict[str, tuple[int, float]] = {}  # key -> processes and CPUs of each
    if isinstance(cluster, ClusterConfig):
        users["cluster.train_workers"] = cluster.train_workers, cluster.cpus_per_train_worker
    if rollouts:
        users["cluster.rollout_actors"] = cluster.rollout_actors, cluster.cpus_per_rollout_actor
    cpus = max(serve_cpus, *(count * each for count, each in users.values()))
    gpus = max(count for count, _ in users.values()) if cluster.use_gpu else 0
    return Needs(math.ceil(cpus) + 1, gpus, " and ".join(f"'{key}'" for key in users))


def _check_size(needs: Needs) -> None:
    """What a stage asks for must exist: Ray would wait for it without a word."""
    found = ray.cluster_resources()
    cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
    if cpus < needs.cpus:
        raise ConfigError(
            f"the Ray cluster has {cpus} CPU(s) and {needs.cpus} are needed: lower {needs.keys} or their "
            "CPUs, or add nodes"
        )
    if gpus < needs.gpus:
        raise ConfigError(
            f"'cluster.use_gpu' is set and {needs.gpus} GPU(s) are needed, but there are {gpus}: lower "
            f"{needs.keys}, or set 'cluster.use_gpu=false'"
        )


def _object_store_bytes() -> int:
    smallest, largest = OBJECT_STORE_BYTES
    return int(min(max(psutil.virtual_memory().total // 10, smallest), largest))


def _short_temp_dir() -> str:
    """The usual temporary folder where its name is short and plain enough for Ray's sockets."""
    usual = tempfile.gettempdir()
    fits = len(usual) <= LONGEST_TEMP_DIR - len("/mahalo-xxxxxxxx") and usual.isascii()
    return usual if fits else "/tmp"


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block; Ray's own changes to the environment end with it too.

    Ray keeps what it has read of the environment (a private Ray sets RAY_AUTH_MODE) and reads it again at the
    end: otherwise a cluster that is joined later in this process would find its calls refused.
    """
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for key in set(os.environ) - set(before):
            del os.environ[key]
        os.environ.update(before)
        if not ray.is_initialized():
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()


def _disconnect() -> None:
    """Leave Ray, except when the process is being stopped (called while the block's exception is handled).

    A stage's thread is then still inside Ray's C++ code, and `ray.shutdown` would free under it what it works
    with: one stop in three ended as a segmentation fault. The end of the process disconnects it just as well.
    """
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit):
        ray.shutdown()


def _end_private(before: set[int]) -> None:
    """Stop the private Ray and wait until every process it started is gone; a second Ctrl-C has to wait."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    started = [child for child in psutil.Process().children() if child.pid not in before]
    processes = started + [grandchild for child in started for grandchild in _descendants(child)]
    try:
        _disconnect()
        # `ray.shutdown` has told them to end; after a stop nobody has.
        alive = psutil.wait_procs(processes, timeout=5)[1] if not ray.is_initialized() else processes
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        killed = psutil.wait_procs(alive, timeout=5)[1]
        deadline = time.monotonic() + KILLED_TIMEOUT_S
        while any(map(_runs, killed)) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended, be it that nobody has asked how it ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
