"""The replicas that Serve's proxy reaches over sockets of its machine: which there are, what each has to do,
and one request on its way to one of them and back."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from starlette.types import ASGIApp, Message, Scope, Send
from yarl import URL

from mahalo_ray.serving.local_socket import (
    ROOT_PATH_HEADER,
    ClientWatch,
    ReplicaSocket,
    application_digest,
    is_private,
)

logger = logging.getLogger(__name__)

_ROUTES_S = 1.0  # after which the proxy's routes are read again
_IDLE_S = 15.0  # that a connection to a replica is kept
_CONNECT_S = 5.0
_REPLACED_S = 60.0  # in which a replica that is gone usually has a successor
_BUFFER = 65_536  # bytes of an answer that may wait for a slow client
_SHARE = 0.2  # of the newest answer in the moving average of their pace
# Of one connection each: the proxy has its own with the client, and another with the replica.
_OF_A_CONNECTION = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
_NOT_PASSED_ON = _OF_A_CONNECTION | {b"expect", b"content-length", ROOT_PATH_HEADER}


class RequestBody(Protocol):
    """A client's body on its way in."""

    @property
    def at_hand(self) -> bytes | None:
        """The whole body where it is there already."""

    async def receive(self) -> Message:
        """The client's next message."""


class LocalReplica:
    """One replica behind its socket. `held`: requests that wait for it, those left out whose clients are slow
    to read; `is_lost`: nobody listens there any more."""

    def __init__(self, path: Path, described: ReplicaSocket, application: LocalApplication) -> None:
        self.described = described
        self.held = 0
        self.is_lost = False
        self.application = application
        self._path = path
        self._session: aiohttp.ClientSession | None = None
        self._open = 0

    async def answer(self, scope: Scope, body: RequestBody, send: Send, takes_place: bool) -> None:
        """Ask the replica and pass its answer on. If it is lost before it says anything, nothing is sent; a
        client that leaves ends the request. `takes_place`: it holds one of the replica's places."""
        self._open += 1
        try:
            with ClientWatch(body.receive, send) as client:
                await self._ask(scope, body, client, takes_place)
        finally:
            self._open -= 1
            if self.is_lost:
                await self.close()

    async def _ask(self, scope: Scope, body: RequestBody, client: ClientWatch, takes_place: bool) -> None:
        place = _Place(self if takes_place else None)
        has_body = takes_place or any(name == b"content-length" for name, _ in scope["headers"])
        whole = body.at_hand
        data: bytes | AsyncIterator[bytes] | None = None
        if whole is not None:
            while (await client.receive()).get("more_body", False):  # from now on the client is watched
                pass
            data = whole
            place.take()
        elif has_body:
            data = _parts(client, place)
        else:
            place.take()
        try:
            async with self._connections().request(
                scope["method"],
                self._url(scope),
                headers=self._headers(scope, whole),
                data=data,
                allow_redirects=False,
            ) as response:
                headers = [
                    (name.lower(), value)
                    for name, value in response.raw_headers
                    if name.lower() not in _OF_A_CONNECTION
                ]
                await client.send(
                    {"type": "http.response.start", "status": response.status, "headers": headers}
                )
                content, has_ended = response.content, False
                while not has_ended:
                    place.take()
                    part = b"" if content.at_eof() else await content.readany()
                    has_ended = content.at_eof()
                    place.give_back()
                    await client.send(
                        {"type": "http.response.body", "body": part, "more_body": not has_ended}
                    )
                if takes_place and response.status == 200:
                    self.application.note_answer(place.waited_s)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError | FileNotFoundError):
                logger.warning("a replica is gone: %s", error)
                self.is_lost = True
                self.application.drop(self)
                self._path.unlink(missing_ok=True)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            logger.warning("a replica broke off: %s", error)
        finally:
            place.give_back()

    def _url(self, scope: Scope) -> URL:
        path = scope.get("raw_path") or scope["path"].encode()
        query = b"?" + scope["query_string"] if scope.get("query_string") else b""
        return URL(f"http://replica{(path + query).decode('latin-1')}", encoded=True)

    def _headers(self, scope: Scope, whole: bytes | None) -> list[tuple[str, str]]:
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name not in _NOT_PASSED_ON or (name == b"content-length" and whole is None)
        ]
        return [*headers, (ROOT_PATH_HEADER.decode(), self.application.root_path)]

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self._path), limit=0, keepalive_timeout=_IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                read_bufsize=_BUFFER,
            )
        return self._session

    async def close(self) -> None:
        """End the connections, once no request needs them."""
        self.is_lost = True
        if not self._open and self._session is not None:
            session, self._session = self._session, None
            await session.close()


class _Place:
    """A place of a replica that one request holds, and how long it did."""

    def __init__(self, replica: LocalReplica | None) -> None:
        self._replica = replica
        self._since: float | None = None
        self.waited_s = 0.0

    def take(self) -> None:
        """Hold it from now on."""
        if self._replica is not None and self._since is None:
            self._replica.held += 1
            self._since = time.monotonic()

    def give_back(self) -> None:
        """Hold it no longer."""
        if self._replica is not None and self._since is not None:
            self._replica.held -= 1
            self.waited_s += time.monotonic() - self._since
            self._since = None


async def _parts(client: ClientWatch, place: _Place) -> AsyncIterator[bytes]:
    """A body as it comes in. It takes a place only when it is there."""
    more = True
    while more:
        message = await client.receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left before its request was there")
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]
    place.take()


