"""Temporary folders that do not stay where their process was killed: the next that makes any deletes them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

_OWNER = "owner.json"  # names the process that a folder belongs to


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[str]:
    """An empty folder for the block, `mahalo-PURPOSE-...` in the temporary folder."""
    folder = make_owned_folder(f"mahalo-{purpose}-", Path(tempfile.gettempdir()))
    try:
        content = os.path.join(folder, "content")
        os.mkdir(content)
        yield content
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_owned_folder(prefix: str, parent: Path) -> str:
    """A new folder in `parent`, whose name begins with `prefix` ("mahalo-..."), marked as this process's.
    Those of processes that are gone are deleted first."""
    for mark in parent.glob(f"mahalo-*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if mark.stat().st_uid == os.getuid() and not _is_alive(json.loads(mark.read_text())):
                shutil.rmtree(mark.parent, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    process = psutil.Process()
    owner = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}
    Path(folder, _OWNER).write_text(json.dumps(owner))
    return folder


def began_then(process: psutil.Process, started: float) -> bool:
    """Whether a process began at a time that was noted before. The system gives it from its boot, in whole
    seconds that move by one or two when its clock is set right."""
    return abs(process.create_time() - started) < 3.0


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process runs; of another host (containers may share a folder), it is taken to."""
    if owner.get("host", socket.gethostname()) != socket.gethostname():
        return True
    try:
        return began_then(psutil.Process(int(owner["pid"])), owner["started"])
    except psutil.NoSuchProcess:
        return False
