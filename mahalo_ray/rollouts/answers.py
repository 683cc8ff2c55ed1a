"""Ray actors that answer chunks of prompts by guided decoding.

A chunk is a fixed list of prompts and ends as two Parquet shards (rows that cannot be answered, answers) that
the actor writes itself. Which actor answers a chunk, and when, changes nothing in it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from mahalo_ray.config import GenerateConfig
from mahalo_ray.data import storage
from mahalo_ray.data.prompts import PromptRow
from mahalo_ray.data.records import MESSAGES, Message, Record, RecordTable
from mahalo_ray.data.rows import SCHEMA as BAD_ROWS
from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Step
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.policy import DeviceConfig, load_policy, load_step_scorer
from mahalo_ray.decoding.remote import CompletionDecoder
from mahalo_ray.endpoints import Endpoint
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.rollouts.pool import (
    ChunkJob,
    ChunkSummary,
    JobReport,
    Progress,
    Tally,
    shard_url,
    start_worker,
    summary_url,
)
from mahalo_ray.seeding import derived_seed

_NUMBERS = pa.map_(pa.string(), pa.float64())
_CANDIDATE = pa.struct(
    [
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("reason", pa.string()),
        ("scores", _NUMBERS),
        ("total", pa.float64()),
    ]
)
_STEP = pa.struct([("chosen", pa.int32()), ("candidates", pa.list_(_CANDIDATE))])


class GenerationCandidate(BaseModel):
    """A candidate of a step. `scores` per objective and the `total` that was compared, both None where there
    was nothing to choose from; `reason`: why it ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    tokens: int
    reason: str
    scores: dict[str, float] | None
    total: float | None


class GenerationStep(BaseModel):
    """A step of the response: the candidates and which one went on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chosen: int
    candidates: list[GenerationCandidate]


class Generation(Record):
    """A prompt's answer. `text` ends before a stop string; the steps hold all that was sampled.

    `weights` and `guidance` are what was used: None for a policy without heads, or no guidance.
    `policy_tokens` and `reward_tokens` went through the models; `cache_bytes` is the peak of the whole chunk.
    """

    id: str
    prompt: list[Message]
    text: str
    stop_reason: str
    steps: list[GenerationStep]
    weights: dict[str, float] | None
    guidance: dict[str, float] | None
    strength: float = 1.0
    strategy: str
    seed: int
    prompt_tokens: int
    response_tokens: int
    policy_tokens: int
    reward_tokens: int
    cache_bytes: int

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("prompt", MESSAGES),
            ("text", pa.string()),
            ("stop_reason", pa.string()),
            ("steps", pa.list_(_STEP)),
            ("weights", _NUMBERS),
            ("guidance", _NUMBERS),
            ("strength", pa.float64()),
            ("strategy", pa.string()),
            ("seed", pa.int64()),
            ("prompt_tokens", pa.int64()),
            ("response_tokens", pa.int64()),
            ("policy_tokens", pa.int64()),
            ("reward_tokens", pa.int64()),
            ("cache_bytes", pa.int64()),
        ]
    )

    @classmethod
    def of(
        cls, row: PromptRow, request: GuidedRequest, result: GuidedResult, objectives: Sequence[str]
    ) -> Generation:
        """The record of an answered prompt; `objectives` are the reward models'."""
        return cls(
            id=row.id,
            prompt=list(row.messages),
            text=before_stop(result.text, request.stop),
            stop_reason=result.stop_reason,
            steps=[_step(step) for step in result.steps],
            weights=None if request.weights is None else dict(request.weights),
            guidance=dict(request.guidance_over(objectives)) if request.is_guided else None,
            strength=request.strength,
            strategy=request.strategy,
            seed=request.seed,
            prompt_tokens=result.prompt_tokens,
            response_tokens=len(result.token_ids),
            policy_tokens=result.policy_tokens,
            reward_tokens=result.reward_tokens,
            cache_bytes=result.cache_bytes,
        )


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text


def _step(step: Step) -> GenerationStep:
    return GenerationStep(
        chosen=step.chosen,
        candidates=[
            GenerationCandidate(
                text=c.text,
                tokens=len(c.token_ids),
                reason=c.reason,
                scores=c.scores or None,
                total=c.total,
            )
            for c in step.candidates
        ],
    )


ANSWERS = "answers"
REJECTED = "rejected"


@dataclass(frozen=True)
class PromptChunk:
    """Prompts answered together. `number` names the files."""

    number: int
    prompts: tuple[PromptRow, ...]

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}"

    @property
    def rows(self) -> int:
        return len(self.prompts)


