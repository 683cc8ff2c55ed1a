"""What all tests share: an interruptible process, and one process group for the code that needs one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import psutil
import pytest
import tiny_guided
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from moto.server import ThreadedMotoServer
from tiny_run import EXAMPLE, mahalo

# Files of minutes, longest first: begun early, they leave no process alone with one of them at the end.
LONGEST = (
    "whole_run",
    "training_distributed",
    "rollout_faults",
    "label_jobs",
    "serving_ray",
    "cli",
    "own_reward",
    "playground",
    "benchmarks",
    "rollouts",
    "own_pairs",
    "serving_app",
    "row_files",
    "samplers",
)
LINEAR = F.linear  # torch's own


def pytest_configure() -> None:
    """Started in the background, a suite ignores SIGINT, and so would the runs that it stops with it. And a
    slow machine is no failure: examples have no deadline, nor is there one for drawing them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("mahalo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("mahalo")


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are processors: much of a test's time is waiting for Ray to start and stop.
    At most one for every 4 GB of free memory, which is what a process and its Ray take; at least two."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container may have less
        most, used = (
            int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current")
        )
        free = min(free, most - used)
    return max(2, min((os.cpu_count() or 1) + 1, free // 4_000_000_000))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, in the order above."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """A process group of one, as long as the session: DeepSpeed holds on to the first it sees."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def state_of_process() -> Iterator[None]:
    """What the tests of a file leave changed reaches no other file, whatever their order: ZeRO-3 leaves a
    function of its own in the place of `F.linear`, workers in this process one thread and quiet libraries."""
    threads, dtype, folder = torch.get_num_threads(), torch.get_default_dtype(), Path.cwd()
    levels = {
        name: logging.getLogger(name).level for name in ("", "transformers", "ray.serve", "uvicorn.error")
    }
    yield
    F.linear = LINEAR
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    os.chdir(folder)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def deepspeed_alone(one_process: None) -> Iterator[None]:
    """What DeepSpeed reads from the environment, for an engine in this process."""
    with pytest.MonkeyPatch.context() as patch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**variables, "MASTER_PORT": probe.getsockname()[1]}.items():
            patch.setenv(name, str(value))
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tokenizer of the tiny guided models, saved: what clients and completion servers are told."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tiny_guided.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished tiny run of all stages."""
    folder = tmp_path_factory.mktemp("run")
    mahalo("run", str(EXAMPLE), output=folder)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """An S3-compatible server on this machine; the environment leads all processes started here to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def s3(s3_server: None) -> str:
    """The URL of an empty bucket."""
    bucket = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"
