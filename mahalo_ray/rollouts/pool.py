"""Ray actors that play chunks: few in flight at a time, and whatever dies is redone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from mahalo_ray.config import ClusterConfig
from mahalo_ray.errors import StageError

IN_FLIGHT_PER_ACTOR = 2  # one playing, one waiting: enough to keep an actor busy

ChunkT = TypeVar("ChunkT")


class RolloutError(StageError):
    """A job on actors could not finish; finished chunks are kept and are skipped next time."""


@dataclass
class ActorPool(Generic[ChunkT]):
    """Actors of one class, and which chunk each reference in flight stands for.

    `actor_class` is a `ray.remote` class made from `spec`, whose `play(chunk)` writes what the chunk comes to
    and returns a summary. Playing a chunk again must write the same.
    """

    actor_class: Any
    spec: Any
    cluster: ClusterConfig
    waiting: deque[ChunkT]
    deaths: int = 0
    flying: dict[Any, tuple[ActorHandle, ChunkT]] = field(default_factory=dict)

    def results(self) -> Iterator[Any]:
        """Summaries as chunks finish.

        An actor that dies is replaced and its chunks are played again; RolloutError after more than
        `cluster.max_failures` deaths.
        """
        actors = [self._start() for _ in range(min(self.cluster.rollout_actors, len(self.waiting)))]
        try:
            for actor in actors * IN_FLIGHT_PER_ACTOR:
                self._hand_out(actor)
            while self.flying:
                (reference, *_), _ = ray.wait(list(self.flying), num_returns=1)
                actor, chunk = self.flying.pop(reference)
                try:
                    summary = ray.get(reference)
                except RayActorError as death:
                    self._replace(actor, chunk, death)
                    continue
                yield summary
                self._hand_out(actor)
        finally:
            for actor in {actor for actor, _ in self.flying.values()} | set(actors):
                ray.kill(actor)

    def _start(self) -> ActorHandle:
        cluster = self.cluster
        return self.actor_class.options(
            num_cpus=cluster.cpus_per_rollout_actor, num_gpus=1 if cluster.use_gpu else 0
        ).remote(self.spec)

    def _hand_out(self, actor: ActorHandle) -> None:
        if self.waiting:
            chunk = self.waiting.popleft()
            self.flying[actor.play.remote(chunk)] = (actor, chunk)

    def _replace(self, dead: ActorHandle, chunk: ChunkT, death: RayActorError) -> None:
        lost = [chunk]
        for reference in [r for r, (actor, _) in self.flying.items() if actor == dead]:
            lost.append(self.flying.pop(reference)[1])
        self.deaths += 1
        if self.deaths > self.cluster.max_failures:
            raise RolloutError(
                f"{self.deaths} rollout actors died (cluster.max_failures is {self.cluster.max_failures}); "
                f"finished chunks are kept. Last death: {death}"
            ) from death
        self.waiting.extendleft(reversed(lost))
        replacement = self._start()
        for _ in range(IN_FLIGHT_PER_ACTOR):
            self._hand_out(replacement)
