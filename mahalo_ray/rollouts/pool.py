"""Jobs made of chunks, on Ray actors: few chunks in flight, finished ones are skipped, lost ones are redone.

A chunk ends as files that its actor writes, the summary last: a chunk with a summary is finished. Nothing but
summaries goes through the driver, and which actor plays a chunk, and when, changes nothing in it.
"""

from __future__ import annotations

import errno
import itertools
import logging
import posixpath
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

import ray
import torch
from pydantic import BaseModel
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from mahalo_ray.config import ActorsConfig, EndpointConfig
from mahalo_ray.data import storage
from mahalo_ray.errors import StageError

IN_FLIGHT_PER_ACTOR = 2  # one playing, one waiting: enough to keep an actor busy
LONGEST_PAUSE_S = 8.0  # before an actor is started in place of one that died while starting
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SUMMARIES = "chunks"
JUDGED_FROM = 50  # attempts before a share of failures says anything

Progress = Callable[[int, int, str], None]


class Chunk(Protocol):
    """A part of a job that one actor does at a time. `name` names its files, `rows` is the work in it."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...


def shard_url(output_url: str, kind: str, name: str) -> str:
    """URL of a chunk's shard of a kind."""
    return storage.join(output_url, kind, f"{name}.parquet")


def summary_url(output_url: str, name: str) -> str:
    """URL of a chunk's summary: written last, so that a chunk that has one is finished."""
    return storage.join(output_url, SUMMARIES, f"{name}.json")


class ChunkWorker(Protocol):
    """What plays chunks, in an actor of its own: an ordinary class made from the job's `spec`."""

    def __init__(self, spec: Any) -> None: ...

    def play(self, chunk: Any) -> ChunkSummary:
        """Write the chunk's shards and then its summary, which is returned."""
        ...


class WorkerActor:
    """The Ray actor around a worker. The worker is made by a call, not with the actor: an error that making
    it raises (a damaged model, for example) comes back as it is, while an error in an actor's constructor
    would only be a death, to be tried again."""

    def __init__(self, worker_class: type[ChunkWorker], spec: Any) -> None:
        self._worker_class, self._spec = worker_class, spec

    def make_worker(self) -> None:
        """Load the models."""
        self._worker = self._worker_class(self._spec)

    def play(self, chunk: Any) -> ChunkSummary:
        """See `ChunkWorker.play`."""
        return self._worker.play(chunk)


class Tally(BaseModel):
    """Counts that add up, field by field."""

    def add(self, other: Tally) -> None:
        """Add the fields that both have."""
        for name in type(self).model_fields:
            if name in type(other).model_fields:
                setattr(self, name, add_counts(getattr(self, name), getattr(other, name)))

    def since(self, before: Self) -> dict[str, Any]:
        """What has been counted since `before`, a copy made then."""
        names = type(self).model_fields
        return {name: add_counts(getattr(self, name), getattr(before, name), -1) for name in names}

    def write(self, url: str) -> None:
        """As JSON."""
        storage.write_json(url, self.model_dump(mode="json"))

    @classmethod
    def read(cls, url: str) -> Self:
        """What `write` wrote."""
        return cls.model_validate(storage.read_json(url))


def add_counts(left: Any, right: Any, sign: int = 1) -> Any:
    """Numbers added, through dictionaries; of texts the last that says something; None (no price) stays
    None."""
    if isinstance(right, Counter):
        total = Counter(left)
        total.update({name: sign * count for name, count in right.items()})
        return +total  # without the zeros
    if isinstance(right, dict):
        values = {name: add_counts((left or {}).get(name), value, sign) for name, value in right.items()}
        return {**(left or {}), **values}
    if isinstance(right, str):
        return right or left
    return None if right is None else (left or 0) + sign * right


class ChunkSummary(Tally):
    """What one chunk came to. `seconds` of the last attempt, by the Ray actor `actor`."""

    seconds: float = 0.0
    actor: str = ""

    @property
    def model_tokens(self) -> int:
        """Tokens that went through models, for the display."""
        return 0


class JobReport(Tally, ABC):
    """What a job came to, summed over its chunks, those of earlier attempts included. `resumed` counts chunks
    found finished; `example`: a failure, in the words of what failed."""

    chunks: int = 0
    resumed: int = 0
    actor_deaths: int = 0
    example: str = ""

    @property
    @abstractmethod
    def done(self) -> int:
        """Rows with a result."""

    @property
    def failures(self) -> Counter[str]:
        """Attempts without a result, by kind."""
        return Counter()

    @property
    def attempts(self) -> int:
        """Attempts in all, in what `failures` counts."""
        return self.done


ChunkT = TypeVar("ChunkT", bound=Chunk)
SummaryT = TypeVar("SummaryT", bound=ChunkSummary)
ReportT = TypeVar("ReportT", bound=JobReport)


