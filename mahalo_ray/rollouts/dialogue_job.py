"""Ray actors that each own a tutor, students and perhaps a reward model, and play chunks of dialogues.

A chunk is a fixed list of dialogue numbers and ends as two Parquet shards (candidate sets, dialogues) and a
summary that the actor writes itself: nothing but the summary goes through the driver. Which actor plays a
chunk, when, and with whom a dialogue shares a batch changes nothing in it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import AliasChoices, Field, TypeAdapter

from mahalo_ray.config import (
    ActorsConfig,
    DomainConfig,
    EndpointConfig,
    EndpointStudentConfig,
    EndpointTutorConfig,
    MiniatureStudentConfig,
    ModelStudentConfig,
    ModelTutorConfig,
    PersonasConfig,
    PlayConfig,
    PolicyTutorConfig,
    Supervision,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import Guidance, ScoreScale
from mahalo_ray.decoding.policy import (
    DeviceConfig,
    HeadMix,
    MultiHeadPolicy,
    Policy,
    load_policy,
    load_step_scorer,
)
from mahalo_ray.decoding.scorers import RewardModels, ScorerGroup, follow_texts
from mahalo_ray.decoding.stopping import Boundary, TurnBoundary, boundary_for
from mahalo_ray.domains.protocol import load_domain
from mahalo_ray.domains.tutoring.moves import consistency
from mahalo_ray.domains.tutoring.personas import POST_TEST, AnswerKey, Case, PersonaSampler
from mahalo_ray.endpoints import Endpoint, Failure
from mahalo_ray.models.folder import model_folder
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogues import Collector, DialogueBatch, TurnSelection
from mahalo_ray.rollouts.pool import (
    ChunkJob,
    ChunkSummary,
    JobReport,
    Progress,
    Tally,
    shard_url,
    share_limits,
    start_worker,
    summary_url,
)
from mahalo_ray.rollouts.students import (
    EndpointStudents,
    EpisodeStudents,
    ModelStudents,
    PersonaStudent,
    Student,
    Students,
)
from mahalo_ray.rollouts.tutors import BRANCH, Conversation, DrawnWeights, EndpointTutor, PolicyTutor, Tutor
from mahalo_ray.seeding import derived_seed

CASES = TypeAdapter(list[Case])


@dataclass(frozen=True)
class RolloutSpec:
    """What every actor of one rollout stage needs. `reward_url` None: candidates are not scored;
    `reward_objective` says what a third-party classifier there scores. `actors` share the limits of the
    endpoints. `cases_url`: a JSON file of cases (`CASES`), for persona students. `domain` names whose
    episodes are played where students are a miniature's, and `supervision` how each objective of theirs is
    labelled; with `pairwise` alone candidates are whole answers, else the domain's steps.
    """

    tutor: PolicyTutorConfig | ModelTutorConfig | EndpointTutorConfig
    student: MiniatureStudentConfig | ModelStudentConfig | EndpointStudentConfig
    play: PlayConfig
    output_url: str
    purpose: str
    placement: DeviceConfig
    threads: int
    reward_url: str | None = None
    reward_objective: str | None = None
    continuations: int = 0
    gamma: float = 1.0
    actors: int = 1
    cases_url: str | None = None
    personas: PersonasConfig = field(default_factory=PersonasConfig)
    seed: int = 0
    domain: DomainConfig = field(default_factory=DomainConfig)
    supervision: Mapping[str, Supervision] = field(default_factory=dict)


class EndpointCounts(Tally):
    """What endpoints were asked. `retries`: requests that were sent again, by kind."""

    endpoint_requests: int = 0
    endpoint_tokens: int = 0
    endpoint_cost: float = 0.0
    retries: Counter[str] = Field(default_factory=Counter)


class RolloutModels:
    """The models and endpoints of one actor; dialogues are opened between them."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        self._domain = load_domain(spec.domain)
        self._policies: dict[str, tuple[Policy, ChatFormat]] = {}
        self._endpoints: list[Endpoint] = []
        self._tutor_endpoint = self._student_endpoint = None
        self._rewards = (
            [load_step_scorer(spec.reward_url, spec.placement, spec.reward_objective)]
            if spec.reward_url
            else []
        )
        if isinstance(spec.tutor, EndpointTutorConfig):
            self._tutor_endpoint = self._endpoint(spec.tutor.endpoint)
        else:
            self._weights = self._decoding_weights(spec.tutor)
        if isinstance(spec.student, EndpointStudentConfig):
            self._student_endpoint = self._endpoint(spec.student.endpoint)
        elif isinstance(spec.student, ModelStudentConfig):
            self._policy(spec.student.path)[0].check_mix(HeadMix())
        self.selection = TurnSelection(spec.play.continuation, self._guidance())

    def _decoding_weights(self, tutor: PolicyTutorConfig | ModelTutorConfig) -> Weights | DrawnWeights | None:
        """The weights over the tutor's heads; None for an ordinary model. ValueError if it has no such
        heads."""
        policy = self._policy(tutor.path)[0]
        if tutor.kind == "policy" and tutor.weights is None:
            if not isinstance(policy, MultiHeadPolicy):
                raise ValueError(f"'{tutor.path}' is an ordinary model: use it with 'kind: model'")
            return DrawnWeights(policy.model.objectives, tutor.concentration)
        weights = tutor.weights if tutor.kind == "policy" else None
        policy.check_mix(HeadMix(weights))
        return weights

    def name(self, number: int) -> str:
        """Id of a dialogue."""
        return f"{self.spec.purpose}-{number}"

    def open(self, numbers: Sequence[int]) -> tuple[DialogueBatch, list[Conversation]]:
        """A new batch with these dialogues."""
        student, play = self.spec.student, self.spec.play
        persona = not isinstance(student, MiniatureStudentConfig)
        scorers = self._scorers()
        batch = DialogueBatch(
            self._tutor(scorers),
            self._students(),
            turns=play.turns,
            stop=tuple(play.stop),
            post_test=POST_TEST
            if not isinstance(student, MiniatureStudentConfig) and student.post_test
            else None,
            instruction=self.spec.tutor.instruction,
            scorers=scorers,
        )
        students = [self._persona_student(n) if persona else self._domain.episode(n) for n in numbers]
        return batch, batch.open(students, [self.name(number) for number in numbers], self.spec.purpose)

    def record(self, conversation: Conversation) -> Dialogue:
        """A finished dialogue as it is stored, with what the checks found."""
        objectives = tuple(self.spec.supervision) or None
        dialogue = conversation.dialogue(f"{self.spec.purpose}/{self.spec.tutor.kind}", objectives)
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

    def usage(self) -> EndpointCounts:
        """What this actor's endpoints were asked so far."""
        total = EndpointCounts()
        for usage in [endpoint.usage for endpoint in self._endpoints]:
            total.endpoint_requests += usage.requests
            total.endpoint_tokens += usage.prompt_tokens + usage.completion_tokens
            total.endpoint_cost += usage.cost or 0.0
            total.retries += usage.retries
        return total

    def _guidance(self) -> Guidance | None:
        """How turns are chosen by their scores; None without a reward model."""
        if not self._rewards:
            return None
        play, scale = self.spec.play, ScoreScale.of(self._rewards)
        weights = play.guidance or Weights.balanced(scale.objectives)
        weights.over(scale.objectives)
        temperature = play.score_temperature if play.continuation == "sampled" else None
        return Guidance(scale, weights, temperature=temperature)

    def _scorers(self) -> ScorerGroup | None:
        """Reward models that follow a batch's dialogues: in the tutor's tokens where they can."""
        if not self._rewards:
            return None
        if self._tutor_endpoint is not None:
            return follow_texts(self._rewards)
        return self._reward_models.follow()

    @cached_property
    def _reward_models(self) -> RewardModels:
        tutor = self.spec.tutor
        assert not isinstance(tutor, EndpointTutorConfig)
        policy, chat = self._policy(tutor.path)
        return RewardModels(self._rewards, self._boundary, chat.tokenizer, policy.end_ids)

    @property
    def _boundary(self) -> Boundary:
        """Where candidates end."""
        if not isinstance(self.spec.student, MiniatureStudentConfig):
            return TurnBoundary()
        kinds = set(self.spec.supervision.values())
        return boundary_for(self._domain.boundary, whole_answers=kinds == {"pairwise"})

    def _tutor(self, scorers: ScorerGroup | None) -> Tutor:
        play, tutor = self.spec.play, self.spec.tutor
        if self._tutor_endpoint is not None:
            return EndpointTutor(self._tutor_endpoint, play.sampling)
        assert not isinstance(tutor, EndpointTutorConfig)
        policy, chat = self._policy(tutor.path)
        limits = [policy.max_context]
        if play.max_tokens is not None:
            limits.append(play.max_tokens)
        if scorers is not None and scorers.max_context is not None:
            limits.append(scorers.max_context)
        miniature = isinstance(self.spec.student, MiniatureStudentConfig)
        engine = Engine(policy, max_context=min(limits))
        check = self._domain.is_malformed if miniature else None
        return PolicyTutor(
            engine, chat, play.sampling, self._weights, is_malformed=check, boundary=self._boundary
        )

    def _students(self) -> Students[Any]:
        student = self.spec.student
        if isinstance(student, MiniatureStudentConfig):
            return EpisodeStudents()
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

    def _policy(self, path: str) -> tuple[Policy, ChatFormat]:
        """One copy of a model, also where tutor and students are the same."""
        if path not in self._policies:
            self._policies[path] = load_policy(str(model_folder(path)), self.spec.placement)
        return self._policies[path]

    def _endpoint(self, config: EndpointConfig) -> Endpoint:
        endpoint = Endpoint(share_limits(config, self.spec.actors))
        self._endpoints.append(endpoint)
        return endpoint


