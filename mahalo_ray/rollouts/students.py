"""The students of many dialogues behind one protocol: a domain's own, any model's, any endpoint's.

A student never hears of an answer key: what it is made of is its task, its persona and what was said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, runtime_checkable

from mahalo_ray.config import EndpointStudentConfig, ModelStudentConfig
from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import Policy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.domains.protocol import Episode
from mahalo_ray.domains.tutoring.personas import (
    Persona,
    Task,
    as_student_sees,
    student_prompt,
    tutor_messages,
)
from mahalo_ray.endpoints import ChatCall, Endpoint, EndpointReply, Failure
from mahalo_ray.seeding import derived_seed, endpoint_seed


@runtime_checkable
class Student(Protocol):
    """One dialogue's student, as far as a dialogue in play needs to know it."""

    @property
    def seed(self) -> int: ...

    @property
    def topic(self) -> str: ...

    @property
    def opening_messages(self) -> list[Message]:
        """What was said before the first tutor turn; the last message is the student's."""
        ...

    @property
    def over(self) -> bool:
        """Whether the student itself has ended the dialogue."""
        ...

    def outcome(self) -> Mapping[str, float]:
        """What the dialogue came to, per objective; empty where no program can tell."""
        ...


StudentT = TypeVar("StudentT", bound=Student)


@dataclass(frozen=True)
class TutorTurn:
    """What a tutor might say. `token_ids` are the sampled ones, end token included; an endpoint's turn has
    none. `is_malformed`: it was cut off, or holds what nobody should say. `goes_on`: it is a step of a turn,
    and more of the same turn follows."""

    text: str
    token_ids: tuple[int, ...] = ()
    is_malformed: bool = False
    goes_on: bool = False


class Students(Protocol[StudentT]):
    """Whoever speaks for the students."""

    def reply(self, students: Sequence[StudentT], said: Sequence[TutorTurn]) -> list[str | Failure | None]:
        """Each student's reply to its tutor turn, or why there is none (None: it has nothing to say)."""
        ...

    def fork(self, student: StudentT, copy: int) -> StudentT:
        """An independent student in the same state, whose further noise is keyed by `copy` (from 1)."""
        ...

    def drop(self, students: Sequence[StudentT]) -> None:
        """These dialogues are over: forget what was kept for them."""
        ...


class EpisodeStudents:
    """The other side of a domain's episodes: each answers by itself, and steps of a turn are only heard."""

    def reply(self, students: Sequence[Episode], said: Sequence[TutorTurn]) -> list[str | Failure | None]:
        return [self._reply(student, turn) for student, turn in zip(students, said, strict=True)]

    @staticmethod
    def _reply(student: Episode, turn: TutorTurn) -> str | None:
        if not turn.goes_on:
            return student.hear(turn.text)
        student.take_step(turn.text)
        return None

    def fork(self, student: Episode, copy: int) -> Episode:
        return student.fork(copy)

    def drop(self, students: Sequence[Episode]) -> None:
        """Nothing is kept."""


@dataclass(eq=False)  # a key in tables of those in play: one object, one student
class PersonaStudent:
    """A student played by a language model. `heard`: the conversation as the model reads it (system message
    first, the student as assistant). Copies that should behave independently differ in `noise`."""

    task: Task
    persona: Persona
    seed: int
    noise: int = 0
    heard: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.heard:
            self.heard = [student_prompt(self.task, self.persona), *as_student_sees(self.task.opening)]

    @property
    def topic(self) -> str:
        return self.task.topic

    @property
    def opening_messages(self) -> list[Message]:
        return tutor_messages(self.task, None)

    @property
    def over(self) -> bool:
        return False

    def outcome(self) -> dict[str, float]:
        return {}

    def hear(self, tutor_text: str) -> None:
        self.heard.append(Message(role="user", content=tutor_text))

    def say(self, text: str) -> None:
        self.heard.append(Message(role="assistant", content=text))

    @property
    def turn_seed(self) -> int:
        """Seed of the next reply: depends on the dialogue, the copy, and how much was said."""
        return derived_seed("student", self.seed, self.noise, len(self.heard))

    def forked(self, copy: int) -> PersonaStudent:
        noise = derived_seed(self.noise, copy, len(self.heard))
        return replace(self, noise=noise, heard=list(self.heard))


