"""Ray actors that play chunks: few in flight at a time, and whatever dies is redone."""

from __future__ import annotations

import errno
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from mahalo_ray.config import ActorsConfig
from mahalo_ray.errors import StageError

IN_FLIGHT_PER_ACTOR = 2  # one playing, one waiting: enough to keep an actor busy
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ChunkT = TypeVar("ChunkT")


class RolloutError(StageError):
    """A job on actors could not finish; finished chunks are kept and are skipped next time."""


@dataclass
class Piece(Generic[ChunkT]):
    """A chunk on its way, and how many actors died while they played it."""

    chunk: ChunkT
    deaths: int = 0


@dataclass
class ActorPool(Generic[ChunkT]):
    """Actors of one class, and which chunk each reference in flight stands for.

    `actor_class` is a `ray.remote` class made from `spec`, whose `play(chunk)` writes what the chunk comes to
    and returns a summary. Playing a chunk again must write the same. `waiting` is read one by one, never more
    than IN_FLIGHT_PER_ACTOR chunks per actor ahead of what is finished. An actor gets chunks when it has
    started: where a lost node leaves no room for a new actor, the others do its work.
    """

    actor_class: Any
    spec: Any
    cluster: ActorsConfig
    waiting: Iterable[ChunkT]
    deaths: int = 0
    flying: dict[Any, tuple[ActorHandle, Piece[ChunkT]]] = field(default_factory=dict)
    _starting: dict[Any, ActorHandle] = field(default_factory=dict)
    _started: set[ActorHandle] = field(default_factory=set)
    _queue: deque[Piece[ChunkT]] = field(default_factory=deque)  # handed out before what waits
    _failed_starts: int = 0

    def results(self) -> Iterator[Any]:
        """Summaries as chunks finish.

        An actor that dies is replaced and its chunks are played again. RolloutError when more than
        `cluster.max_failures` actors died with the same chunk, or while starting one after the other, and
        when an actor's disk is full.
        """
        ahead = iter(self.waiting)
        self._queue.extend(map(Piece, itertools.islice(ahead, self.cluster.rollout_actors)))
        try:
            for _ in range(len(self._queue)):
                self._start()
            while self.flying or self._queue:
                (reference, *_), _ = ray.wait([*self.flying, *self._starting], num_returns=1)
                actor, piece = self.flying.pop(reference, None) or (self._starting.pop(reference), None)
                try:
                    summary = ray.get(reference)
                except RayActorError as death:
                    self._bury(actor, piece, death)
                    self._start()
                    for other in self._started:
                        self._fill(other, ahead)
                    continue
                except RayTaskError as error:
                    raise _explained(error) from error
                if piece is None:
                    self._started.add(actor)
                    self._failed_starts = 0
                else:
                    yield summary
                self._fill(actor, ahead)
        finally:
            for actor in [*self._started, *self._starting.values()]:
                ray.kill(actor)

    def _start(self) -> None:
        cluster = self.cluster
        actor = self.actor_class.options(
            num_cpus=cluster.cpus_per_rollout_actor, num_gpus=1 if cluster.use_gpu else 0
        ).remote(self.spec)
        self._starting[actor.__ray_ready__.remote()] = actor

    def _fill(self, actor: ActorHandle, ahead: Iterator[ChunkT]) -> None:
        """Give an actor what it may have in flight: while others start, only what it plays itself."""
        limit = 1 if self._starting else IN_FLIGHT_PER_ACTOR
        mine = sum(owner == actor for owner, _ in self.flying.values())
        for _ in range(limit - mine):
            piece = self._queue.popleft() if self._queue else next(map(Piece, ahead), None)
            if piece is None:
                return
            self.flying[actor.play.remote(piece.chunk)] = (actor, piece)

    def _bury(self, dead: ActorHandle, piece: Piece[ChunkT] | None, death: RayActorError) -> None:
        """Take back what a dead actor had; it was playing `piece` (None: it was starting)."""
        self.deaths += 1
        self._started.discard(dead)
        if piece is None:
            self._failed_starts += 1
        else:
            piece.deaths += 1
            self._queue.append(piece)
        for reference in [r for r, (actor, _) in self.flying.items() if actor == dead]:
            self._queue.append(self.flying.pop(reference)[1])
        failures = self._failed_starts if piece is None else piece.deaths
        if failures > self.cluster.max_failures:
            doing = "while starting" if piece is None else "with the same chunk"
            raise RolloutError(
                f"{failures} actors died {doing} (cluster.max_failures is {self.cluster.max_failures}); "
                f"finished chunks are kept. Last death: {death}"
            ) from death


def _explained(error: RayTaskError) -> Exception:
    """What went wrong in an actor, as the user should hear it."""
    cause = error.cause
    if isinstance(cause, OSError) and cause.errno in DISK_FULL:
        return RolloutError(
            f"an actor cannot write: {cause.strerror}. Finished chunks are kept: make room and run the same "
            "command again"
        )
    return error
