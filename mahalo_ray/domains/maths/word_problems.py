"""The maths miniature: short stories of 2 to 5 changes, each one calculation, and scripted solvers of mixed
quality, whose solutions the SFT model imitates."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from mahalo_ray.domains.tutoring.problems import OPERATORS, Operation, Operator

LARGEST_RESULT = 40
FEWEST_STEPS, MOST_STEPS = 2, 5

_PEOPLE = ("Mia", "Ben", "Zoe", "Sam", "Lia", "Tom")
_GOODS = ("coins", "cards", "shells", "pens", "books", "beads")
_EVENTS: dict[Operator, tuple[str, ...]] = {
    "+": ("finds {} more", "gets {} more"),
    "-": ("loses {}", "gives {} away"),
    "x": ("makes it {} times as many",),
}


@dataclass(frozen=True)
class Change:
    """One event of the story, as `Mia finds 5 more`, and the calculation that it asks for."""

    event: str
    operation: Operation


@dataclass(frozen=True)
class WordProblem:
    """A story and its changes in order. The question says in how many words it is to be answered."""

    question: str
    changes: tuple[Change, ...]

    @property
    def answer(self) -> int:
        return self.changes[-1].operation.result

    @property
    def topic(self) -> str:
        """Its operators in order."""
        return "".join(change.operation.operator for change in self.changes)

    @property
    def word_limit(self) -> int:
        """Words that a solution may have: all calculations, and a question or half a reason at each."""
        return word_limit(len(self.changes))


def word_limit(steps: int) -> int:
    """Words for a solution of so many steps. A bare calculation takes 6, a question 3, a reason 6 to 9."""
    return 10 + 9 * steps


def make_word_problem(rng: random.Random) -> WordProblem:
    """Draw a problem. The same generator state gives the same problem."""
    person, goods = rng.choice(_PEOPLE), rng.choice(_GOODS)
    value = start = rng.randint(3, 15)
    changes = []
    for _ in range(rng.randint(FEWEST_STEPS, MOST_STEPS)):
        operation = _draw(rng, value)
        event = rng.choice(_EVENTS[operation.operator]).format(operation.right)
        changes.append(Change(f"{person} {event}", operation))
        value = operation.result
    story = " ".join(f"{change.event}." for change in changes)
    ask = f"How many {goods} now? Use at most {word_limit(len(changes))} words."
    question = f"{person} has {start} {goods}. {story} {ask}"
    return WordProblem(question, tuple(changes))


def _draw(rng: random.Random, value: int) -> Operation:
    while True:
        operator = rng.choice(OPERATORS)
        right = rng.randint(2, 3) if operator == "x" else rng.randint(2, 9)
        operation = Operation(value, operator, right)
        if 1 <= operation.result <= LARGEST_RESULT:
            return operation


OPENERS = ("So", "Then", "Now", "Next")
_VERBS: dict[Operator, str] = {"+": "add", "-": "take away", "x": "multiply"}
QUESTIONS = (
    "What comes next?",
    "Do you see it?",
    "Can you go on?",
    "Is that what you thought?",
    "Which number is next?",
    "Can you check it?",
    "Ready for more?",
    "How would you do it?",
)
ADDRESSES = ("You can do this.", "Let us look.", "You are close.", "Let us go on.")


@dataclass(frozen=True)
class Voice:
    """How a solver writes: the chance that a step has a reason, a question, and a word to the reader, and how
    often its calculation slips. `repeats`: the chance to say what was said before."""

    name: str
    reason: float
    question: float
    address: float
    slip: float
    repeats: float = 0.2


TERSE = Voice("terse", 0.05, 0.05, 0.02, slip=0.08)
CHATTY = Voice("chatty", 0.65, 0.65, 0.35, slip=0.28)
MIXED_VOICE = Voice("mixed", 0.35, 0.3, 0.15, slip=0.16)
VOICES = (TERSE, CHATTY, MIXED_VOICE)


def write_solution(problem: WordProblem, rng: random.Random, voice: Voice | None = None) -> list[str]:
    """The lines of a solution, the last `#### answer`. A slip is carried on: the next step starts from it.

    Without a `voice`, every step may change it, so that the SFT model learns to do so too.
    """
    value = problem.changes[0].operation.left
    current = voice or rng.choice(VOICES)
    lines: list[str] = []
    said: set[str] = set()
    for change in problem.changes:
        if voice is None and rng.random() < 0.3:
            current = rng.choice(VOICES)
        operation = replace(change.operation, left=value)
        value = operation.result
        if rng.random() < current.slip:
            value = max(0, value + rng.choice((-3, -2, -1, 1, 2, 3)))
        lines.append(_line(change, operation.text(value), current, rng, said))
    return [*lines, f"#### {value}"]


def _line(change: Change, calculation: str, voice: Voice, rng: random.Random, said: set[str]) -> str:
    opener = "So" if rng.random() < 0.4 else rng.choice(OPENERS)
    sentences = [f"{opener} {calculation}."]
    if rng.random() < voice.reason:
        sentences.insert(0, f"We {_VERBS[change.operation.operator]} because {change.event}.")
    if rng.random() < voice.address:
        sentences.insert(0, _fresh(ADDRESSES, voice, rng, said))
    if rng.random() < voice.question:
        sentences.append(_fresh(QUESTIONS, voice, rng, said))
    return " ".join(sentences)


def _fresh(sentences: tuple[str, ...], voice: Voice, rng: random.Random, said: set[str]) -> str:
    new = [sentence for sentence in sentences if sentence not in said]
    sentence = rng.choice(new if new and rng.random() >= voice.repeats else sentences)
    said.add(sentence)
    return sentence
