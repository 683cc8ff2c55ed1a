"""The driver of a rollout stage: chunks out to actors, few in flight at a time, whatever dies is redone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from mahalo_ray.config import ClusterConfig
from mahalo_ray.data import storage
from mahalo_ray.errors import StageError
from mahalo_ray.rollouts.actors import DIALOGUES, Chunk, ChunkSummary, RolloutActor, RolloutSpec

IN_FLIGHT_PER_ACTOR = 2  # one playing, one waiting: enough to keep an actor busy


class RolloutError(StageError):
    """A rollout stage could not finish; finished chunks are kept and are skipped next time."""


@dataclass
class RolloutReport:
    """What a stage came to, summed over its chunks; `resumed` chunks were found finished."""

    chunks: int = 0
    resumed: int = 0
    dialogues: int = 0
    candidates: int = 0
    tokens: int = 0
    malformed_turns: int = 0
    tutor_turns: int = 0
    actor_deaths: int = 0

    def add(self, summary: ChunkSummary) -> None:
        self.chunks += 1
        for name in ("dialogues", "candidates", "tokens", "malformed_turns", "tutor_turns"):
            setattr(self, name, getattr(self, name) + getattr(summary, name))

    def metrics(self) -> dict[str, Any]:
        """As plain numbers, for the stage's manifest."""
        return asdict(self)


def chunks_of(first_seed: int, dialogues: int, size: int) -> list[Chunk]:
    """`dialogues` consecutive seeds in chunks of `size`: the same chunks whatever the cluster."""
    seeds = range(first_seed, first_seed + dialogues)
    return [
        Chunk(number, tuple(seeds[at : at + size])) for number, at in enumerate(range(0, dialogues, size))
    ]


def run_rollouts(
    spec: RolloutSpec,
    chunks: list[Chunk],
    cluster: ClusterConfig,
    progress: Callable[[int, int], None],
) -> RolloutReport:
    """Play all chunks on `cluster.rollout_actors` Ray actors; ray.init must have been called.

    Chunks whose shards exist are skipped. An actor that dies is replaced and its chunks are played again, at
    most `cluster.max_failures` times. `progress(done, total)` counts dialogues.
    """
    report = RolloutReport()
    done = set(storage.list_files(storage.join(spec.output_url, DIALOGUES), ".parquet"))
    waiting = deque(chunk for chunk in chunks if chunk.shard(spec.output_url, DIALOGUES) not in done)
    report.resumed = len(chunks) - len(waiting)
    total = sum(len(chunk.seeds) for chunk in chunks)
    finished = total - sum(len(chunk.seeds) for chunk in waiting)
    progress(finished, total)
    for summary in _Pool(spec, cluster, waiting, report).results():
        report.add(summary)
        finished += summary.dialogues
        progress(finished, total)
    return report


@dataclass
class _Pool:
    """The actors, and which chunk each reference in flight stands for."""

    spec: RolloutSpec
    cluster: ClusterConfig
    waiting: deque[Chunk]
    report: RolloutReport
    flying: dict[Any, tuple[ActorHandle, Chunk]] = field(default_factory=dict)

    def results(self) -> Iterator[ChunkSummary]:
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
        return RolloutActor.options(
            num_cpus=cluster.cpus_per_rollout_actor, num_gpus=1 if cluster.use_gpu else 0
        ).remote(self.spec)

    def _hand_out(self, actor: ActorHandle) -> None:
        if self.waiting:
            chunk = self.waiting.popleft()
            self.flying[actor.play.remote(chunk)] = (actor, chunk)

    def _replace(self, dead: ActorHandle, chunk: Chunk, death: RayActorError) -> None:
        lost = [chunk]
        for reference in [r for r, (actor, _) in self.flying.items() if actor == dead]:
            lost.append(self.flying.pop(reference)[1])
        self.report.actor_deaths += 1
        if self.report.actor_deaths > self.cluster.max_failures:
            raise RolloutError(
                f"{self.report.actor_deaths} rollout actors died (cluster.max_failures is "
                f"{self.cluster.max_failures}); finished chunks are kept. Last death: {death}"
            ) from death
        self.waiting.extendleft(reversed(lost))
        replacement = self._start()
        for _ in range(IN_FLIGHT_PER_ACTOR):
            self._hand_out(replacement)
