"""One thread owns the models; requests join the running batch while it runs; what waits is bounded.

The asyncio side submits jobs and awaits their events. The thread admits up to `max_active` jobs at a time and
advances all of them together, a few tokens at a time. A job nobody waits for any more (client gone, deadline
passed) turns `wanted` False: it is dropped before it starts, or taken out after those tokens.

An exception out of a batch does not say whose it is. The engine is then tried with a request of its own; if
that works, the jobs of the batch are answered again one at a time, so that only the one that fails alone gets
the error; if it does not, the worker is broken for good and says so.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from mahalo_ray.serving.schema import ApiError, Overloaded, internal_error

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 10  # of jobs alone: more, and no answer between them, is no job's fault
STALLED_S = 300.0  # one call into the engine is a few tokens


class Job:
    """One request on its way through the worker; `payload` is for the engine.

    `streams`: the client takes the result in parts; otherwise parts are not handed over. `is_long`: its texts
    are encoded before it joins, in another thread, since that would hold up the others; `prepared` is what
    came of it.
    """

    def __init__(self, payload: Any, timeout_s: float, streams: bool = False, is_long: bool = False) -> None:
        self.payload = payload
        self.is_long = is_long
        self.prepared: Any = None
        self.timeout_s = timeout_s
        self.streams = streams
        self.arrived_at = time.monotonic()
        self.admitted_at = 0.0
        self.steps_at: list[float] = []  # when the engine decided each
        self.finished = self.failed = False
        self._parts: list[Any] = []  # handed over
        self._repeated = 0  # of them, how many the engine has made again after a restart
        self._begun = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._deadline = self._loop.time() + timeout_s
        self._abandoned = threading.Event()

    # -- the worker's side (its thread) ----------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self._abandoned.is_set()

    def begin(self, value: Any) -> None:
        """Say that the engine has taken it."""
        if self.streams and not self._begun:
            self._post("begun", value)
        self._begun = True

    def step(self, part: Any) -> None:
        """Hand over a part of the result. After a restart, parts that the client has are passed over; a
        RuntimeError if they are not the same again."""
        self.steps_at.append(time.monotonic())
        if not self.streams:
            return
        if self._repeated < len(self._parts):
            if part != self._parts[self._repeated]:
                raise RuntimeError("an answer that was begun again after an error came out differently")
        else:
            self._parts.append(part)
            self._post("step", part)
        self._repeated += 1

    def restart(self) -> None:
        """The engine begins the job again."""
        self._repeated = 0
        self.steps_at.clear()

    def finish(self, value: Any) -> None:
        """Hand over the result; nothing follows."""
        self.finished = True
        self._post("done", value)

    def fail(self, error: ApiError) -> None:
        """End with an error, unless it has ended already."""
        if not self.finished:
            self.finished = self.failed = True
            self._post("failed", error)

    def _post(self, kind: str, value: Any) -> None:
        # The loop is closed only when the whole replica goes down; then nobody is left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

    # -- the client's side (the event loop) ------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[list[tuple[str, Any]]]:
        """What has happened since the last time, as soon as anything has: ("begun", value) where the client
        takes parts, ("step", value) any number of times, then ("done", value). Raises ApiError: what the
        worker failed with, or 504 at the deadline. However the caller leaves, the worker learns that nobody
        waits."""
        try:
            while True:
                happened = [await self._next_event()]
                while not self._events.empty():
                    happened.append(self._events.get_nowait())
                kind, value = happened[-1]  # nothing follows an end
                if kind == "failed":
                    happened.pop()
                if happened:
                    yield happened
                if kind == "failed":
                    raise value
                if kind == "done":
                    return
        finally:
            self._abandoned.set()

    async def _next_event(self) -> tuple[str, Any]:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._events.get()
        except TimeoutError:
            message = f"the answer took longer than this server's limit of {self.timeout_s:g} s"
            raise ApiError(504, message, code="timeout") from None

    async def result(self) -> Any:
        """The final value."""
        async for happened in self.events():
            kind, value = happened[-1]
            if kind == "done":
                return value
        raise AssertionError("events end with 'done' or an exception")


class JobRunner(Protocol):
    """What the thread drives. A job ends by `finish` or `fail`."""

    def prepare(self, job: Job) -> None:
        """Do what needs no batch, in another thread than the rest: encode a long text. What is wrong with it
        fails the job."""
        ...

    def admit(self, jobs: Sequence[Job]) -> None:
        """Take new jobs in. Those that cannot be done fail here, alone."""
        ...

    def advance(self) -> None:
        """A few tokens of everything admitted and still wanted."""
        ...

    def reset(self) -> None:
        """Forget everything admitted, after an exception left its state unknown."""
        ...

    def probe(self) -> None:
        """Answer a small request of its own. Any exception says that the models do not work."""
        ...


class ModelThread:
    """Drives an engine in a thread of its own.

    Beside `max_active` jobs that run, `max_waiting` may wait; a request that is being parsed holds a waiting
    place too. When nothing runs, `window_s` seconds pass between the arrival of a job and its
    start, so that requests sent at once start together. `give_up` is called once the engine can answer
    nothing any more, before anybody is told: a replica that ends there has its requests answered by another.
    """

    def __init__(
        self,
        engine: JobRunner,
        max_active: int,
        max_waiting: int,
        window_s: float,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self._engine, self._give_up = engine, give_up
        self._max_active, self._max_waiting, self._window_s = max_active, max_waiting, window_s
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._suspects: deque[Job] = deque()  # of a batch that failed: each is answered again alone
        self._preparing: list[Job] = []
        self._left_in_engine = False  # a job whose client left: the engine takes it out when it advances
        self._reserved = 0
        self._changed = threading.Condition()
        self._closed = self._draining = self._broken = False
        self._failures = 0  # since the last job that was answered
        self._call_began: float | None = None  # into the engine
        self._job_seconds = 1.0  # moving average, for Retry-After
        # One thread for all long texts: they wait for each other, and short ones for none of them.
        self._preparer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mahalo-prepare")
        self._thread = threading.Thread(target=self._run, name="mahalo-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def trouble(self) -> str | None:
        """Why no job can be answered here any more, None while they can."""
        if self._broken:
            return "the models do not work any more"
        if not self.alive and not self._closed:
            return "the model's thread has ended"
        began = self._call_began
        if began is not None and time.monotonic() - began > STALLED_S:
            return f"the model's thread has been busy with a few tokens for more than {STALLED_S:g} s"
        return None

    @property
    def num_held(self) -> int:
        """Places in use: jobs that run or wait, and requests that are being parsed."""
        with self._changed:
            return self._count_held()

    def count_running_and_waiting(self) -> tuple[int, int]:
        """Jobs that run, and places held by what waits or is being parsed."""
        with self._changed:
            held, running = self._count_held(), len(self._active)
            return running, held - running

    def check_room(self) -> None:
        """Raise ApiError 503 with Retry-After when a request sent now would not be taken."""
        with self._changed:
            self._check_room()

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Hold a place while a request is parsed; ApiError 503 when there is none."""
        with self._changed:
            self._check_room()
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError 503 when full, shutting down or broken."""
        with self._changed:
            self._check_room()
            if job.is_long:
                self._preparing.append(job)
                self._preparer.submit(self._prepare, job)
            else:
                self._waiting.append(job)
                self._changed.notify()

    def _prepare(self, job: Job) -> None:
        """In the preparer's thread."""
        if job.wanted and not job.finished:
            self._engine.prepare(job)
        with self._changed:
            self._preparing.remove(job)
            if not job.finished and self._broken:
                job.fail(_broken_error())
            elif not job.finished:
                self._waiting.append(job)
                self._changed.notify()

    def drain(self) -> None:
        """Take no more jobs; those that run or wait are answered."""
        self._draining = True

    def close(self) -> None:
        """Answer everything unfinished with 503 and stop the thread after what it is at."""
        with self._changed:
            self._closed = True
            unfinished = [*self._active, *self._suspects, *self._waiting, *self._preparing]
            self._waiting.clear()
            self._suspects.clear()
            self._changed.notify()
        for job in unfinished:
            job.fail(_shutting_down())
        self._preparer.shutdown(wait=False, cancel_futures=True)

    def _count_held(self) -> int:
        # Those whose clients left give their waiting places back at once.
        self._waiting = deque(job for job in self._waiting if job.wanted)
        held = (self._active, self._suspects, self._waiting, self._preparing)
        return sum(map(len, held)) + self._reserved

    def _check_room(self) -> None:
        if self._closed or self._draining:
            raise _shutting_down()
        if self.trouble is not None:
            raise ApiError(503, f"{self.trouble}; it is being replaced", code="unhealthy", retry_after_s=10)
        held = self._count_held()
        if held >= self._max_active + self._max_waiting:
            rounds = 1 + (held - len(self._active)) / self._max_active
            raise Overloaded(
                f"the server is busy: {held} requests run or wait; try again later",
                retry_after_s=rounds * self._job_seconds,
                pace_s=self._job_seconds / self._max_active,
            )

    def _run(self) -> None:
        while (joining := self._next()) is not None:
            self._call_began = time.monotonic()
            try:
                self._engine.admit(joining)
                self._engine.advance()
            except Exception:
                # The thread must outlive any request: the log says what happened.
                reference = secrets.token_hex(4)
                logger.exception("error %s: a batch of %d requests failed", reference, len(self._active))
                self._recover(reference)
            self._call_began = None
            self._sort_out()

    def _recover(self, reference: str) -> None:
        """After an exception out of the engine: who is answered again, and who gets the error."""
        unfinished = [job for job in self._active if not job.finished and job.wanted]
        is_alone = len(unfinished) == 1
        self._failures += is_alone
        try:
            self._engine.reset()
            self._engine.probe()
        except Exception:
            logger.exception("error %s: the models do not work any more", reference)
            self._broken = True
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            logger.error("error %s: %d requests failed, and none was answered", reference, self._failures)
            self._broken = True
        if self._broken and self._give_up is not None:
            self._give_up()
        if is_alone:
            unfinished[0].fail(internal_error(reference))
        with self._changed:
            if self._broken:
                unfinished += [*self._suspects, *self._waiting]
                self._waiting.clear()
                self._suspects.clear()
                for job in unfinished:
                    job.fail(internal_error(reference))
            elif len(unfinished) > 1:
                self._suspects.extend(unfinished)
            self._active = [job for job in self._active if job.finished]

    def _sort_out(self) -> None:
        """Finished and abandoned jobs leave. (The engine takes those out itself when it advances.)"""
        now = time.monotonic()
        with self._changed:
            self._left_in_engine = False
            for job in self._active:
                if job.finished and not job.failed:
                    self._failures = 0
                    self._job_seconds += 0.2 * (now - job.admitted_at - self._job_seconds)
                elif not job.finished and not job.wanted:
                    self._left_in_engine = True
            self._active = [job for job in self._active if not job.finished and job.wanted]

    def _next(self) -> list[Job] | None:
        """Jobs that join now, perhaps none while others run or are left; None when closed or broken."""
        with self._changed:
            if self._left_in_engine and not (self._waiting or self._active or self._suspects):
                return []
            while not (self._waiting or self._active or self._suspects or self._closed or self._broken):
                self._changed.wait()
            if not self._active and not self._suspects:
                self._wait_for_company()
            if self._closed or self._broken:
                return None
            joining = self._suspect_alone() if self._suspects else self._those_with_room()
            for job in joining:
                job.admitted_at = time.monotonic()
            self._active += joining
            return joining

    def _suspect_alone(self) -> list[Job]:
        """The next job of a batch that failed, once the one before it has been answered."""
        while self._suspects and not self._active:
            job = self._suspects.popleft()
            if job.wanted:
                job.restart()
                return [job]
        return []

    def _those_with_room(self) -> list[Job]:
        wanted = [job for job in self._waiting if job.wanted]
        room = self._max_active - len(self._active)
        self._waiting = deque(wanted[room:])
        return wanted[:room]

    def _wait_for_company(self) -> None:
        # Waiting releases the lock: more jobs join meanwhile. A full batch has nobody to wait for.
        window_ends = time.monotonic() + self._window_s
        while len(self._waiting) < self._max_active and not self._closed:
            left = window_ends - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return


def _broken_error() -> ApiError:
    message = "the models do not work any more; they are being replaced"
    return ApiError(503, message, code="unhealthy", retry_after_s=10)


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
