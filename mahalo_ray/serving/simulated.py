"""The simulated students of a run, who answer the model in the place of a person.

Nothing is kept between requests: a student of a seed always says the same to the same turns, so every request
brings the conversation, and the student hears it from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, Field

from mahalo_ray.data.records import Message
from mahalo_ray.domains.protocol import Episode
from mahalo_ray.serving.schema import ApiError


class StudentMessage(BaseModel):
    """What the student says, as the next message of the conversation."""

    role: str = "user"
    content: str


class StudentReply(BaseModel):
    """The answer of POST /v1/student. `message` null: the student says nothing more."""

    object: str = "student.reply"
    message: StudentMessage | None
    over: bool = Field(description="whether the student has ended the conversation")
    outcome: dict[str, float] = Field(
        description="what the conversation has come to so far, per objective, by the domain's own program"
    )


@dataclass(frozen=True)
class SimulatedStudents:
    """The students of these seeds; `play` makes the episode of a seed."""

    play: Callable[[int], Episode]
    seeds: tuple[int, ...]

    @property
    def openings(self) -> tuple[str, ...]:
        """What each says first, where that is one message."""
        each = [self.play(seed).opening_messages for seed in self.seeds]
        return tuple(messages[0].content for messages in each if len(messages) == 1)

    def reply(self, messages: Sequence[Message]) -> StudentReply:
        """The reply of the student whose opening the conversation begins with to its last message, which is
        the model's. ApiError 400 for a conversation that ends otherwise, 404 where no student began it."""
        said = [message for message in messages if message.role != "system"]
        if not said or said[-1].role != "assistant":
            reason = "the last message must be the assistant's: the student answers it"
            raise ApiError(400, reason, "messages", "invalid_value")
        student = self._who_began(said)
        reply: str | None = None
        for message in said:
            if message.role == "assistant" and not student.over:
                reply = student.hear(message.content)
            elif message.role == "assistant":
                reply = None
        return StudentReply(
            message=None if reply is None else StudentMessage(content=reply),
            over=student.over,
            outcome=dict(student.outcome()),
        )

    def _who_began(self, said: Sequence[Message]) -> Episode:
        for seed in self.seeds:
            student = self.play(seed)
            opening = student.opening_messages
            pairs = zip(said, opening, strict=False)
            if len(said) > len(opening) and all(one.content == other.content for one, other in pairs):
                return student
        message = "no simulated student began this conversation: begin with one of the model's `students`"
        raise ApiError(404, message, "messages", "no_student")
