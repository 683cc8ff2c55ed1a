"""The miniature's simulated student: latent mastery and engagement, moved by what the tutor says.

The student knows the problem's statement and hears the tutor; whether a stated step is right is felt through
its effect (a wrong statement confuses), never through an answer key that it could repeat.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, field

from mahalo_ray.data.records import Message
from mahalo_ray.domains.protocol import DomainObjective
from mahalo_ray.domains.tutoring.moves import Move, Sentence, parse_turn
from mahalo_ray.domains.tutoring.problems import OPERATORS, Operation, Problem, make_problem

# Words by mood, from bored to keen. The judge reads them back through ENTHUSIASM.
REPLIES: tuple[tuple[str, ...], ...] = (
    ("This is boring.", "Whatever.", "I want to stop."),
    ("I guess so.", "Hm, okay.", "If you say so."),
    ("Okay, I see.", "That makes sense.", "Let me think."),
    ("This is fun!", "Oh, I want to try!", "Cool, tell me more!"),
)
FAREWELL = "I have to go now."
ENTHUSIASM: dict[str, float] = {
    text: mood / (len(REPLIES) - 1) for mood, texts in enumerate(REPLIES) for text in texts
} | {FAREWELL: 0.0}
_MOOD_BOUNDS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Effects:
    """How strongly each move acts; the shares are of what is still missing, the rest are absolute."""

    step_gain: float = 0.38
    lecture_gain: float = 0.28
    tell_gain: float = 0.03
    wrong_factor: float = 0.65
    step_cost: float = 0.05
    lecture_cost: float = 0.10
    wrong_cost: float = 0.03
    long_turn_cost: float = 0.10
    unclear_cost: float = 0.12
    question_gain: float = 0.17
    praise_gain: float = 0.13
    fading: float = 0.75
    decay: float = 0.04
    leave_below: float = 0.2
    leave_probability: float = 0.2


@dataclass(frozen=True)
class Personality:
    """Who the student is: drawn once per student, never told to the tutor."""

    mastery: dict[str, float]
    engagement: float
    curiosity: float
    warmth: float

    @classmethod
    def draw(cls, rng: random.Random) -> Personality:
        return cls(
            mastery={operator: rng.uniform(0.05, 0.35) for operator in OPERATORS},
            engagement=rng.uniform(0.4, 0.65),
            curiosity=rng.uniform(0.7, 1.3),
            warmth=rng.uniform(0.7, 1.3),
        )


@dataclass
class MiniatureStudent:
    """State of one student in one dialogue. `seed` and `copy` key the noise: copies of one student that
    should behave independently (Monte-Carlo continuations) carry different `copy` numbers."""

    problem: Problem
    personality: Personality
    seed: int
    copy: int = 0
    mastery: dict[str, float] = field(default_factory=dict)
    engagement: float = 0.0
    position: int = 0
    turn: int = 0
    left: bool = False
    told: bool = False
    heard: dict[str, int] = field(default_factory=dict)
    given: set[Operation] = field(default_factory=set)
    questions: int = 0
    praises: int = 0
    effects: Effects = Effects()

    def __post_init__(self) -> None:
        if not self.mastery:
            self.mastery = dict(self.personality.mastery)
            self.engagement = self.personality.engagement

    def fork(self, copy: int) -> MiniatureStudent:
        """An independent student in the same state whose further noise is keyed by `copy`."""
        return MiniatureStudent(
            **{
                **self.__dict__,
                "copy": copy,
                "mastery": dict(self.mastery),
                "heard": dict(self.heard),
                "given": set(self.given),
            }
        )

    def hear(self, tutor_text: str) -> str:
        """Take in one tutor turn and reply. Sets `left` when the student gives up, `told` after an answer."""
        rng = random.Random(f"{self.seed}/{self.turn}/{self.copy}")
        self.turn += 1
        sentences = parse_turn(tutor_text)
        asked: Sentence | None = None
        for number, sentence in enumerate(sentences):
            if number >= 2:
                self._feel(-self.effects.long_turn_cost)
            self._take_in(sentence)
            if sentence.move is Move.QUESTION:
                asked = sentence
            self.heard[sentence.text] = self.heard.get(sentence.text, 0) + 1
        self._feel(rng.gauss(0, 0.02) - self.effects.decay)
        if self.engagement < self.effects.leave_below and rng.random() < self.effects.leave_probability:
            self.left = True
            return FAREWELL
        return self._words(asked, rng)

    def solve_probability(self) -> float:
        """Chance that the student solves a fresh problem of the same kind (the same operators) alone."""
        chance = 1.0
        for operation in self.problem.operations:
            chance *= self._success(operation.operator)
        return chance

    def left_to_find(self) -> float:
        """Share of the problem's results that the tutor did not state, rightly, by itself; 0 once the answer
        was told, as a sentence of its own or as the result of the last operation."""
        operations = self.problem.operations
        if self.told or operations[-1] in self.given:
            return 0.0
        return 1 - sum(operation in self.given for operation in set(operations)) / len(set(operations))

    def _success(self, operator: str) -> float:
        return 0.3 + 0.7 * self.mastery[operator]

    def _feel(self, change: float) -> None:
        self.engagement = min(1.0, max(0.0, self.engagement + change))

    def _learn(self, skill: str, share: float) -> None:
        attention = 0.5 + 0.5 * self.engagement
        self.mastery[skill] += share * (1 - self.mastery[skill]) * attention

    def _take_in(self, sentence: Sentence) -> None:
        match sentence.move:
            case Move.STEP:
                self._hear_step(sentence)
            case Move.QUESTION:
                self._hear_question(sentence)
            case Move.PRAISE:
                if sentence.text not in self.heard:
                    fade = self.effects.fading**self.praises
                    self._feel(self.effects.praise_gain * fade * self.personality.warmth)
                self.praises += 1
            case Move.LECTURE:
                assert sentence.skill is not None
                repeated = self.heard.get(sentence.text, 0)
                self._learn(sentence.skill, self.effects.lecture_gain * 0.5**repeated)
                self._feel(-self.effects.lecture_cost)
            case Move.TELL:
                self.told = True
                if sentence.stated == self.problem.answer:
                    for operation in self.problem.operations:
                        self._learn(operation.operator, self.effects.tell_gain)
                else:
                    self._confuse([operation.operator for operation in self.problem.operations])
            case Move.UNCLEAR:
                self._feel(-self.effects.unclear_cost)

    def _hear_step(self, sentence: Sentence) -> None:
        self._feel(-self.effects.step_cost)
        assert sentence.operation is not None
        if sentence.operation.result == sentence.stated:
            self.given.add(sentence.operation)
        expected = self.problem.operations[self.position]
        if sentence.operation == expected and sentence.stated == expected.result:
            self._learn(expected.operator, self.effects.step_gain)
            # Once through, the problem is worked again from its start.
            self.position = (self.position + 1) % len(self.problem.operations)
        elif sentence.operation.result != sentence.stated:
            self._confuse([sentence.operation.operator])

    def _hear_question(self, sentence: Sentence) -> None:
        """A question counts when it is new and, if it names an operation, when that one is next."""
        self.questions += 1
        relevant = sentence.operation in (None, self.problem.operations[self.position])
        if relevant and sentence.text not in self.heard:
            fade = self.effects.fading ** (self.questions - 1)
            self._feel(self.effects.question_gain * fade * self.personality.curiosity)

    def _confuse(self, skills: list[str]) -> None:
        for skill in set(skills):
            self.mastery[skill] *= self.effects.wrong_factor
        self._feel(-self.effects.wrong_cost)

    def _words(self, asked: Sentence | None, rng: random.Random) -> str:
        noisy = self.engagement + rng.gauss(0, 0.05)
        mood = sum(noisy > bound for bound in _MOOD_BOUNDS)
        words = rng.choice(REPLIES[mood])
        if asked is None or asked.operation is None:
            return words
        operation = asked.operation
        if rng.random() < self._success(operation.operator):
            return f"{words} Is it {operation.result}?"
        return f"{words} Is it {max(0, operation.result + rng.choice((-3, -2, -1, 1, 2, 3)))}?"


OBJECTIVES = {
    "accuracy": DomainObjective(
        "does the student solve a fresh problem of the same kind after the dialogue", ("rollout_value",)
    ),
    "engagement": DomainObjective(
        "how engaged the student is, judged by a program from state and replies", ("judged_prefix",)
    ),
    "no_giveaway": DomainObjective(
        "how much of the problem the tutor leaves to the student: told no results, least of all the answer",
        ("judged_prefix", "rollout_value"),
    ),
}


@dataclass
class TutoringEpisode:
    """A running dialogue. The tutor side only ever sees `opening` and the replies of `hear`."""

    problem: Problem
    student: MiniatureStudent
    ratings: list[float] = field(default_factory=list)

    @classmethod
    def from_seed(cls, seed: int) -> TutoringEpisode:
        """The problem and the student of this seed; equal seeds meet equal students."""
        rng = random.Random(f"episode/{seed}")
        problem = make_problem(rng)
        return cls(problem, MiniatureStudent(problem, Personality.draw(rng), seed))

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
    def problem_key(self) -> Hashable:
        """Numbers and operators, whoever has how many of what."""
        return self.problem.operations

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

    def take_step(self, text: str) -> None:
        """Tutor turns come whole."""
        raise AssertionError("a tutor turn is one step")

    def fork(self, copy: int) -> TutoringEpisode:
        """An independent continuation from here whose noise is keyed by `copy`."""
        return TutoringEpisode(self.problem, self.student.fork(copy), list(self.ratings))

    def judge_prefix(self) -> dict[str, float]:
        """Judgements of the dialogue as it stands, in [0, 1]. Engagement: the rating of the last turn, and 0
        for a dialogue that ended before its time."""
        cut_short = self.ended_early and self.student.turn < self.problem.turn_limit
        return {
            "engagement": 0.0 if cut_short else self.ratings[-1],
            "no_giveaway": self.student.left_to_find(),
        }

    def outcome(self) -> dict[str, float]:
        """Accuracy: chance of solving a fresh problem of the same kind (exact, no draw). Engagement: mean
        rating over all turns the problem allows; turns that never happened count 0. No giveaway: see
        `MiniatureStudent.left_to_find`."""
        return {
            "accuracy": self.student.solve_probability(),
            "engagement": sum(self.ratings) / self.problem.turn_limit,
            "no_giveaway": self.student.left_to_find(),
        }


def engagement_rating(student: MiniatureStudent, reply: str) -> float:
    """The judge's rating of one turn in [0, 1]: the student's state, and how keen the reply's words are."""
    words = next(score for text, score in ENTHUSIASM.items() if reply.startswith(text))
    return 0.7 * student.engagement + 0.3 * words