class LocalApplication:
    """One application of Serve all of whose replicas have sockets here. `pace_s`: seconds between answers;
    `wait_s`: until what the replicas hold is answered."""

    def __init__(self, name: str, route: str) -> None:
        self.name = name
        self.root_path = "" if route == "/" else route
        self.replicas: list[LocalReplica] = []
        self._complete_at = float("-inf")
        self._average_s: float | None = None

    def see_all(self) -> bool:
        """Look whether all its replicas are here, or were a moment ago: if not, Ray spreads the requests."""
        if not self.replicas:
            return False
        now = time.monotonic()
        if len(self.replicas) >= max(replica.described.num_replicas for replica in self.replicas):
            self._complete_at = now
        return now - self._complete_at < _REPLACED_S

    @property
    def is_full(self) -> bool:
        """Whether every place of every replica is held."""
        return all(replica.held >= replica.described.num_places for replica in self.replicas)

    @property
    def pace_s(self) -> float:
        """Seconds between answers."""
        if self._average_s is None:
            return 1.0 / max(1, sum(replica.described.num_running for replica in self.replicas))
        return self._average_s

    @property
    def wait_s(self) -> float:
        """Seconds until what the replicas hold now is answered."""
        return self.pace_s * sum(replica.held for replica in self.replicas)

    def note_answer(self, waited_s: float) -> None:
        """A request has been answered that waited so long."""
        beside = 1 + sum(replica.held for replica in self.replicas)
        pace = waited_s / beside
        average = pace if self._average_s is None else self._average_s
        self._average_s = average + _SHARE * (pace - average)

    def choose(self) -> LocalReplica | None:
        """The replica with the least to do; None where Ray has to find one."""
        if not self.see_all():
            return None
        chosen = min(self.replicas, key=lambda replica: replica.held)
        # Of those with equally little, the one that was asked longest ago.
        self.replicas.remove(chosen)
        self.replicas.append(chosen)
        return chosen

    def drop(self, replica: LocalReplica) -> None:
        """A replica is gone."""
        if replica in self.replicas:
            self.replicas.remove(replica)


class LocalApplications:
    """Finds the application of a path among those with sockets in a folder. `app`: the proxy, which is asked
    for its routes."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, folder
        self._by_route: dict[str, LocalApplication] = {}
        self._seen_ns = -1
        self._known: dict[str, LocalReplica] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def find(self, path: str) -> LocalApplication | None:
        """The application that answers there, if all its replicas have sockets here."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except OSError:  # its last replica has ended
            await self._forget(set())
            return None
        is_old = changed_ns != self._seen_ns or time.monotonic() - self._read_at > _ROUTES_S
        if is_old and self._reading is None:
            self._reading = asyncio.create_task(self._read(changed_ns))
        if self._reading is not None and (changed_ns != self._seen_ns):
            await asyncio.shield(self._reading)
        routes = [route for route in self._by_route if _is_below(path, route)]
        if not routes:
            return None
        application = self._by_route[max(routes, key=len)]
        return application if application.see_all() else None

    async def _read(self, changed_ns: int) -> None:
        try:
            routes = await self._routes()
            sockets = self._sockets()
            before = {application.name: application for application in self._by_route.values()}
            found: dict[str, LocalApplication] = {}
            for route, name in routes.items():
                application = before.get(name)
                root_path = "" if route == "/" else route
                if application is None or application.root_path != root_path:
                    application = LocalApplication(name, route)
                found[route] = application
                its_sockets = [each for each in sockets if each.application == application_digest(name)]
                application.replicas = [self._replica(each, application) for each in its_sockets]
            self._by_route = found
            await self._forget({each.file_name for each in sockets})
            self._seen_ns, self._read_at = changed_ns, time.monotonic()
        finally:
            self._reading = None

    async def _forget(self, all_but: set[str]) -> None:
        """Close the connections to the sockets that are gone."""
        for name in self._known.keys() - all_but:
            await self._known.pop(name).close()
        if not all_but:
            self._by_route, self._seen_ns = {}, -1

    def _replica(self, described: ReplicaSocket, application: LocalApplication) -> LocalReplica:
        known = self._known.get(described.file_name)
        if known is None:
            known = LocalReplica(self._folder / described.file_name, described, application)
            self._known[described.file_name] = known
        known.application = application
        return known

    def _sockets(self) -> list[ReplicaSocket]:
        """Those of the folder, without those where nobody listened any more."""
        if not is_private(self._folder):
            return []  # gone, or somebody else's
        parsed = (ReplicaSocket.parse(name) for name in sorted(os.listdir(self._folder)))
        found = [described for described in parsed if described is not None]
        return [each for each in found if not self._is_lost(each.file_name)]

    def _is_lost(self, file_name: str) -> bool:
        return file_name in self._known and self._known[file_name].is_lost

    async def _routes(self) -> Mapping[str, str]:
        """The names of Serve's applications by what their addresses begin with."""
        status, parts = 0, []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/-/routes",
            "raw_path": b"/-/routes",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [],
            "client": None,
            "server": None,
        }
        await self._app(scope, receive, send)
        return dict(json.loads(b"".join(parts))) if status == 200 else {}


def _is_below(path: str, route: str) -> bool:
    return route == "/" or path == route or path.startswith(route.rstrip("/") + "/")
