"""Ray actors that answer chunks of prompts by guided decoding.

A chunk is a fixed list of prompts and ends as two Parquet shards (rows that cannot be answered, answers) that
the actor writes itself. Which actor answers a chunk, and when, changes nothing in it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayTaskError

from mahalo_ray.config.generate import GenerateConfig
from mahalo_ray.data import storage
from mahalo_ray.data.prompts import PromptRow
from mahalo_ray.data.quarantine import SCHEMA as BAD_ROWS
from mahalo_ray.decoding.completions import CompletionDecoder
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.loading import Placement, load_guide, load_policy
from mahalo_ray.decoding.requests import GuidedRequest
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.endpoints import Endpoint
from mahalo_ray.errors import StageError
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.generations import Generation
from mahalo_ray.rollouts.pool import ActorPool
from mahalo_ray.rollouts.seeds import derived_seed

ANSWERS = "answers"
REJECTED = "rejected"


@dataclass(frozen=True)
class PromptChunk:
    """Prompts answered together. `number` names the shards."""

    number: int
    rows: tuple[PromptRow, ...]

    def shard(self, output_url: str, kind: str) -> str:
        """URL of this chunk's shard."""
        return storage.join(output_url, kind, f"part-{self.number:06d}.parquet")


@dataclass(frozen=True)
class PromptChunks:
    """Prompts in chunks of `size`: the same chunks whatever the cluster."""

    rows: Sequence[PromptRow]
    size: int

    def __iter__(self) -> Iterator[PromptChunk]:
        for number, at in enumerate(range(0, len(self.rows), self.size)):
            yield PromptChunk(number, tuple(self.rows[at : at + self.size]))


@dataclass(frozen=True)
class ChunkSummary:
    """What one chunk came to."""

    answered: int
    rejected: int


class GenerateWorker:
    """Answers chunks; an ordinary class, made a Ray actor by `generate_chunks`."""

    def __init__(self, config: GenerateConfig) -> None:
        torch.set_num_threads(max(1, math.floor(config.cluster.cpus_per_rollout_actor)))
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.config = config
        placement = Placement(config.cluster.device, config.dtype)
        rewards = [load_guide(source.model, placement, source.objective) for source in config.rewards]
        self.decoder: GuidedDecoder | CompletionDecoder
        if config.server is not None:
            server = config.server
            self.decoder = CompletionDecoder(
                Endpoint(server.endpoint),
                rewards,
                config.domain,
                load_tokenizer(storage.local_copy(server.tokenizer)),
                None if server.weights is None else Weights(server.weights),
            )
        else:
            assert config.policy is not None
            policy, chat = load_policy(config.policy, placement)
            self.decoder = GuidedDecoder(
                policy, rewards, config.domain, chat.tokenizer, max_branches=config.max_branches
            )

    def play(self, chunk: PromptChunk) -> ChunkSummary:
        """Answer a chunk and write its shards; the answers' shard comes last and marks the chunk as done."""
        requests = [request_of(row, self.config) for row in chunk.rows]
        answers, rejected = [], []
        results = self.decoder.generate_each(requests)
        for row, request, result in zip(chunk.rows, requests, results, strict=True):
            if isinstance(result, ValueError):
                rejected.append(row.bad(str(result)))
            else:
                answers.append(Generation.of(row, request, result, self.decoder.scale.objectives))
        url = self.config.output
        bad = pa.Table.from_pylist([asdict(row) for row in rejected], schema=BAD_ROWS)
        storage.write_table(chunk.shard(url, REJECTED), bad)
        Generation.save(answers, chunk.shard(url, ANSWERS))
        return ChunkSummary(len(answers), len(rejected))


GenerateActor = ray.remote(GenerateWorker)


def generate_chunks(config: GenerateConfig, chunks: PromptChunks, progress: Callable[[int], None]) -> int:
    """Answer all chunks that have no answers yet on `cluster.rollout_actors` actors; returns how many actors
    died. `progress(done)` counts prompts; ray.init must have been called, `config.output` is absolute.
    """
    done = set(storage.list_files(storage.join(config.output, ANSWERS), ".parquet"))
    waiting = [chunk for chunk in chunks if chunk.shard(config.output, ANSWERS) not in done]
    finished = len(chunks.rows) - sum(len(chunk.rows) for chunk in waiting)
    progress(finished)
    pool = ActorPool(GenerateActor, config, config.cluster, waiting)
    try:
        for summary in pool.results():
            finished += summary.answered + summary.rejected
            progress(finished)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | StageError):
            raise error.cause from None  # without the actor's traceback
        raise
    return pool.deaths


def request_of(row: PromptRow, config: GenerateConfig) -> GuidedRequest:
    """The row's request: its own weights, guidance and seed before the job's, and those before what a server
    was declared to serve."""
    options = config.request
    served = None if config.server is None else config.server.weights
    common = served if options.weights is None else options.weights
    weights = row.weights or (None if common is None else Weights(common))
    guidance = row.guidance or (None if options.guidance is None else Weights(options.guidance))
    return GuidedRequest(
        row.messages,
        weights=weights,
        guidance=guidance,
        num_candidates=options.num_candidates,
        seed=derived_seed("generate", options.seed, row.id) if row.seed is None else row.seed,
        sampling=SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p),
        max_new_tokens=options.max_new_tokens,
        max_step_tokens=options.max_step_tokens,
        max_steps=options.max_steps,
        stop=tuple(options.stop),
        strategy=options.strategy,
        beam_width=options.beam_width,
        score_temperature=options.score_temperature,
        standardisation=options.standardisation,
    )
