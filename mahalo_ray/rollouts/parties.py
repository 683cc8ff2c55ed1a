"""Who takes part in a rollout stage, as every actor loads it: tutor, students, reward model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter

from mahalo_ray.config.endpoint import EndpointConfig
from mahalo_ray.config.rollouts import (
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
from mahalo_ray.data.records import Dialogue
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.batch import BatchedConversations
from mahalo_ray.decoding.guide import CLOSING_ROOM
from mahalo_ray.decoding.loading import Placement, load_policy, load_reward_model
from mahalo_ray.decoding.policy import Policy
from mahalo_ray.domains.tutoring.checks import consistency
from mahalo_ray.domains.tutoring.episode import Episode
from mahalo_ray.domains.tutoring.personas import POST_TEST, AnswerKey, Case, PersonaSampler
from mahalo_ray.endpoints import Endpoint, Usage
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.continuation import Continuation
from mahalo_ray.rollouts.dialogues import Conversation, DialogueBatch
from mahalo_ray.rollouts.scoring import CachedScorer, CandidateScorer, TextScorer
from mahalo_ray.rollouts.seeds import derived_seed
from mahalo_ray.rollouts.students import (
    EndpointStudents,
    MiniatureStudents,
    ModelStudents,
    PersonaStudent,
    Student,
    Students,
)
from mahalo_ray.rollouts.tutors import EndpointTutor, PolicyTutor, Tutor
from mahalo_ray.training.sources import model_folder

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
    placement: Placement
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
        engine = BatchedConversations(policy, max_context=min(limits))
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