def cut_into_chunks(prompts: Iterable[PromptRow], size: int) -> Iterator[PromptChunk]:
    """Prompts in chunks of `size`, one when it is asked for: the same chunks whatever the cluster."""
    rows = iter(prompts)
    for number in itertools.count():
        if not (chunk := tuple(itertools.islice(rows, size))):
            return
        yield PromptChunk(number, chunk)


class AnswerCounts(Tally):
    """What is counted of answers. `rejected`: prompts that cannot be answered, which go to quarantine."""

    answered: int = 0
    rejected: int = 0
    tokens: int = 0


class AnswerSummary(AnswerCounts, ChunkSummary):
    """What one chunk came to."""

    @property
    def model_tokens(self) -> int:
        return self.tokens


class AnswerJobReport(AnswerCounts, JobReport):
    """What a job of answers came to."""

    @property
    def done(self) -> int:
        return self.answered + self.rejected


class GenerateWorker:
    """Answers chunks; an ordinary class, which knows no Ray."""

    def __init__(self, config: GenerateConfig) -> None:
        self.name = start_worker(max(1, math.floor(config.cluster.cpus_per_rollout_actor)))
        self.config = config
        placement = DeviceConfig.of(config.cluster, config.dtype)
        rewards = [load_step_scorer(source.model, placement, source.objective) for source in config.rewards]
        self.decoder: GuidedDecoder | CompletionDecoder
        if config.server is not None:
            server = config.server
            self.decoder = CompletionDecoder(
                Endpoint(server.endpoint),
                rewards,
                config.domain,
                load_tokenizer(storage.local_copy(server.tokenizer)),
                further_models=server.models_by_weights,
            )
        else:
            assert config.policy is not None
            policy, chat = load_policy(config.policy, placement)
            self.decoder = GuidedDecoder(
                policy, rewards, config.domain, chat.tokenizer, max_branches=config.max_branches
            )

    def play(self, chunk: PromptChunk) -> AnswerSummary:
        """Answer a chunk and write its files, the summary last."""
        began, output = time.monotonic(), self.config.output
        requests = [request_of(row, self.config) for row in chunk.prompts]
        answers, rejected = [], []
        results = self.decoder.generate_each(requests)
        for row, request, result in zip(chunk.prompts, requests, results, strict=True):
            if isinstance(result, ValueError):
                rejected.append(row.bad(str(result)))
            else:
                answers.append(Generation.of(row, request, result, self.decoder.scale.objectives))
        bad = pa.Table.from_pylist([asdict(row) for row in rejected], schema=BAD_ROWS)
        storage.write_table(shard_url(output, REJECTED, chunk.name), bad)
        Generation.save(answers, shard_url(output, ANSWERS, chunk.name))
        summary = AnswerSummary(
            answered=len(answers),
            rejected=len(rejected),
            tokens=sum(answer.policy_tokens + answer.reward_tokens for answer in answers),
            seconds=time.monotonic() - began,
            actor=self.name,
        )
        summary.write(summary_url(output, chunk.name))
        return summary


class AnswerJob(ChunkJob[PromptChunk, AnswerSummary, AnswerJobReport]):
    """Answers on actors. What cannot be answered is no failure of the job: it goes to quarantine."""

    worker_class = GenerateWorker
    summary_class = AnswerSummary
    shards = (ANSWERS, REJECTED)
    failures_called = "prompts failed"

    def to_repeat(self, chunk: PromptChunk, earlier: AnswerSummary) -> None:
        """A finished chunk stays as it is."""


def answer_prompts(
    config: GenerateConfig, prompts: RecordTable[PromptRow], progress: Progress
) -> AnswerJobReport:
    """Answer all prompts on Ray actors (see `ChunkJob.run`); `config.output` is absolute. `progress(done,
    total, note)` counts prompts."""
    chunks = cut_into_chunks(prompts, config.chunk_rows)
    report = AnswerJobReport()
    return AnswerJob(config.output, config, chunks, len(prompts), config.cluster, progress, report).run()


def request_of(row: PromptRow, config: GenerateConfig) -> GuidedRequest:
    """The row's request: its own weights, guidance and seed before the job's, and those before what a server
    was declared to serve."""
    options = config.request
    served = None if config.server is None else config.server.weights
    common = served if options.weights is None else options.weights
    return GuidedRequest.of(
        options,
        row.messages,
        weights=row.weights or common,
        guidance=row.guidance or options.guidance,
        seed=derived_seed("generate", options.seed, row.id) if row.seed is None else row.seed,
    )
