"""Ray actors that play chunks: few in flight at a time, and whatever dies is redone."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from mahalo_ray.config import ClusterConfig
from mahalo_ray.errors import StageError

IN_FLIGHT_PER_ACTOR = 2  # one playing, one waiting: enough to keep an actor busy

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ChunkT = TypeVar("ChunkT")


class RolloutError(StageError):
    """A job on actors could not finish; finished chunks are kept and are skipped next time."""


@dataclass
class ActorPool(Generic[ChunkT]):
    """Actors of one class, and which chunk each reference in flight stands for.

    `actor_class` is a `ray.remote` class made from `spec`, whose `play(chunk)` writes what the chunk comes to
    and returns a summary. Playing a chunk again must write the same. `waiting` is read one by one, never more
    than IN_FLIGHT_PER_ACTOR chunks per actor ahead of what is finished.
    """

    actor_class: Any
    spec: Any
    cluster: ClusterConfig
    waiting: Iterable[ChunkT]
    deaths: int = 0
    flying: dict[Any, tuple[ActorHandle, ChunkT]] = field(default_factory=dict)
    _lost: deque[ChunkT] = field(default_factory=deque)  # to be played again, before those that wait
    _alive: set[ActorHandle] = field(default_factory=set)

    def results(self) -> Iterator[Any]:
        """Summaries as chunks finish.

        An actor that dies is replaced and its chunks are played again; RolloutError after more than
        `cluster.max_failures` deaths, and when an actor's disk is full.
        """
        ahead = iter(self.waiting)
        try:
            for _ in range(self.cluster.rollout_actors):
                if (chunk := self._next(ahead)) is None:
                    break
                self._hand_out(self._start(), chunk)
            for actor in list(self._alive) * (IN_FLIGHT_PER_ACTOR - 1):
                self._hand_out(actor, self._next(ahead))
            while self.flying:
                (reference, *_), _ = ray.wait(list(self.flying), num_returns=1)
                actor, chunk = self.flying.pop(reference)
                try:
                    summary = ray.get(reference)
                except RayActorError as death:
                    self._bury(actor, chunk, death)
                    replacement = self._start()
                    for _ in range(IN_FLIGHT_PER_ACTOR):
                        self._hand_out(replacement, self._next(ahead))
                    continue
                except RayTaskError as error:
                    raise _explained(error) from error
                yield summary
                self._hand_out(actor, self._next(ahead))
        finally:
            for actor in self._alive:
                ray.kill(actor)

    def _next(self, ahead: Iterator[ChunkT]) -> ChunkT | None:
        return self._lost.popleft() if self._lost else next(ahead, None)

    def _start(self) -> ActorHandle:
        cluster = self.cluster
        actor = self.actor_class.options(
            num_cpus=cluster.cpus_per_rollout_actor, num_gpus=1 if cluster.use_gpu else 0
        ).remote(self.spec)
        self._alive.add(actor)
        return actor

    def _hand_out(self, actor: ActorHandle, chunk: ChunkT | None) -> None:
        if chunk is not None:
            self.flying[actor.play.remote(chunk)] = (actor, chunk)

    def _bury(self, dead: ActorHandle, chunk: ChunkT, death: RayActorError) -> None:
        """Take back what a dead actor had."""
        self._alive.discard(dead)
        self._lost.append(chunk)
        for reference in [r for r, (actor, _) in self.flying.items() if actor == dead]:
            self._lost.append(self.flying.pop(reference)[1])
        self.deaths += 1
        if self.deaths > self.cluster.max_failures:
            raise RolloutError(
                f"{self.deaths} rollout actors died (cluster.max_failures is {self.cluster.max_failures}); "
                f"finished chunks are kept. Last death: {death}"
            ) from death


def _explained(error: RayTaskError) -> Exception:
    """What went wrong in an actor, as the user should hear it."""
    cause = error.cause
    if isinstance(cause, OSError) and cause.errno in DISK_FULL:
        return RolloutError(
            f"an actor cannot write: {cause.strerror} ({cause.filename}). Finished chunks are kept: make "
            "room and run the same command again"
        )
    return error
