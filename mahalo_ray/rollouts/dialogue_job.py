"""Ray actors that each own a tutor, students and perhaps a reward model, and play chunks of dialogues.

A chunk is a fixed list of dialogue numbers and ends as two Parquet shards (candidate sets, dialogues) and a
summary that the actor writes itself: nothing but the summary goes through the driver. Which actor plays a
chunk, when, and with whom a dialogue shares a batch changes nothing in it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import ray
import torch
from pydantic import TypeAdapter

from mahalo_ray.config import (
    ActorsConfig,
    EndpointConfig,
    EndpointStudentConfig,
    EndpointTutorConfig,
    MiniatureStudentConfig,
    ModelStudentConfig,
    ModelTutorConfig,
    PersonasConfig,
    PlayConfig,
    PolicyTutorConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import DeviceConfig, Policy, load_policy, load_reward_model
from mahalo_ray.decoding.scorers import CLOSING_ROOM
from mahalo_ray.domains.tutoring.moves import consistency
from mahalo_ray.domains.tutoring.personas import POST_TEST, AnswerKey, Case, PersonaSampler
from mahalo_ray.domains.tutoring.student import Episode
from mahalo_ray.endpoints import Endpoint, Failure, Usage
from mahalo_ray.models.folder import model_folder
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.collect import Collector
from mahalo_ray.rollouts.dialogues import BRANCH, Continuation, Conversation, DialogueBatch
from mahalo_ray.rollouts.pool import ActorPool, RolloutError
from mahalo_ray.rollouts.scoring import CachedScorer, CandidateScorer, TextScorer
from mahalo_ray.rollouts.students import (
    EndpointStudents,
    MiniatureStudents,
    ModelStudents,
    PersonaStudent,
    Student,
    Students,
)
from mahalo_ray.rollouts.tutors import EndpointTutor, PolicyTutor, Tutor
from mahalo_ray.seeding import derived_seed

CASES = TypeAdapter(list[Case])


@dataclass(frozen=True)
class RolloutSpec:
    """What every actor of one rollout stage needs. `reward_url` None: candidates are not scored. `actors`
    share the limits of the endpoints. `cases_url`: a JSON file of cases (`CASES`), for persona students."""

    tutor: PolicyTutorConfig | ModelTutorConfig | EndpointTutorConfig
    student: MiniatureStudentConfig | ModelStudentConfig | EndpointStudentConfig
    play: PlayConfig
    output_url: str
    purpose: str
    placement: DeviceConfig
    threads: int
    reward_url: str | None = None
    continuations: int = 0
    gamma: float = 1.0
    actors: int = 1
    cases_url: str | None = None
    personas: PersonasConfig = field(default_factory=PersonasConfig)
    seed: int = 0


@dataclass
class Spent:
    """What the endpoints were asked so far."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0
    retries: Counter[str] = field(default_factory=Counter)

    def add(self, usage: Usage) -> None:
        self.requests += usage.requests
        self.tokens += usage.prompt_tokens + usage.completion_tokens
        self.cost += usage.cost or 0.0
        self.retries = self.retries + usage.retries


