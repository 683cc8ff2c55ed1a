"""One thread owns the models; requests that arrive together are decoded together; what waits is bounded.

The asyncio side submits jobs and awaits their events; the thread takes up to `max_batch` jobs of one kind at a time.
A job nobody waits for any more (client gone, deadline passed) is dropped before it starts, and its `wanted` turns
False so that a running one can be left out of the next step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from mahalo_ray.serving.schema import ApiError, internal_error

logger = logging.getLogger(__name__)

Handler = Callable[[Sequence["Job"]], None]


class Job:
    """One request on its way through the worker. `payload` is whatever the handler of its kind understands."""

    def __init__(self, kind: str, payload: Any, timeout_s: float) -> None:
        self.kind, self.payload = kind, payload
        self.timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._deadline = self._loop.time() + timeout_s
        self._abandoned = threading.Event()
        self._finished = False

    # -- the worker's side (its thread) ------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self._abandoned.is_set()

    def step(self, value: Any) -> None:
        """Hand over a part of the result."""
        self._post("step", value)

    def finish(self, value: Any) -> None:
        """Hand over the result; nothing follows."""
        self._finished = True
        self._post("done", value)

    def fail(self, error: ApiError) -> None:
        """End with an error, unless it has ended already."""
        if not self._finished:
            self._finished = True
            self._post("failed", error)

    def _post(self, kind: str, value: Any) -> None:
        # The loop is closed only when the whole replica goes down; then nobody is left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

    # -- the client's side (the event loop) --------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[tuple[str, Any]]:
        """("step", value) any number of times, then ("done", value). Raises ApiError: what the worker failed with,
        or 504 at the deadline. However the caller leaves, the worker learns that nobody waits."""
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


class Worker:
    """Runs handlers (one per kind of job) on batches, in a thread of its own.

    `max_waiting` jobs may wait beside the batch that runs. After the first job of a batch arrives, `window_s` seconds
    pass before it starts, so that requests sent at once run together.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], max_batch: int, max_waiting: int, window_s: float
    ) -> None:
        self._handlers = handlers
        self._max_batch, self._max_waiting, self._window_s = max_batch, max_waiting, window_s
        self._waiting: deque[Job] = deque()
        self._running = 0
        self._changed = threading.Condition()
        self._closed = False
        self._batch_seconds = 1.0  # moving average, for Retry-After
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
                raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
            self._check_room()
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Let the running batch end, answer what waits with 503, stop the thread."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in waiting:
            job.fail(ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5))

    def _check_room(self) -> None:
        if self._running + len(self._waiting) >= self._max_batch + self._max_waiting:
            # Those whose clients left give their places back at once.
            self._waiting = deque(job for job in self._waiting if job.wanted)
        held = self._running + len(self._waiting)
        if held >= self._max_batch + self._max_waiting:
            batches = 1 + len(self._waiting) / self._max_batch
            raise ApiError(
                503,
                f"the server is busy: {held} requests run or wait; try again later",
                code="overloaded",
                retry_after_s=batches * self._batch_seconds,
            )

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            started = time.monotonic()
            try:
                self._handlers[batch[0].kind](batch)
            except Exception:
                # The thread must outlive any request; every waiting client gets the failure, the log the traceback.
                logger.exception("a batch of %d '%s' requests failed", len(batch), batch[0].kind)
                for job in batch:
                    job.fail(internal_error())
            with self._changed:
                self._running = 0
                self._batch_seconds += 0.3 * (time.monotonic() - started - self._batch_seconds)

    def _next_batch(self) -> list[Job] | None:
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return None
                # Waiting releases the lock: more jobs join meanwhile. A full batch has nobody to wait for.
                window_ends = time.monotonic() + self._window_s
                while len(self._waiting) < self._max_batch and not self._closed:
                    left = window_ends - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                batch = self._take()
                if batch:
                    self._running = len(batch)
                    return batch

    def _take(self) -> list[Job]:
        """The oldest wanted job and, in order, those of its kind; others keep their places."""
        wanted = [job for job in self._waiting if job.wanted]
        batch = [job for job in wanted if job.kind == wanted[0].kind][: self._max_batch]
        taken = {id(job) for job in batch}
        self._waiting = deque(job for job in wanted if id(job) not in taken)
        return batch