CANDIDATES = "candidates"
DIALOGUES = "dialogues"


@dataclass(frozen=True)
class DialogueChunk:
    """Dialogues played together. `number` names the files; `seeds` are dialogue numbers (the miniature's
    students: their seeds). With `again`, only these of them are played: the others are in the shards."""

    number: int
    seeds: tuple[int, ...]
    again: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}"

    @property
    def to_play(self) -> tuple[int, ...]:
        """The dialogues that are played now."""
        return self.seeds if self.again is None else self.again

    @property
    def rows(self) -> int:
        return len(self.to_play)


class DialogueCounts(EndpointCounts):
    """What is counted of dialogues. `dialogues`: those finished, branches not counted; `failed_attempts`, by
    kind, counts dialogues that failed, also those that came to a result later."""

    dialogues: int = 0
    branches: int = 0
    candidates: int = 0
    tokens: int = 0
    malformed_turns: int = 0
    tutor_turns: int = 0
    failed_attempts: Counter[str] = Field(default_factory=Counter)


class DialogueSummary(DialogueCounts, ChunkSummary):
    """What one chunk came to, attempts added up. `failures`: dialogue number -> (kind, message), of the last
    attempt."""

    failures: dict[int, tuple[str, str]] = Field({}, validation_alias=AliasChoices("failures", "failed"))

    @property
    def model_tokens(self) -> int:
        return self.tokens + self.endpoint_tokens


