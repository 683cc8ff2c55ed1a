"""The Ray a run works on: the cluster it is given, or a private one that ends with the run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil
import ray

from mahalo_ray.config import ActorsConfig, ClusterConfig, ConfigError
from mahalo_ray.serving.proxy import PROXY_ENV

# A unix socket's path may have 107 bytes; Ray appends up to 75 to its temporary folder.
LONGEST_TEMP_DIR = 30
OBJECT_STORE_BYTES = (100 * 2**20, 1024 * 2**20)

# Set for the driver and all workers, unless the user has set them.
WORKER_ENV = {
    **PROXY_ENV,
    "PYTHONWARNINGS": "ignore::FutureWarning",  # torch 2.13 prints one at every collective
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # it gates report(): the default costs 2 s each
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray Tune's newer output cannot be switched off
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # 60 is too short on a busy machine
}
PRIVATE_ENV = {"RAY_USAGE_STATS_ENABLED": "0"}


class Needs(NamedTuple):
    """What the largest of the stages asks Ray for, with one CPU to spare for the actors that steer it. `keys`
    say so."""

    cpus: int
    gpus: int
    keys: str


@contextlib.contextmanager
def ray_session(cluster: ActorsConfig, serve_cpus: float = 0, rollouts: bool = True) -> Iterator[None]:
    """Ray is connected while the block runs, and left or shut down after it, also on errors and signals.

    The cluster is `cluster.address`, else RAY_ADDRESS (as `ray job submit` sets it), else a private one with
    its own ports and temporary folder, which another Ray on this machine neither sees nor disturbs. SIGTERM
    raises SystemExit(143) in the main thread. Raises ConfigError when the cluster cannot be reached or is too
    small.
    """
    if ray.is_initialized():
        raise ConfigError("Ray is already running in this process: call ray.shutdown() first")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    needs = needs_of(cluster, serve_cpus, rollouts)
    opened = _connected(address, needs) if address else _private(needs)
    with opened, _sigterm_raises():
        yield


@contextlib.contextmanager
def _connected(address: str, needs: Needs) -> Iterator[None]:
    missing = {key: value for key, value in WORKER_ENV.items() if key not in os.environ}
    with _environment(missing):
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": missing},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise ConfigError(f"no Ray cluster answers at '{address}': {error}") from error
        try:
            _check_size(needs)
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _private(needs: Needs) -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="mahalo-", dir=_short_temp_dir())
    before = {process.pid for process in psutil.Process().children()}
    # Ray Train builds with the interpreter's own tools (ninja), which a venv has beside it.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    missing = {key: value for key, value in (WORKER_ENV | PRIVATE_ENV).items() if key not in os.environ}
    with _environment({**missing, "PATH": path}):
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, needs.cpus),
                object_store_memory=_object_store_bytes(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
            _check_size(needs)
            yield
        finally:
            _shut_down(before)
            shutil.rmtree(folder, ignore_errors=True)


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
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_TEMP_DIR - len("/mahalo-xxxxxxxx") else "/tmp"


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block; Ray's own changes to the environment end with it too."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for key in set(os.environ) - set(before):
            del os.environ[key]
        os.environ.update(before)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the block with SystemExit(143) (after ray.init, which sets its own handler)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shut_down(before: set[int]) -> None:
    """Stop the private Ray and wait until every process it started is gone; a second Ctrl-C has to wait."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    started = [child for child in psutil.Process().children() if child.pid not in before]
    processes = started + [grandchild for child in started for grandchild in _descendants(child)]
    try:
        ray.shutdown()
        _, alive = psutil.wait_procs(processes, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