class Parties:
    """The models and endpoints of one actor; dialogues are opened between them."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        self._policies: dict[str, tuple[Policy, ChatFormat]] = {}
        self._endpoints: list[Endpoint] = []
        self._tutor_endpoint = self._student_endpoint = None
        self.reward = load_reward_model(spec.reward_url, spec.placement) if spec.reward_url else None
        if isinstance(spec.tutor, EndpointTutorConfig):
            self._tutor_endpoint = self._endpoint(spec.tutor.endpoint)
        else:
            self._weights = Weights(spec.tutor.weights) if spec.tutor.kind == "policy" else None
            self._policy(spec.tutor.path)[0].check_weights(self._weights)
        if isinstance(spec.student, EndpointStudentConfig):
            self._student_endpoint = self._endpoint(spec.student.endpoint)
        elif isinstance(spec.student, ModelStudentConfig):
            self._policy(spec.student.path)[0].check_weights(None)
        guidance = Weights(spec.play.guidance) if spec.play.guidance else None
        self.continuation = Continuation(spec.play.continuation, guidance, spec.play.score_temperature)

    def name(self, number: int) -> str:
        """Id of a dialogue."""
        return f"{self.spec.purpose}-{number}"

    def open(self, numbers: Sequence[int]) -> tuple[DialogueBatch, list[Conversation]]:
        """A new batch with these dialogues."""
        student, play = self.spec.student, self.spec.play
        persona = not isinstance(student, MiniatureStudentConfig)
        batch = DialogueBatch(
            self._tutor(),
            self._students(),
            play.turns,
            tuple(play.stop),
            POST_TEST if not isinstance(student, MiniatureStudentConfig) and student.post_test else None,
            self.spec.tutor.instruction,
        )
        made = [self._persona_student(n) if persona else Episode.from_seed(n) for n in numbers]
        return batch, batch.open(made, [self.name(number) for number in numbers], self.spec.purpose)

    def scorer(self, opened: Sequence[Conversation]) -> CandidateScorer | None:
        """The reward model over its own cache where it reads the tutor's tokens, else over text."""
        if self.reward is None:
            return None
        return CachedScorer(self.reward, opened) if self._reward_reads_tokens else TextScorer(self.reward)

    def record(self, conversation: Conversation) -> Dialogue:
        """A finished dialogue as it is stored, with what the checks found."""
        dialogue = conversation.dialogue(f"{self.spec.purpose}/{self.spec.tutor.kind}")
        student = conversation.student
        if not isinstance(student, PersonaStudent):
            return dialogue
        key = self._keys.get(student.task.id)
        checks = consistency(
            conversation.turns,
            conversation.opening_turns,
            student.persona.knowledge,
            None if key is None else key.answer,
            conversation.post_test,
        )
        return dialogue.model_copy(update={"checks": checks})

    def tokens(self, batch: DialogueBatch) -> int:
        """Tokens that went through local models for this batch."""
        sides = (batch.tutor, batch.students)
        return sum(
            side.engine.tokens_forwarded for side in sides if isinstance(side, PolicyTutor | ModelStudents)
        )

    def usage(self) -> Spent:
        """What this actor's endpoints were asked so far."""
        spent = Spent()
        for endpoint in self._endpoints:
            spent.add(endpoint.usage)
        return spent

    def _tutor(self) -> Tutor:
        play, tutor = self.spec.play, self.spec.tutor
        if self._tutor_endpoint is not None:
            return EndpointTutor(self._tutor_endpoint, play.sampling)
        assert not isinstance(tutor, EndpointTutorConfig)
        policy, chat = self._policy(tutor.path)
        limits = [policy.max_context]
        if play.max_tokens is not None:
            limits.append(play.max_tokens)
        if self.reward is not None and self._reward_reads_tokens:
            closing = 0 if self.reward.step_separator is None else CLOSING_ROOM
            limits.append(self.reward.max_length - closing)
        miniature = isinstance(self.spec.student, MiniatureStudentConfig)
        engine = Engine(policy, max_context=min(limits))
        return PolicyTutor(engine, chat, play.sampling, self._weights, sentences_are_moves=miniature)

    def _students(self) -> Students[Any]:
        student = self.spec.student
        if isinstance(student, MiniatureStudentConfig):
            return MiniatureStudents()
        if isinstance(student, ModelStudentConfig):
            return ModelStudents(*self._policy(student.path), student)
        assert self._student_endpoint is not None
        return EndpointStudents(self._student_endpoint, student)

    def _persona_student(self, number: int) -> Student:
        case, persona = self._sampler.draw(number)
        return PersonaStudent(case.task, persona, derived_seed(self.spec.seed, number))

    @cached_property
    def _sampler(self) -> PersonaSampler:
        assert self.spec.cases_url is not None
        cases = CASES.validate_json(storage.read_bytes(self.spec.cases_url))
        return PersonaSampler(cases, self.spec.personas, self.spec.seed)

    @cached_property
    def _keys(self) -> dict[str, AnswerKey]:
        """Task id -> answer key: for the checks after a dialogue, far from every prompt."""
        return {case.task.id: case.key for case in self._sampler.cases if case.key is not None}

    @cached_property
    def _reward_reads_tokens(self) -> bool:
        """Whether the reward model reads the tutor's own tokens."""
        assert self.reward is not None
        tutor = self.spec.tutor
        if isinstance(tutor, EndpointTutorConfig):
            return False
        ours, its = self._policy(tutor.path)[1].tokenizer, self.reward.tokenizer
        return (
            its is not None
            and its.get_vocab() == ours.get_vocab()
            and its.chat_template == ours.chat_template
        )

    def _policy(self, path: str) -> tuple[Policy, ChatFormat]:
        """One copy of a model, also where tutor and students are the same."""
        if path not in self._policies:
            self._policies[path] = load_policy(str(model_folder(path)), self.spec.placement)
        return self._policies[path]

    def _endpoint(self, config: EndpointConfig) -> Endpoint:
        made = Endpoint(shared(config, self.spec.actors))
        self._endpoints.append(made)
        return made


def shared(config: EndpointConfig, actors: int) -> EndpointConfig:
    """One actor's part of what an endpoint may be asked by all; ValueError if there is not enough for all."""
    limits = {"concurrency": config.concurrency}
    if config.requests_per_minute is not None:
        limits["requests_per_minute"] = config.requests_per_minute
    for name, value in limits.items():
        if value < actors:
            raise ValueError(
                f"'endpoint.{name}' is {value} for {actors} actors: raise it, or lower "
                "'cluster.rollout_actors'"
            )
    return config.model_copy(update={name: value // actors for name, value in limits.items()})


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
