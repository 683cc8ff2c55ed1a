"""Ray actors that each own a policy (and perhaps a reward model) and play chunks of dialogues.

A chunk is a fixed list of dialogue seeds and ends as two Parquet shards (candidate sets, dialogues) that the
actor writes itself: nothing but a summary goes through the driver. Which actor plays a chunk, and when,
changes nothing in it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ray
import torch

from mahalo_ray.config import RolloutConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.decoding.batch import BatchedConversations
from mahalo_ray.decoding.loading import Placement, load_policy, load_reward_model
from mahalo_ray.domains.tutoring.episode import Episode
from mahalo_ray.rollouts.collect import Collector
from mahalo_ray.rollouts.dialogues import DialogueBatch
from mahalo_ray.rollouts.scoring import CachedScorer

CANDIDATES = "candidates"
DIALOGUES = "dialogues"


@dataclass(frozen=True)
class RolloutSpec:
    """What every actor of one rollout stage needs. `reward_url` None: candidates are not scored."""

    policy_url: str
    reward_url: str | None
    output_url: str
    purpose: str
    settings: RolloutConfig
    placement: Placement
    threads: int


@dataclass(frozen=True)
class Chunk:
    """Dialogue seeds played together. Its number names its shards."""

    number: int
    seeds: tuple[int, ...]

    def shard(self, output_url: str, kind: str) -> str:
        """URL of this chunk's shard."""
        return storage.join(output_url, kind, f"part-{self.number:06d}.parquet")


@dataclass(frozen=True)
class ChunkSummary:
    """What one chunk came to."""

    number: int
    dialogues: int
    candidates: int
    tokens: int
    malformed_turns: int
    tutor_turns: int


class RolloutWorker:
    """Plays chunks; an ordinary class, made a Ray actor by the driver."""

    def __init__(self, spec: RolloutSpec) -> None:
        torch.set_num_threads(spec.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.spec = spec
        self.policy, self.chat = load_policy(spec.policy_url, spec.placement)
        self.reward = load_reward_model(spec.reward_url, spec.placement) if spec.reward_url else None

    def play(self, chunk: Chunk) -> ChunkSummary:
        """Play a chunk and write its shards; the dialogues' shard comes last and marks the chunk as done."""
        spec, settings = self.spec, self.spec.settings
        engine = BatchedConversations(self.policy)
        batch = DialogueBatch(engine, self.chat, settings.sampling)
        ids = [f"{spec.purpose}-{seed}" for seed in chunk.seeds]
        opened = batch.open([Episode.from_seed(seed) for seed in chunk.seeds], ids, spec.purpose)
        scorer = CachedScorer(self.reward, opened) if self.reward else None
        sets = Collector(batch, settings.candidates, settings.continuations, settings.gamma, scorer).run()
        CandidateSet.save(sets, chunk.shard(spec.output_url, CANDIDATES))
        dialogues = [conversation.dialogue(f"{spec.purpose}/policy") for conversation in opened]
        Dialogue.save(dialogues, chunk.shard(spec.output_url, DIALOGUES))
        return ChunkSummary(
            number=chunk.number,
            dialogues=len(opened),
            candidates=sum(len(s.candidates) for s in sets),
            tokens=engine.tokens_forwarded,
            malformed_turns=sum(c.malformed for c in opened),
            tutor_turns=sum(c.tutor_turns for c in opened),
        )


RolloutActor = ray.remote(RolloutWorker)