@dataclass
class ChunkJob(ABC, Generic[ChunkT, SummaryT, ReportT]):
    """A job: its chunks, the actors that play them, and what it has come to so far.

    `spec` is what every actor is made from. `total` rows are shown as the whole of the work; `progress(done,
    total, note)` is called as chunks come back. The job ends with a RolloutError when more than
    `max_failed_fraction` of the attempts fail.
    """

    output_url: str
    spec: Any
    chunks: Iterable[ChunkT]
    total: int
    cluster: ActorsConfig
    progress: Progress
    report: ReportT
    max_failed_fraction: float = 0.0

    worker_class: ClassVar[type[ChunkWorker]]
    summary_class: ClassVar[type[ChunkSummary]]
    shards: ClassVar[tuple[str, ...]]  # the kinds of files that a finished chunk has
    failures_called: ClassVar[str]  # for messages: "dialogues failed"

    _began: float = field(init=False, default_factory=time.monotonic)
    _tokens: int = field(init=False, default=0)
    _busy: defaultdict[str, float] = field(init=False, default_factory=lambda: defaultdict(float))

    def run(self) -> ReportT:
        """Play what is not finished on `cluster.rollout_actors` Ray actors; ray.init must have been called.

        An actor that dies is replaced and its chunks are played again, at most `cluster.max_failures` times.
        """
        pool = ActorPool(self.worker_class, self.spec, self.cluster, self._unfinished())
        for summary in pool.results():
            self.report.chunks += 1
            self.report.actor_deaths = pool.deaths
            self.report.add(summary)
            self._tokens += summary.model_tokens
            self._busy[summary.actor] += summary.seconds
            self._show(sum(item.chunk.rows for _, item in pool.in_flight.values()))
            self._check_failures(JUDGED_FROM)
        self._check_failures(0)
        return self.report

    @abstractmethod
    def to_repeat(self, chunk: ChunkT, earlier: SummaryT) -> ChunkT | None:
        """What of a finished chunk is played again; None if it stays as it is."""

    def _unfinished(self) -> Iterator[ChunkT]:
        """Chunks to play, one when it is asked for; finished ones are counted."""
        kinds = [*((kind, ".parquet") for kind in self.shards), (SUMMARIES, ".json")]
        names = [
            {posixpath.basename(url).removesuffix(suffix) for url in storage.list_files(folder, suffix)}
            for kind, suffix in kinds
            for folder in [storage.join(self.output_url, kind)]
        ]
        finished = set.intersection(*names)
        for chunk in self.chunks:
            if chunk.name not in finished:
                yield chunk
                continue
            earlier = self.summary_class.read(summary_url(self.output_url, chunk.name))
            again = self.to_repeat(chunk, cast("SummaryT", earlier))
            if again is not None:
                yield again
                continue
            self.report.resumed += 1
            self.report.add(earlier)
            self._show(0)

    def _check_failures(self, judged_from: int) -> None:
        failures, attempts = self.report.failures, self.report.attempts
        failed = sum(failures.values())
        if failed <= self.max_failed_fraction * attempts or attempts < judged_from:
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in failures.most_common())
        raise RolloutError(
            f"{failed} of {attempts} {self.failures_called} ({kinds}), more than the allowed share of "
            f"{self.max_failed_fraction:g}. The others are kept, these are tried again by the same command. "
            f"The last failure: {self.report.example}"
        )

    def _show(self, in_flight: int) -> None:
        elapsed = time.monotonic() - self._began
        parts = [f"{in_flight} in flight"]
        if self._tokens:
            parts.insert(0, f"{self._tokens / elapsed:.0f} tokens/s")
        if self._busy:
            shares = [min(seconds / elapsed, 1.0) for seconds in self._busy.values()]
            parts.append(f"actors {min(shares):.0%} to {max(shares):.0%} busy")
        if failed := sum(self.report.failures.values()):
            parts.append(f"{failed} failed")
        self.progress(self.report.done, self.total, ", ".join(parts))


class RolloutError(StageError):
    """A job on actors could not finish; finished chunks are kept and are skipped next time."""


@dataclass
class InFlightChunk(Generic[ChunkT]):
    """A chunk on its way, and how many actors died while they played it."""

    chunk: ChunkT
    deaths: int = 0