class RolloutWorker:
    """Plays chunks; an ordinary class, which knows no Ray."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.name = start_worker(spec.threads)
        self.spec = spec
        self.models = RolloutModels(spec)

    def play(self, chunk: DialogueChunk) -> DialogueSummary:
        """Play a chunk and write its shards, the summary last.

        Dialogues that failed leave nothing in the shards. Played again, they join those that are there, each
        in its place: the shards end up as if nothing had failed.
        """
        began = time.monotonic()
        models, play = self.models, self.spec.play
        usage = models.usage()
        seeds = chunk.to_play
        batch, opened = models.open(seeds)
        collector = Collector(
            batch,
            models.selection,
            self.spec.continuations,
            self.spec.gamma,
            play.branching,
            self.spec.supervision,
        )
        batch.play(play.candidates, collector)
        failed = _failures(batch.conversations, {c.root: seed for c, seed in zip(opened, seeds, strict=True)})
        lost = {models.name(seed) for seed in failed}
        whole = [c for c in batch.conversations if c.root not in lost]
        whole_sets = [turn_set for turn_set in collector.sets if _root(turn_set.dialogue) not in lost]
        self._write(chunk, whole_sets, [models.record(conversation) for conversation in whole])
        summary = DialogueSummary(
            **models.usage().since(usage),
            dialogues=sum(c.id == c.root for c in whole),
            branches=sum(c.id != c.root for c in whole),
            candidates=sum(len(candidate_set.candidates) for candidate_set in whole_sets),
            tokens=models.tokens(batch),
            malformed_turns=sum(c.malformed for c in whole),
            tutor_turns=sum(c.tutor_turns for c in whole),
            seconds=time.monotonic() - began,
            failed_attempts=Counter(failure.kind for failure in failed.values()),
            failures={seed: (failure.kind, failure.message) for seed, failure in failed.items()},
            actor=self.name,
        )
        url = summary_url(self.spec.output_url, chunk.name)
        if chunk.again is not None:
            earlier = DialogueCounts.model_validate(DialogueSummary.read(url).model_dump())
            summary.add(earlier)
        summary.write(url)
        return summary

    def _write(
        self, chunk: DialogueChunk, sets: Sequence[CandidateSet], dialogues: Sequence[Dialogue]
    ) -> None:
        output, place = self.spec.output_url, {self.models.name(s): n for n, s in enumerate(chunk.seeds)}
        urls = [shard_url(output, kind, chunk.name) for kind in (CANDIDATES, DIALOGUES)]
        if chunk.again is not None:
            # An attempt that ended half-way may have left some of these in one shard already.
            again = {self.models.name(seed) for seed in chunk.again}
            sets = [*(s for s in CandidateSet.read(urls[0]) if _root(s.dialogue) not in again), *sets]
            dialogues = [*(d for d in Dialogue.read(urls[1]) if _root(d.id) not in again), *dialogues]
        CandidateSet.save(sorted(sets, key=lambda s: (s.turn, place[_root(s.dialogue)], s.id)), urls[0])
        Dialogue.save(sorted(dialogues, key=lambda d: (place[_root(d.id)], d.id)), urls[1])


def _failures(conversations: Sequence[Conversation], numbers: dict[str, int]) -> dict[int, Failure]:
    """Dialogue number -> why it failed; one whose branch failed has failed as a whole."""
    return {numbers[c.root]: c.failure for c in conversations if c.failure is not None}


def _root(dialogue: str) -> str:
    """The dialogue that this one branched from, or itself."""
    return dialogue.partition(BRANCH)[0]


class RolloutReport(DialogueCounts, JobReport):
    """What a stage came to. `failed`: dialogues without a result, by kind."""

    failed: Counter[str] = Field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Another chunk's summary."""
        super().add(other)
        if isinstance(other, DialogueSummary):
            for kind, message in other.failures.values():
                self.failed[kind] += 1
                self.example = f"{kind}: {message}"

    @property
    def done(self) -> int:
        return self.dialogues

    @property
    def failures(self) -> Counter[str]:
        return self.failed

    @property
    def attempts(self) -> int:
        return self.dialogues + sum(self.failed.values())


