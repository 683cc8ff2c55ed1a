"""The driver of a rollout stage: chunks of dialogues out to a pool of actors, and what they came to.

Its memory does not grow with the number of dialogues: chunks are made when an actor can take them, and what
they came to is added up.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mahalo_ray.config import ActorsConfig
from mahalo_ray.data import storage
from mahalo_ray.rollouts.actors import Chunk, ChunkSummary, Counts, RolloutActor
from mahalo_ray.rollouts.parties import RolloutSpec
from mahalo_ray.rollouts.pool import ActorPool, RolloutError

JUDGED_FROM = 50  # dialogues played before a share of failures says anything

Progress = Callable[[int, int, str], None]


@dataclass(kw_only=True)
class RolloutReport(Counts):
    """What a stage came to, summed over its chunks, those of earlier attempts included; `resumed` counts
    chunks found finished. `failed`: dialogues without a result, by kind."""

    chunks: int = 0
    resumed: int = 0
    actor_deaths: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    example: str = ""  # of a failure, in the endpoint's words

    def add(self, summary: ChunkSummary) -> None:
        """Another chunk's final summary."""
        for name, total in self.plus(summary).items():
            setattr(self, name, total)
        for kind, message in summary.failed.values():
            self.failed[kind] += 1
            self.example = f"{kind}: {message}"


@dataclass(frozen=True)
class DialogueChunks:
    """`dialogues` consecutive numbers in chunks of `size`: the same chunks whatever the cluster."""

    first: int
    dialogues: int
    size: int

    def __len__(self) -> int:
        return -(-self.dialogues // self.size)

    def __iter__(self) -> Iterator[Chunk]:
        end = self.first + self.dialogues
        for number in range(len(self)):
            at = self.first + number * self.size
            yield Chunk(number, tuple(range(at, min(at + self.size, end))))


def run_rollouts(
    spec: RolloutSpec,
    chunks: DialogueChunks,
    cluster: ActorsConfig,
    progress: Progress,
    max_failed_fraction: float = 0.0,
    actor_class: Any = RolloutActor,
) -> RolloutReport:
    """Play all chunks on `cluster.rollout_actors` Ray actors; ray.init must have been called.

    Finished chunks are skipped, their failed dialogues played again. An actor that dies is replaced and its
    chunks are played again, at most `cluster.max_failures` times. RolloutError when more than
    `max_failed_fraction` of the dialogues played have failed. `progress(done, total, note)` counts dialogues.
    """
    run = _Run(spec, chunks, progress)
    spec = replace(spec, actors=min(cluster.rollout_actors, len(chunks)))
    pool = ActorPool(actor_class, spec, cluster, run.unfinished())
    for summary in pool.results():
        run.report.actor_deaths = pool.deaths
        run.finished(summary, sum(_size(piece.chunk) for _, piece in pool.flying.values()))
        run.check_failures(max_failed_fraction)
    run.check_failures(max_failed_fraction, at_the_end=True)
    return run.report


class _Run:
    """What is known while chunks come back."""

    def __init__(self, spec: RolloutSpec, chunks: DialogueChunks, progress: Progress) -> None:
        self.spec, self.chunks, self.progress = spec, chunks, progress
        self.report = RolloutReport()
        self.began = time.monotonic()
        self.tokens = 0
        self.busy: defaultdict[str, float] = defaultdict(float)  # actor -> seconds of playing

    def unfinished(self) -> Iterator[Chunk]:
        """Chunks to play, one when it is asked for."""
        for chunk in self.chunks:
            url = chunk.summary(self.spec.output_url)
            if not storage.exists(url):
                yield chunk
                continue
            earlier = ChunkSummary.read(url)
            if earlier.failed:
                yield replace(chunk, again=tuple(sorted(earlier.failed)))
                continue
            self.report.resumed += 1
            self.report.add(earlier)
            self._show(0)

    def finished(self, summary: ChunkSummary, in_flight: int) -> None:
        """A chunk came back."""
        self.report.chunks += 1
        self.report.add(summary)
        self.tokens += summary.tokens + summary.endpoint_tokens
        self.busy[summary.actor] += summary.seconds
        self._show(in_flight)

    def check_failures(self, limit: float, at_the_end: bool = False) -> None:
        failed = sum(self.report.failed.values())
        played = self.report.dialogues + failed
        if failed <= limit * played or (played < JUDGED_FROM and not at_the_end):
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.report.failed.most_common())
        raise RolloutError(
            f"{failed} of {played} dialogues failed ({kinds}), more than the allowed share of {limit:g}. The "
            "others are kept, these are played again by the same command. The last failure: "
            f"{self.report.example}"
        )

    def _show(self, in_flight: int) -> None:
        elapsed = time.monotonic() - self.began
        note = f"{self.tokens / elapsed:.0f} tokens/s, {in_flight} in flight"
        if self.busy:
            shares = [min(seconds / elapsed, 1.0) for seconds in self.busy.values()]
            note += f", actors {min(shares):.0%} to {max(shares):.0%} busy"
        if failed := sum(self.report.failed.values()):
            note += f", {failed} failed"
        self.progress(self.report.dialogues, self.chunks.dialogues, note)


def _size(chunk: Chunk) -> int:
    return len(chunk.seeds if chunk.again is None else chunk.again)
