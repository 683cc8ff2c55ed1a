"""One run at a time per output folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from typing import Any

import psutil
from fsspec.implementations.local import LocalFileSystem

from mahalo_ray.data import storage

LOCK = "run.lock"


class RunLocked(ValueError):
    """Another run is working in the same output folder."""


@contextlib.contextmanager
def run_lock(output: str) -> Iterator[None]:
    """Hold `<output>/run.lock` while the block runs; RunLocked says who has it when another run does.

    On a disk the operating system keeps the lock (flock), so it ends with its process, however that ends. In
    an object store it is a file naming host, process and start time: one left by a process of this host that
    is gone is taken over, one of another host has to be deleted by hand.
    """
    fs, path = storage.filesystem(storage.join(output, LOCK))
    hold = _on_disk(path, output) if isinstance(fs, LocalFileSystem) else _in_store(output)
    with hold:
        yield


@contextlib.contextmanager
def _on_disk(path: str, output: str) -> Iterator[None]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _locked(output, json.loads(file.read() or "null")) from None
        file.truncate(0)
        file.write(json.dumps(_owner()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def _in_store(output: str) -> Iterator[None]:
    url = storage.join(output, LOCK)
    holder = storage.read_json(url) if storage.exists(url) else None
    if holder is not None and not _is_gone(holder):
        raise _locked(output, holder)
    mine = _owner()
    storage.write_json(url, mine)
    if storage.read_json(url) != mine:  # two runs began together: the later writer has it
        raise _locked(output, storage.read_json(url))
    try:
        yield
    finally:
        if storage.exists(url) and storage.read_json(url) == mine:
            storage.remove(url)


def _owner() -> dict[str, Any]:
    process = psutil.Process()
    started = process.create_time()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "process_started": started,
        "token": uuid.uuid4().hex,
    }


def _is_gone(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["process_started"]) > 1.0
    except psutil.NoSuchProcess:
        return True


def _locked(output: str, holder: dict[str, Any] | None) -> RunLocked:
    if holder is None:
        return RunLocked(f"'{output}' is in use by another run that began this moment")
    who = f"process {holder['pid']} on host '{holder['host']}'"
    what = "Wait for it, or give this run another 'output'"
    if holder["host"] != socket.gethostname():
        what += f". If that process is gone, delete {LOCK} in that folder"
    return RunLocked(f"'{output}' is in use by another run ({who}). {what}.")
