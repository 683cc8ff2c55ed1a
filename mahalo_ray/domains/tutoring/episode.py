"""One dialogue to be played: a problem, a student, and the judge of how it went.

The judge is independent of every reward model: it is this program, reading the student's state and words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from mahalo_ray.data.records import Message
from mahalo_ray.domains.tutoring.problems import Problem, make_problem
from mahalo_ray.domains.tutoring.student import ENTHUSIASM, Personality, Student

OBJECTIVES = ("accuracy", "engagement")


@dataclass
class Episode:
    """A running dialogue. The tutor side only ever sees `opening` and the replies of `hear`."""

    problem: Problem
    student: Student
    ratings: list[float] = field(default_factory=list)

    @classmethod
    def from_seed(cls, seed: int) -> Episode:
        """The problem and the student of this seed; equal seeds meet equal students."""
        rng = random.Random(f"episode/{seed}")
        problem = make_problem(rng)
        return cls(problem, Student(problem, Personality.draw(rng), seed))

    @property
    def opening(self) -> str:
        """The student's first message."""
        return f"{self.problem.text} Please help me."

    @property
    def opening_messages(self) -> list[Message]:
        """What the tutor reads before its first turn."""
        return [Message(role="user", content=self.opening)]

    @property
    def seed(self) -> int:
        return self.student.seed

    @property
    def topic(self) -> str:
        return self.problem.topic

    @property
    def over(self) -> bool:
        """Whether no tutor turn may follow."""
        return self.ended_early or self.student.turn >= self.problem.turn_limit

    @property
    def ended_early(self) -> bool:
        """The student left, or was told the answer, before the turns were used up."""
        return self.student.left or self.student.told

    def hear(self, tutor_text: str) -> str:
        """Play one tutor turn; returns the student's reply."""
        assert not self.over, "the dialogue is over"
        reply = self.student.hear(tutor_text)
        self.ratings.append(engagement_rating(self.student, reply))
        return reply

    def fork(self, copy: int) -> Episode:
        """An independent continuation from here whose noise is keyed by `copy`."""
        return Episode(self.problem, self.student.fork(copy), list(self.ratings))

    def judge_prefix(self) -> float:
        """Judged engagement of the dialogue as it stands, in [0, 1]: the rating of the last turn, and 0 for
        a dialogue that ended before its time."""
        if self.ended_early and self.student.turn < self.problem.turn_limit:
            return 0.0
        return self.ratings[-1]

    def outcome(self) -> dict[str, float]:
        """Accuracy: chance of solving a fresh problem of the same kind (exact, no draw). Engagement: mean
        rating over all turns the problem allows; turns that never happened count 0."""
        return {
            "accuracy": self.student.solve_probability(),
            "engagement": sum(self.ratings) / self.problem.turn_limit,
        }


def engagement_rating(student: Student, reply: str) -> float:
    """The judge's rating of one turn in [0, 1]: the student's state, and how keen the reply's words are."""
    words = next(score for text, score in ENTHUSIASM.items() if reply.startswith(text))
    return 0.7 * student.engagement + 0.3 * words
