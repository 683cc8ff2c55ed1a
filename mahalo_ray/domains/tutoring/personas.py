"""Who a simulated student is, what both sides talk about, and what neither may see.

A `Case` has three parts that go three ways: the task reaches both sides, the persona the student alone, the
answer key nobody (only the checks after a dialogue read it). The functions that write prompts are given only
what their side may see, so that nothing else can be in them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mahalo_ray.config.rollouts import Knowledge, Level, PersonasConfig, Tone, Verbosity
from mahalo_ray.data.records import Message

StudentStarts = Literal["attempt", "question"]


@dataclass(frozen=True)
class Task:
    """What both sides see: the messages a dialogue begins with (the last is the student's), and the problem
    they are about. `problem` None: the opening says it all."""

    id: str
    topic: str
    opening: tuple[Message, ...]
    problem: str | None = None


@dataclass(frozen=True)
class Misunderstanding:
    """What the student has wrong: in words, and as the work it would show."""

    description: str
    work: str | None = None


@dataclass(frozen=True)
class AnswerKey:
    """The final answer. No prompt is ever made from it."""

    answer: str


@dataclass(frozen=True)
class Persona:
    """The student's latent state: told to the student, never to the tutor.

    `knowledge`: `none` cannot solve the task, `partial` may or may not, `solid` can. `profile` is free text.
    """

    knowledge: Knowledge
    engagement: Level
    tone: Tone
    verbosity: Verbosity
    misunderstanding: Misunderstanding | None = None
    profile: str | None = None

    def traits(self) -> dict[str, str]:
        """What dialogues are grouped by in a summary."""
        return {
            "knowledge": self.knowledge,
            "engagement": self.engagement,
            "tone": self.tone,
            "verbosity": self.verbosity,
        }


@dataclass(frozen=True)
class Case:
    """What a dialogue can be about, before a persona is dealt to it."""

    task: Task
    misunderstanding: Misunderstanding | None = None
    profile: str | None = None
    key: AnswerKey | None = None


_KNOWLEDGE: dict[str, str] = {
    "none": "You cannot solve the task by yourself, and you do not know its answer.",
    "partial": "You understand some of the task and are unsure about the rest.",
    "solid": "You have understood the task and can solve it, if you are asked to.",
}
_ENGAGEMENT: dict[str, str] = {
    "low": "You are bored and want to be done.",
    "medium": "You take part when you are asked.",
    "high": "You are curious and try things out.",
}
_TONE: dict[str, str] = {
    "friendly": "You are friendly.",
    "neutral": "You are matter-of-fact.",
    "frustrated": "You are frustrated and show it.",
}
_VERBOSITY: dict[str, str] = {
    "terse": "You answer in a few words.",
    "normal": "You answer in one or two sentences.",
    "talkative": "You answer at length and think aloud.",
}
POST_TEST = (
    "Our lesson is over. Now solve the task alone, the way you understand it now. "
    "End with 'Answer:' and your result."
)


def student_prompt(task: Task, persona: Persona) -> Message:
    """The student's system message."""
    lines = ["You are a student and talk with your tutor. Say only what the student says, never the tutor's"]
    lines[0] += " part."
    if persona.profile is not None:
        lines.append(f"About you: {persona.profile}")
    lines.append(_KNOWLEDGE[persona.knowledge])
    if persona.misunderstanding is not None and persona.knowledge != "solid":
        lines.append(f"What you have wrong: {persona.misunderstanding.description}")
        if persona.misunderstanding.work is not None:
            lines.append(f"Your own solution so far:\n{persona.misunderstanding.work}")
    lines += [_ENGAGEMENT[persona.engagement], _TONE[persona.tone], _VERBOSITY[persona.verbosity]]
    if task.problem is not None:
        lines.append(f"The task: {task.problem}")
    return Message(role="system", content="\n".join(lines))


def tutor_messages(task: Task, instruction: str | None) -> list[Message]:
    """What the tutor reads before its first turn."""
    system = [] if instruction is None else [Message(role="system", content=instruction)]
    return system + list(task.opening)


def as_student_sees(messages: Sequence[Message]) -> list[Message]:
    """The conversation from the other side: the student is the assistant, the tutor the user. The tutor's
    system message is left out."""
    swapped = {"assistant": "user", "user": "assistant"}
    return [
        Message.model_validate({"role": swapped[message.role], "content": message.content})
        for message in messages
        if message.role != "system"
    ]


@dataclass(frozen=True)
class Deck:
    """Deals `size` cards round after round, each round in another seeded order. Card number n needs no
    dealing of those before it."""

    size: int
    seed: int
    name: str

    def card(self, number: int) -> int:
        """The card dealt at place `number` (from 0)."""
        round_, place = divmod(number, self.size)
        order = list(range(self.size))
        random.Random(f"{self.name}/{self.seed}/{round_}").shuffle(order)
        return order[place]


class PersonaSampler:
    """Dialogue number -> case and persona. Cases and trait combinations are dealt from two decks, so every
    case and every combination occurs equally often, give or take one, in any first n dialogues."""

    def __init__(self, cases: Sequence[Case], traits: PersonasConfig, seed: int) -> None:
        self.cases = list(cases)
        self.combinations = list(
            itertools.product(traits.knowledge, traits.engagement, traits.tone, traits.verbosity)
        )
        self._case_deck = Deck(len(self.cases), seed, "cases")
        self._trait_deck = Deck(len(self.combinations), seed, "traits")

    def draw(self, number: int) -> tuple[Case, Persona]:
        """The case and persona of a dialogue: they depend on number and seed alone."""
        case = self.cases[self._case_deck.card(number)]
        combination = self.combinations[self._trait_deck.card(number)]
        return case, Persona(*combination, case.misunderstanding, case.profile)
