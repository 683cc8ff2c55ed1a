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

from mahalo_ray.config import (
    CasesConfig,
    GridCases,
    Knowledge,
    Level,
    MathDialCases,
    PersonasConfig,
    PrefixCases,
    Tone,
    Verbosity,
)
from mahalo_ray.data.records import Message
from mahalo_ray.data.row_fields import Row, RowError, as_name, parse_messages
from mahalo_ray.data.rows import Place, ReadReport, TooManyBadRows, use_rows
from mahalo_ray.domains.tutoring.moves import final_number

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


def load_cases(config: CasesConfig) -> tuple[list[Case], ReadReport]:
    """All cases in their order, and what became of every row; ValueError if there is no case at all."""
    match config:
        case GridCases():
            return _grid(config), ReadReport()
        case MathDialCases():
            read = _mathdial
        case PrefixCases():
            read = _prefix
    cases: list[Case] = []
    report = ReadReport()

    def use(row: Row, place: Place) -> None:
        cases.append(read(row, f"{len(cases)}"))

    use_rows(config.path, use, report)
    if not cases:
        first = f"; the first: line {report.bad[0].line}: {report.bad[0].reason}" if report.bad else ""
        raise TooManyBadRows(f"none of the {report.rows} rows of '{config.path}' can be used{first}")
    return cases, report


def _grid(config: GridCases) -> list[Case]:
    return [
        Case(
            task=Task(
                id=f"{p}-{m}",
                topic=problem.topic,
                opening=(_opening(problem.problem, None),),
                problem=problem.problem,
            ),
            misunderstanding=Misunderstanding(misconception),
            key=None if problem.answer is None else AnswerKey(problem.answer),
        )
        for p, problem in enumerate(config.problems)
        for m, misconception in enumerate(config.misconceptions)
    ]


def _mathdial(row: Row, name: str) -> Case:
    """The topic is the problem: dialogues about one problem stay together in a split."""
    problem, work = _text(row, "question"), _text(row, "student_incorrect_solution")
    answer = final_number(_text(row, "ground_truth"))
    if answer is None:
        raise RowError("'ground_truth' does not end with a number")
    confusion = row.get("teacher_described_confusion")
    if confusion is not None and not isinstance(confusion, str):
        raise RowError("'teacher_described_confusion' is not a text")
    return Case(
        task=Task(
            id=name,
            topic=f"problem-{as_name(row.get('qid', name), 'qid')}",
            opening=(_opening(problem, work),),
            problem=problem,
        ),
        misunderstanding=Misunderstanding(confusion or "something in the solution below", work),
        profile=_text(row, "student_profile"),
        key=AnswerKey(answer),
    )


def _prefix(row: Row, name: str) -> Case:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("'messages' is missing: a list of messages with role and content")
    opening = tuple(parse_messages(messages))
    if opening[-1].role != "user" or any(message.role == "system" for message in opening):
        raise RowError("'messages' must hold the tutor (assistant) and the student (user), the student last")
    identity = as_name(row.get("id", name), "id")
    topic = as_name(row.get("topic") or identity, "topic")
    return Case(task=Task(id=identity, topic=topic, opening=opening))


def _opening(problem: str, work: str | None) -> Message:
    words = "Can you help me?" if work is None else f"This is what I did:\n{work}\nIs it right?"
    return Message(role="user", content=f"{problem}\n\n{words}")


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"'{field}' is missing or not a text")
    return value.strip()
