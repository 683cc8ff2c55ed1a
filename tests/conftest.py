"""What all tests share: an interruptible process, and one process group for the code that needs one."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import settings
from tiny_run import EXAMPLE, mahalo


def pytest_configure() -> None:
    """Started in the background, a suite ignores SIGINT, and so would the runs that it stops with it. And a
    slow machine is no failure: examples have no deadline."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("mahalo", deadline=None)
    settings.load_profile("mahalo")


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """A process group of one, as long as the session: DeepSpeed holds on to the first it sees."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished tiny run of all stages."""
    folder = tmp_path_factory.mktemp("run")
    mahalo("run", str(EXAMPLE), output=folder)
    return folder