class ModelStudents:
    """Students played by one local model, all in one batch, each over its own kept cache."""

    def __init__(self, policy: Policy, chat: ChatFormat, config: ModelStudentConfig) -> None:
        self.engine = Engine(policy)
        self.chat, self.config = chat, config
        self._rows: dict[PersonaStudent, int] = {}

    def reply(
        self, students: Sequence[PersonaStudent], said: Sequence[TutorTurn]
    ) -> list[str | Failure | None]:
        replies: dict[PersonaStudent, str | Failure] = {}
        rows, unread = [], []
        for student, turn in zip(students, said, strict=True):
            student.hear(turn.text)
            try:
                row, ids = self._unread(student)
            except ValueError as error:  # the chat template refuses it
                replies[student] = Failure("template", str(error), 1)
                continue
            missing = self.engine.length(row) + len(ids) + 1 - self.engine.max_context
            if missing > 0:
                replies[student] = Failure(
                    "student_context", f"the student's conversation is {missing} tokens too long", 1
                )
                continue
            rows.append(row)
            unread.append(ids)
        self.engine.append(rows, unread)
        speaking = [student for student in students if student not in replies]
        for student, said_back in zip(speaking, self._sample_replies(rows, speaking), strict=True):
            student.say(said_back)
            replies[student] = said_back
        return [replies[student] for student in students]

    def fork(self, student: PersonaStudent, copy: int) -> PersonaStudent:
        made = student.forked(copy)
        if student in self._rows:
            (self._rows[made],) = self.engine.duplicate([self._rows[student]])
        return made

    def drop(self, students: Sequence[PersonaStudent]) -> None:
        self.engine.drop([self._rows.pop(student) for student in students if student in self._rows])

    def _unread(self, student: PersonaStudent) -> tuple[int, list[int]]:
        """The student's row and what the model has not read of its conversation."""
        if student not in self._rows:
            ids = self.chat.prompt_ids(student.heard)
            (self._rows[student],) = self.engine.add(1)
            return self._rows[student], ids
        row = self._rows[student]
        ids = self.chat.following_ids(student.heard[:-1], student.heard[-1:])
        # A reply cut off at the token limit has no end token of its own.
        return row, self.chat.missing_end(self.engine.token_ids(row)) + ids

    def _sample_replies(self, rows: Sequence[int], students: Sequence[PersonaStudent]) -> list[str]:
        if not rows:
            return []
        candidates = self.engine.sample(
            rows,
            1,
            SamplingParams(temperature=self.config.temperature),
            [student.turn_seed for student in students],
            self.config.max_new_tokens,
            self.chat.end_ids,
        )
        self.engine.accept(candidates, [0] * len(students))
        return [self.chat.decode(own[0]).strip() for own in candidates.token_ids]


class EndpointStudents:
    """Students played by an OpenAI-compatible endpoint: all of a batch at once, as its concurrency allows."""

    def __init__(self, endpoint: Endpoint, config: EndpointStudentConfig) -> None:
        self.endpoint, self.config = endpoint, config

    def reply(
        self, students: Sequence[PersonaStudent], said: Sequence[TutorTurn]
    ) -> list[str | Failure | None]:
        for student, turn in zip(students, said, strict=True):
            student.hear(turn.text)
        replies: list[str | Failure | None] = [""] * len(students)
        for number, answer in self.endpoint.chat(map(self._request, students)):
            if isinstance(answer, EndpointReply):
                replies[number] = text = answer.texts[0].strip()
                students[number].say(text)
            else:
                replies[number] = answer
        return replies

    def fork(self, student: PersonaStudent, copy: int) -> PersonaStudent:
        return student.forked(copy)

    def drop(self, students: Sequence[PersonaStudent]) -> None:
        """Nothing is kept."""

    def _request(self, student: PersonaStudent) -> ChatCall:
        return ChatCall(
            [message.model_dump() for message in student.heard],
            max_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=endpoint_seed(student.turn_seed),
        )
