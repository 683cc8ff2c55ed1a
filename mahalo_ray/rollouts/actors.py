"""Ray actors that each own a tutor, students and perhaps a reward model, and play chunks of dialogues.

A chunk is a fixed list of dialogue numbers and ends as two Parquet shards (candidate sets, dialogues) and a
summary that the actor writes itself: nothing but the summary goes through the driver. Which actor plays a
chunk, when, and with whom a dialogue shares a batch changes nothing in it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import ray
import torch

from mahalo_ray.data import storage
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.endpoints import Failure
from mahalo_ray.rollouts.collect import Collector
from mahalo_ray.rollouts.dialogues import BRANCH, Conversation
from mahalo_ray.rollouts.parties import Parties, RolloutSpec

CANDIDATES = "candidates"
DIALOGUES = "dialogues"
SUMMARIES = "chunks"


@dataclass(frozen=True)
class Chunk:
    """Dialogues played together. `number` names the shards; `seeds` are dialogue numbers (the miniature's
    students: their seeds). With `again`, only these of them are played: the others are in the shards."""

    number: int
    seeds: tuple[int, ...]
    again: tuple[int, ...] | None = None

    def shard(self, output_url: str, kind: str) -> str:
        """URL of this chunk's shard."""
        return storage.join(output_url, kind, f"part-{self.number:06d}.parquet")

    def summary(self, output_url: str) -> str:
        """URL of this chunk's summary: written last, so that a chunk that has one is finished."""
        return storage.join(output_url, SUMMARIES, f"part-{self.number:06d}.json")


@dataclass(kw_only=True)
class Counts:
    """What is counted of dialogues and added up. `dialogues`: those finished, branches not counted; by kind,
    `failed_attempts` counts dialogues that failed, also those that came to a result later, and `retries`
    requests that endpoints were sent again."""

    dialogues: int = 0
    branches: int = 0
    candidates: int = 0
    tokens: int = 0
    malformed_turns: int = 0
    tutor_turns: int = 0
    endpoint_requests: int = 0
    endpoint_tokens: int = 0
    endpoint_cost: float = 0.0
    retries: Counter[str] = field(default_factory=Counter)
    failed_attempts: Counter[str] = field(default_factory=Counter)

    def plus(self, other: Counts) -> dict[str, Any]:
        """The sums, by name."""
        return {
            count.name: getattr(self, count.name) + getattr(other, count.name) for count in fields(Counts)
        }

    def as_json(self) -> dict[str, Any]:
        """All fields as plain numbers, for JSON."""
        return {name: dict(v) if isinstance(v, Counter) else v for name, v in vars(self).items()}


@dataclass(kw_only=True)
class ChunkSummary(Counts):
    """What one chunk came to, attempts added up. `failed`: dialogue number -> (kind, message); `seconds` of
    the last attempt."""

    number: int
    seconds: float = 0.0
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    actor: str = ""

    def after(self, earlier: ChunkSummary) -> ChunkSummary:
        """This attempt's summary with what earlier ones came to; who failed is up to this one."""
        return replace(self, **self.plus(earlier))

    def write(self, url: str) -> None:
        storage.write_json(url, self.as_json())

    @classmethod
    def read(cls, url: str) -> ChunkSummary:
        values: dict[str, Any] = storage.read_json(url)
        values |= {name: Counter(values[name]) for name in ("retries", "failed_attempts")}
        failed = {int(number): (kind, message) for number, (kind, message) in values.pop("failed").items()}
        return cls(**values, failed=failed)


class RolloutWorker:
    """Plays chunks; an ordinary class, made a Ray actor by the driver."""

    def __init__(self, spec: RolloutSpec) -> None:
        torch.set_num_threads(spec.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.spec = spec
        self.parties = Parties(spec)
        self.name = ray.get_runtime_context().get_actor_id() or "" if ray.is_initialized() else ""

    def play(self, chunk: Chunk) -> ChunkSummary:
        """Play a chunk and write its shards, the summary last.

        Dialogues that failed leave nothing in the shards. Played again, they join those that are there, each
        in its place: the shards end up as if nothing had failed.
        """
        began = time.monotonic()
        parties, play = self.parties, self.spec.play
        usage = parties.usage()
        seeds = chunk.seeds if chunk.again is None else chunk.again
        batch, opened = parties.open(seeds)
        sets = Collector(
            batch,
            play.candidates,
            self.spec.continuations,
            self.spec.gamma,
            parties.scorer(opened),
            parties.continuation,
            play.branching,
        ).run()
        failed = _failures(batch.conversations, {c.root: seed for c, seed in zip(opened, seeds, strict=True)})
        lost = {parties.name(seed) for seed in failed}
        whole = [c for c in batch.conversations if c.root not in lost]
        kept = [one for one in sets if _root(one.dialogue) not in lost]
        self._write(chunk, kept, [parties.record(conversation) for conversation in whole])
        spent = parties.usage()
        made = ChunkSummary(
            number=chunk.number,
            dialogues=sum(c.id == c.root for c in whole),
            branches=sum(c.id != c.root for c in whole),
            candidates=sum(len(one.candidates) for one in kept),
            tokens=parties.tokens(batch),
            malformed_turns=sum(c.malformed for c in whole),
            tutor_turns=sum(c.tutor_turns for c in whole),
            endpoint_requests=spent.requests - usage.requests,
            endpoint_tokens=spent.tokens - usage.tokens,
            endpoint_cost=spent.cost - usage.cost,
            seconds=time.monotonic() - began,
            retries=spent.retries - usage.retries,
            failed_attempts=Counter(failure.kind for failure in failed.values()),
            failed={seed: (failure.kind, failure.message) for seed, failure in failed.items()},
            actor=self.name,
        )
        url = chunk.summary(self.spec.output_url)
        if chunk.again is not None:
            made = made.after(ChunkSummary.read(url))
        made.write(url)
        return made

    def _write(self, chunk: Chunk, sets: Sequence[CandidateSet], dialogues: Sequence[Dialogue]) -> None:
        output = self.spec.output_url
        urls = chunk.shard(output, CANDIDATES), chunk.shard(output, DIALOGUES)
        if chunk.again is not None:
            # An attempt that ended half-way may have left some of these in one shard already.
            again = {self.parties.name(seed) for seed in chunk.again}
            sets = [one for one in CandidateSet.read(urls[0]) if _root(one.dialogue) not in again] + [*sets]
            dialogues = [one for one in Dialogue.read(urls[1]) if _root(one.id) not in again] + [*dialogues]
        place = {self.parties.name(seed): at for at, seed in enumerate(chunk.seeds)}
        in_order = sorted(sets, key=lambda one: (one.turn, place[_root(one.dialogue)], one.id))
        CandidateSet.save(in_order, urls[0])
        Dialogue.save(sorted(dialogues, key=lambda one: (place[_root(one.id)], one.id)), urls[1])


def _failures(conversations: Sequence[Conversation], numbers: dict[str, int]) -> dict[int, Failure]:
    """Dialogue number -> why it failed; one whose branch failed has failed as a whole."""
    return {numbers[c.root]: c.failure for c in conversations if c.failure is not None}


def _root(dialogue: str) -> str:
    """The dialogue that this one branched from, or itself."""
    return dialogue.partition(BRANCH)[0]


RolloutActor = ray.remote(RolloutWorker)
