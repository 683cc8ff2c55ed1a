"""The driver of a rollout stage: chunks of dialogues out to a pool of actors, and what they came to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mahalo_ray.config import ClusterConfig
from mahalo_ray.data import storage
from mahalo_ray.rollouts.actors import DIALOGUES, Chunk, ChunkSummary, RolloutActor, RolloutSpec
from mahalo_ray.rollouts.pool import ActorPool


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
    pool = ActorPool(RolloutActor, spec, cluster, waiting)
    for summary in pool.results():
        report.add(summary)
        report.actor_deaths = pool.deaths
        finished += summary.dialogues
        progress(finished, total)
    return report