@dataclass
class ActorPool(Generic[ChunkT]):
    """Actors of one class, and which chunk each reference in flight stands for.

    Every actor has a worker made from `spec`. Playing a chunk again must write the same. `waiting` is read
    one by one, never more than IN_FLIGHT_PER_ACTOR chunks per actor ahead of what is finished. An actor gets
    chunks when its worker is made: where a lost node leaves no room for a new actor, the others do its work.
    """

    worker_class: type[ChunkWorker]
    spec: Any
    cluster: ActorsConfig
    waiting: Iterable[ChunkT]
    deaths: int = 0
    in_flight: dict[Any, tuple[ActorHandle, InFlightChunk[ChunkT]]] = field(default_factory=dict)
    _starting: dict[Any, ActorHandle] = field(default_factory=dict)
    _started: set[ActorHandle] = field(default_factory=set)
    _queue: deque[InFlightChunk[ChunkT]] = field(default_factory=deque)  # handed out before what waits
    _failed_starts: int = 0

    def results(self) -> Iterator[Any]:
        """Summaries as chunks finish.

        An actor that dies is replaced and its chunks are played again. RolloutError when more than
        `cluster.max_failures` actors died with the same chunk, or while starting one after the other, and
        when an actor's disk is full. A ValueError or StageError of an actor is raised as it is.
        """
        ahead = iter(self.waiting)
        self._queue.extend(map(InFlightChunk, itertools.islice(ahead, self.cluster.rollout_actors)))
        try:
            for _ in range(len(self._queue)):
                self._start_actor()
            while self.in_flight or self._queue:
                (reference, *_), _ = ray.wait([*self.in_flight, *self._starting], num_returns=1)
                actor, played = self.in_flight.pop(reference, None) or (self._starting.pop(reference), None)
                try:
                    summary = ray.get(reference)
                except RayActorError as death:
                    self._on_actor_death(actor, played, death)
                    if played is None:  # what ended one start at once would end the next ones too
                        time.sleep(min(2.0 ** (self._failed_starts - 1), LONGEST_PAUSE_S))
                    self._start_actor()
                    for other in self._started:
                        self._hand_out(other, ahead)
                    continue
                except RayTaskError as error:
                    explained = _explain(error)
                    if explained is error:
                        raise
                    raise explained from error
                if played is None:
                    self._started.add(actor)
                    self._failed_starts = 0
                else:
                    yield summary
                self._hand_out(actor, ahead)
        finally:
            for actor in [*self._started, *self._starting.values()]:
                ray.kill(actor)

    def _start_actor(self) -> None:
        cluster = self.cluster
        # The worker's name for the actor's process, which is what `ps` and Ray's tools show.
        named = type(self.worker_class.__name__, (WorkerActor,), {})
        actor = (
            ray.remote(named)
            .options(num_cpus=cluster.cpus_per_rollout_actor, num_gpus=1 if cluster.use_gpu else 0)
            .remote(self.worker_class, self.spec)
        )
        self._starting[actor.make_worker.remote()] = actor

    def _hand_out(self, actor: ActorHandle, ahead: Iterator[ChunkT]) -> None:
        """Give an actor what it may have in flight: while others start, only what it plays itself."""
        limit = 1 if self._starting else IN_FLIGHT_PER_ACTOR
        has = sum(owner == actor for owner, _ in self.in_flight.values())
        for _ in range(limit - has):
            item = self._queue.popleft() if self._queue else next(map(InFlightChunk, ahead), None)
            if item is None:
                return
            self.in_flight[actor.play.remote(item.chunk)] = (actor, item)

    def _on_actor_death(
        self, dead: ActorHandle, played: InFlightChunk[ChunkT] | None, death: RayActorError
    ) -> None:
        """Take back what a dead actor had; it was playing `played` (None: it was starting)."""
        self.deaths += 1
        self._started.discard(dead)
        if played is None:
            self._failed_starts += 1
        else:
            played.deaths += 1
            self._queue.append(played)
        for reference in [r for r, (actor, _) in self.in_flight.items() if actor == dead]:
            self._queue.append(self.in_flight.pop(reference)[1])
        failures = self._failed_starts if played is None else played.deaths
        if failures > self.cluster.max_failures:
            doing = "while starting" if played is None else "with the same chunk"
            raise RolloutError(
                f"{failures} actors died {doing} (cluster.max_failures is {self.cluster.max_failures}); "
                f"finished chunks are kept. Last death: {death}"
            ) from death


def _explain(error: RayTaskError) -> Exception:
    """What went wrong in an actor, as the user should hear it: without the actor's traceback where it says
    enough."""
    cause = error.cause
    if isinstance(cause, OSError) and cause.errno in DISK_FULL:
        return RolloutError(
            f"an actor cannot write: {cause.strerror}. Finished chunks are kept: make room and run the same "
            "command again"
        )
    return cause if isinstance(cause, ValueError | StageError) else error


def start_worker(threads: int) -> str:
    """What every worker does first: as many threads as it has CPUs, quiet libraries; returns its actor's
    id."""
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return (ray.get_runtime_context().get_actor_id() or "") if ray.is_initialized() else ""


def share_limits(config: EndpointConfig, actors: int) -> EndpointConfig:
    """One actor's part of what an endpoint may be asked by all; ValueError if there is not enough for all."""
    limits = {"concurrency": config.concurrency}
    if config.requests_per_minute is not None:
        limits["requests_per_minute"] = config.requests_per_minute
    for name, value in limits.items():
        if value < actors:
            raise ValueError(
                f"'endpoint.{name}' is {value} for {actors} actors: raise it, or lower "
                "'cluster.rollout_actors'"
            )
    return config.model_copy(update={name: value // actors for name, value in limits.items()})
