"""One thread owns the models; requests join the running batch while it runs; what waits is bounded.

The asyncio side submits jobs and awaits their events. The thread admits up to `max_active` jobs at a time and
advances all of them together, a few tokens at a time. A job nobody waits for any more (client gone, deadline
passed) turns `wanted` False: it is dropped before it starts, or taken out after those tokens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from mahalo_ray.serving.schema import ApiError, internal_error

logger = logging.getLogger(__name__)


class Job:
    """One request on its way through the worker; `payload` is for the engine."""

    def __init__(self, payload: Any, timeout_s: float) -> None:
        self.payload = payload
        self.timeout_s = timeout_s
        self.admitted_at = 0.0
        self.finished = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._deadline = self._loop.time() + timeout_s
        self._abandoned = threading.Event()

    # -- the worker's side (its thread) ----------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self._abandoned.is_set()

    def step(self, value: Any) -> None:
        """Hand over a part of the result."""
        self._post("step", value)

    def finish(self, value: Any) -> None:
        """Hand over the result; nothing follows."""
        self.finished = True
        self._post("done", value)

    def fail(self, error: ApiError) -> None:
        """End with an error, unless it has ended already."""
        if not self.finished:
            self.finished = True
            self._post("failed", error)

    def _post(self, kind: str, value: Any) -> None:
        # The loop is closed only when the whole replica goes down; then nobody is left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

    # -- the client's side (the event loop) ------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[tuple[str, Any]]:
        """("step", value) any number of times, then ("done", value). Raises ApiError: what the worker failed
        with, or 504 at the deadline. However the caller leaves, the worker learns that nobody waits."""
        try:
            while True:
                try:
                    async with asyncio.timeout_at(self._deadline):
                        kind, value = await self._events.get()
                except TimeoutError:
                    message = f"the answer took longer than this server's limit of {self.timeout_s:g} s"
                    raise ApiError(504, message, code="timeout") from None
                if kind == "failed":
                    raise value
                yield kind, value
                if kind == "done":
                    return
        finally:
            self._abandoned.set()

    async def result(self) -> Any:
        """The final value."""
        async for kind, value in self.events():
            if kind == "done":
                return value
        raise AssertionError("events end with 'done' or an exception")


class Engine(Protocol):
    """What the thread drives. A job ends by `finish` or `fail`."""

    def admit(self, jobs: Sequence[Job]) -> None:
        """Take new jobs in. Those that cannot be done fail here, alone."""
        ...

    def advance(self) -> None:
        """A few tokens of everything admitted and still wanted."""
        ...

    def reset(self) -> None:
        """Forget everything admitted, after an exception left its state unknown."""
        ...


class Worker:
    """Drives an engine in a thread of its own.

    Beside `max_active` jobs that run, `max_waiting` may wait. When nothing runs, `window_s` seconds pass
    between the arrival of a job and its start, so that requests sent at once start together.
    """

    def __init__(self, engine: Engine, max_active: int, max_waiting: int, window_s: float) -> None:
        self._engine = engine
        self._max_active, self._max_waiting, self._window_s = max_active, max_waiting, window_s
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._job_seconds = 1.0  # moving average, for Retry-After
        self._thread = threading.Thread(target=self._run, name="mahalo-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def check_room(self) -> None:
        """Raise ApiError 503 with Retry-After when as many jobs run and wait as may."""
        with self._changed:
            self._check_room()

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError 503 when full or closed."""
        with self._changed:
            if self._closed:
                raise _shutting_down()
            self._check_room()
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Answer everything unfinished with 503 and stop the thread after what it is at."""
        with self._changed:
            self._closed = True
            unfinished = [*self._active, *self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for job in unfinished:
            job.fail(_shutting_down())

    def _check_room(self) -> None:
        # Those whose clients left give their waiting places back at once.
        self._waiting = deque(job for job in self._waiting if job.wanted)
        held = len(self._active) + len(self._waiting)
        if held >= self._max_active + self._max_waiting:
            rounds = 1 + len(self._waiting) / self._max_active
            raise ApiError(
                503,
                f"the server is busy: {held} requests run or wait; try again later",
                code="overloaded",
                retry_after_s=rounds * self._job_seconds,
            )

    def _run(self) -> None:
        while (joining := self._next()) is not None:
            try:
                self._engine.admit(joining)
                self._engine.advance()
            except Exception:
                # The thread must outlive any request: every client of the batch is told, the log says what.
                logger.exception("a batch of %d requests failed", len(self._active))
                for job in self._active:
                    job.fail(internal_error())
                self._engine.reset()
            self._sort_out()

    def _sort_out(self) -> None:
        """Finished and abandoned jobs leave. (The engine takes abandoned ones out itself.)"""
        now = time.monotonic()
        with self._changed:
            for job in self._active:
                if job.finished:
                    self._job_seconds += 0.2 * (now - job.admitted_at - self._job_seconds)
            self._active = [job for job in self._active if not job.finished and job.wanted]

    def _next(self) -> list[Job] | None:
        """Jobs that join now, perhaps none while others run; None when closed."""
        with self._changed:
            while not self._waiting and not self._active and not self._closed:
                self._changed.wait()
            if not self._active:
                self._wait_for_company()
            if self._closed:
                return None
            wanted = [job for job in self._waiting if job.wanted]
            room = self._max_active - len(self._active)
            joining, self._waiting = wanted[:room], deque(wanted[room:])
            for job in joining:
                job.admitted_at = time.monotonic()
            self._active += joining
            return joining

    def _wait_for_company(self) -> None:
        # Waiting releases the lock: more jobs join meanwhile. A full batch has nobody to wait for.
        window_ends = time.monotonic() + self._window_s
        while len(self._waiting) < self._max_active and not self._closed:
            left = window_ends - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
