"""From Serve's proxy to replicas over Unix sockets: a real server on one, and the proxy's part in front."""

import asyncio
import json
import os
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mahalo_ray.serving.local_socket import ReplicaSocket, is_private, listening
from mahalo_ray.serving.proxy import OpenAIErrors

STREAM = [(b"content-type", b"text/event-stream")]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own path is too long for a socket
        yield Path(parent, "sockets")


class Replica:
    """An app that says what it was asked: echoes a body, streams, waits until it is told to go on."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.go_on = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, scope, receive, send) -> None:
        self.asked.append(scope)
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["path"].endswith("/wait"):
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if scope["path"].endswith("/stream"):
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            for part in (b"data: 1\n\n", b"data: 2\n\n"):
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await self.go_on.wait()
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def serves_own_way(scope, receive, send) -> None:
    """Serve's proxy: its routes, and status 418 for what goes Ray's way."""
    routes = {"/": "other", "/tutor": "mahalo"}
    status, body = (200, json.dumps(routes).encode()) if scope["path"] == "/-/routes" else (418, b"{}")
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Client:
    """One request to the proxy, whose body comes in parts, and whose connection may end."""

    def __init__(
        self,
        proxy: OpenAIErrors,
        path: str,
        *parts: bytes | None,
        method: str = "POST",
        origin: bytes | None = None,
    ) -> None:
        self.sent: asyncio.Queue[dict] = asyncio.Queue()
        self.messages: list[dict] = []
        self.incoming: asyncio.Queue[dict] = asyncio.Queue()
        for number, part in enumerate(parts):
            if part is not None:  # None: it does not come
                self.send_part(part, number + 1 < len(parts))
        length = sum(1 if part is None else len(part) for part in parts)
        headers = [(b"content-length", str(length).encode())] if parts else []
        headers += [] if origin is None else [(b"origin", origin)]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"a=%20b",
            "headers": headers,
        }
        self.task = asyncio.create_task(proxy(scope, self.incoming.get, self._take))

    def send_part(self, part: bytes, more: bool) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": part, "more_body": more})

    async def _take(self, message: dict) -> None:
        self.messages.append(message)
        self.sent.put_nowait(message)

    async def answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(600):
            await self.task
        body = b"".join(message.get("body", b"") for message in self.messages)
        return self.messages[0]["status"], body


@asynccontextmanager
async def replica_and_proxy(folder: Path, num_replicas: int = 1, num_places: int = 2):
    replica = Replica()
    its_socket = ReplicaSocket.new("mahalo", num_replicas, 1, num_places)
    proxy = OpenAIErrors(serves_own_way, folder)
    async with listening(replica, folder, its_socket):
        yield replica, proxy
    assert await Client(proxy, "/tutor/echo", b"{}").answer() == (418, b"{}")  # Ray's way again


def test_answers_and_streams_come_as_they_are_made(folder):
    async def scenario() -> None:
        async with replica_and_proxy(folder) as (replica, proxy):
            assert await Client(proxy, "/tutor/echo", b"one ", b"two").answer() == (200, b"one two")
            assert replica.asked[0]["root_path"] == "/tutor" and replica.asked[0]["query_string"] == b"a=%20b"
            assert await Client(proxy, "/tutor/nothing", method="HEAD").answer() == (200, b"")
            streamed = Client(proxy, "/tutor/stream", b"{}")
            async with asyncio.timeout(600):
                assert dict((await streamed.sent.get())["headers"])[b"content-type"] == b"text/event-stream"
                assert (await streamed.sent.get())["body"] == b"data: 1\n\n"  # the next one is not there yet
            replica.go_on.set()
            assert await streamed.answer() == (200, b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n")
            assert await Client(proxy, "/elsewhere", b"{}").answer() == (418, b"{}")
            assert is_private(folder)
        assert not folder.exists()

    asyncio.run(scenario())


def test_a_full_replica_is_not_asked_and_bodies_that_do_not_come_hold_no_place(folder):
    async def scenario() -> None:
        async with replica_and_proxy(folder) as (replica, proxy):
            slow = [Client(proxy, "/tutor/wait", b"{", None) for _ in range(5)]
            waiting = [Client(proxy, "/tutor/wait", b"{}") for _ in range(2)]
            while len(replica.asked) < 7:
                await asyncio.sleep(0.01)
            status, body = await Client(proxy, "/tutor/wait", b"{}").answer()
            assert (status, json.loads(body)["error"]["code"]) == (503, "overloaded")
            assert await Client(proxy, "/tutor/models", method="GET").answer() == (200, b"")
            assert len(replica.asked) == 8  # the full replica was not asked
            # It alone knows the headers with which a page of another origin may read its refusal.
            page = Client(proxy, "/tutor/echo", b"{}", origin=b"https://example.org")
            assert await page.answer() == (200, b"{}") and len(replica.asked) == 9
            replica.go_on.set()
            assert [await client.answer() for client in waiting] == [(200, b"{}")] * 2
            for client in slow:
                client.send_part(b"}", more=False)
            assert [await client.answer() for client in slow] == [(200, b"{}")] * 5

    asyncio.run(scenario())


def test_a_client_that_leaves_ends_its_request_and_frees_its_place(folder):
    async def scenario() -> None:
        async with replica_and_proxy(folder, num_places=1) as (replica, proxy):
            leaving = Client(proxy, "/tutor/wait", b"{}")
            while not replica.asked:
                await asyncio.sleep(0.01)
            leaving.incoming.put_nowait({"type": "http.disconnect"})
            async with asyncio.timeout(600):
                await leaving.task
                while not replica.cancelled:
                    await asyncio.sleep(0.01)
            assert leaving.messages == []
            assert await Client(proxy, "/tutor/echo", b"{}").answer() == (200, b"{}")

    asyncio.run(scenario())


def test_where_a_replica_is_missing_ray_spreads_the_requests(folder):
    async def scenario() -> None:
        async with replica_and_proxy(folder, num_replicas=2) as (replica, proxy):
            assert await Client(proxy, "/tutor/echo", b"{}").answer() == (418, b"{}")
            async with listening(replica, folder, ReplicaSocket.new("mahalo", 2, 1, 2)):
                assert await Client(proxy, "/tutor/echo", b"{}").answer() == (200, b"{}")
                dead = folder / ReplicaSocket.new("mahalo", 2, 1, 2).file_name  # whose process was killed
                seen_ns = folder.stat().st_mtime_ns
                os.mknod(dead, 0o600 | 0o140000)
                os.utime(folder, ns=(seen_ns + 1, seen_ns + 1))  # its clock may not have ticked
                answers = [await Client(proxy, "/tutor/echo", b"{}").answer() for _ in range(3)]
                assert answers == [(200, b"{}")] * 3 and not dead.exists()
            # Until a replica that has gone has a successor, the others are asked.
            assert await Client(proxy, "/tutor/echo", b"{}").answer() == (200, b"{}")

    asyncio.run(scenario())


def test_a_folder_that_others_can_enter_is_not_used(folder, caplog):
    folder.mkdir(mode=0o755)

    async def scenario() -> None:
        async with replica_and_proxy(folder) as (_, proxy):
            assert await Client(proxy, "/tutor/echo", b"{}").answer() == (418, b"{}")

    asyncio.run(scenario())
    assert "is not this user's alone" in caplog.text and list(folder.iterdir()) == []


def test_sockets_of_killed_replicas_are_removed_by_the_next(folder):
    old = folder.parent / f"mahalo-serve-{os.geteuid()}-0123456789abcdef"
    young = folder.parent / f"mahalo-serve-{os.geteuid()}-fedcba9876543210"
    for left in (old, young):
        left.mkdir(mode=0o700)
        os.mknod(left / ReplicaSocket.new("mahalo", 1, 1, 2).file_name, 0o600 | 0o140000)
    for path, changed_s in ((old, 0), (young, 2**32)):  # long ago, and not for a long time
        for its_socket in path.iterdir():
            os.utime(its_socket, (changed_s, changed_s))

    async def scenario() -> None:
        async with replica_and_proxy(folder):
            assert not old.exists() and young.exists()

    asyncio.run(scenario())
