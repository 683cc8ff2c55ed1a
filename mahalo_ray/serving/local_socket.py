"""The short way from Serve's proxy to the replicas on its machine: HTTP over Unix sockets.

Ray carries every request, and every part of every answer, as calls between actors, through several event
loops and with pickled messages: 20 to 30 ms of processor time a request, more than a small model takes for
the answer. A replica therefore listens on a socket of its own beside that, in a folder that only its user can
read, and the proxy sends requests there. Where this does not work (a replica on another machine, a proxy
without this project's part in it) they go Ray's way. The proxy imports this module, so it imports nothing
heavy.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

ROOT_PATH_HEADER = b"mahalo-root-path"  # from the proxy: what the application's addresses begin with
_FOLDERS = "mahalo-serve-"
_LONGEST_PATH = 100  # bytes: what every system allows for the path of a Unix socket
_KEEP_ALIVE_S = 75  # longer than the proxy keeps an idle connection, so that the proxy is the one to close it
_SUFFIX = ".sock"
_STARTED_S = 60.0  # after which whoever made a socket listens there, or is gone


def socket_folder(node_id: str) -> Path:
    """Where replicas on one node of a Ray cluster have their sockets; a node's id is never used again."""
    return Path(tempfile.gettempdir(), f"{_FOLDERS}{os.geteuid()}-{node_id[:16]}")


def is_private(folder: Path) -> bool:
    """Whether the folder is there, and nobody but this user can write or read it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


@dataclass(frozen=True)
class ReplicaSocket:
    """What a socket's name says: `application`, a digest of its name; `num_replicas` that the application
    has; how many requests the replica answers at once, and `num_places` for these and those that wait."""

    application: str
    num_replicas: int
    num_running: int
    num_places: int
    token: str

    @classmethod
    def new(cls, application: str, num_replicas: int, num_running: int, num_places: int) -> Self:
        """A socket that no other replica has."""
        token = secrets.token_hex(6)
        return cls(application_digest(application), num_replicas, num_running, num_places, token)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """From a file's name; None for another file."""
        parts = name.removesuffix(_SUFFIX).split("-")
        if not name.endswith(_SUFFIX) or len(parts) != 5:
            return None
        application, *numbers, token = parts
        if not all(number.isdecimal() for number in numbers):
            return None
        num_replicas, num_running, num_places = map(int, numbers)
        return cls(application, num_replicas, num_running, num_places, token)

    @property
    def file_name(self) -> str:
        """The name of the socket's file."""
        numbers = f"{self.num_replicas}-{self.num_running}-{self.num_places}"
        return f"{self.application}-{numbers}-{self.token}{_SUFFIX}"


def application_digest(name: str) -> str:
    """A name of fixed length for an application of Serve."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


@asynccontextmanager
async def listening(app: ASGIApp, folder: Path, its_socket: ReplicaSocket) -> AsyncIterator[None]:
    """Answer requests of the proxy on this machine; at the end take no more, and finish those that run.

    Without a socket (a path that is too long, a folder of somebody else) a warning is all that follows.
    """
    path = folder / its_socket.file_name
    try:
        listener = _listen(path)
    except OSError as error:
        logger.warning("requests take Ray's way, which is slower: no socket at %s: %s", path, error)
        yield
        return
    # As Serve does for its own: what goes wrong is in the log of the app.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        FromProxy(app),
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        access_log=False,
        log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        _unfinished(path).rename(path)
        yield
    finally:
        path.unlink(missing_ok=True)
        server.should_exit = True
        await task
        with suppress(OSError):  # other replicas have theirs there
            folder.rmdir()


def _listen(path: Path) -> socket.socket:
    """A socket that is bound where nobody looks for it yet."""
    folder = path.parent
    _remove_left_behind(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(f"{folder} is not this user's alone")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise OSError(f"a path of more than {_LONGEST_PATH} bytes")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(_unfinished(path)))
    return listener


def _remove_left_behind(parent: Path) -> None:
    """Remove this user's sockets whose replicas were killed, of other nodes and earlier ones."""
    for folder in parent.glob(f"{_FOLDERS}{os.geteuid()}-*"):
        if not is_private(folder):
            continue
        with suppress(OSError):  # somebody else removes it too
            for path in folder.iterdir():
                if time.time() - path.stat().st_mtime > _STARTED_S and not _is_answered(path):
                    path.unlink()
            folder.rmdir()  # where nothing is left


def _is_answered(path: Path) -> bool:
    """Whether somebody listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except OSError:  # busy, or no socket
            return True
        return True


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".new")


class FromProxy:
    """A replica's app as the proxy asks it over a socket: below the path that the proxy names, and ended when
    the client has left, as Serve ends it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [item for item in scope["headers"] if item[0] != ROOT_PATH_HEADER]
        roots = [value.decode() for name, value in scope["headers"] if name == ROOT_PATH_HEADER]
        inner = {**scope, "headers": headers, "root_path": roots[0] if roots else ""}
        with ClientWatch(receive, send) as client:
            await self._app(inner, client.receive, client.send)


class ClientWatch:
    """`receive` and `send` of one request, whose task is cancelled when the client leaves before it has its
    answer. As a context manager it ends that cancellation where it was meant."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._task: asyncio.Task[object] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_answered = self.has_left = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if self._watching is not None:
            self._watching.cancel()
        if kind is None or not issubclass(kind, asyncio.CancelledError) or not self.has_left:
            return False
        assert self._task is not None
        self._task.uncancel()
        return True

    async def receive(self) -> Message:
        """The next part of the body; after the last, `http.disconnect` as soon as the client has left."""
        if self._watching is None:
            message = await self._receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                self._watching = asyncio.create_task(self._watch())
            return message
        await asyncio.wait([self._watching])
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_answered = True
        await self._send(message)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._is_answered and self._task is not None:
            self.has_left = True
            self._task.cancel()