@dataclass(frozen=True)
class DialogueChunks:
    """`dialogues` consecutive numbers in chunks of `size`: the same chunks whatever the cluster."""

    first: int
    dialogues: int
    size: int

    def __len__(self) -> int:
        return -(-self.dialogues // self.size)

    def __iter__(self) -> Iterator[DialogueChunk]:
        end = self.first + self.dialogues
        for number in range(len(self)):
            start = self.first + number * self.size
            yield DialogueChunk(number, tuple(range(start, min(start + self.size, end))))


class RolloutJob(ChunkJob[DialogueChunk, DialogueSummary, RolloutReport]):
    """Dialogues on actors; the failed ones of finished chunks are played again."""

    worker_class = RolloutWorker
    summary_class = DialogueSummary
    shards = (CANDIDATES, DIALOGUES)
    failures_called = "dialogues failed"

    def to_repeat(self, chunk: DialogueChunk, earlier: DialogueSummary) -> DialogueChunk | None:
        return replace(chunk, again=tuple(sorted(earlier.failures))) if earlier.failures else None


def run_rollouts(
    spec: RolloutSpec,
    chunks: DialogueChunks,
    cluster: ActorsConfig,
    progress: Progress,
    max_failed_fraction: float = 0.0,
) -> RolloutReport:
    """Play all chunks on Ray actors (see `ChunkJob.run`). RolloutError when more than `max_failed_fraction`
    of the dialogues played have failed. `progress(done, total, note)` counts dialogues."""
    spec = replace(spec, actors=min(cluster.rollout_actors, len(chunks)))
    report = RolloutReport()
    job = RolloutJob(
        spec.output_url, spec, chunks, chunks.dialogues, cluster, progress, report, max_failed_fraction
    )
    return job.run()
