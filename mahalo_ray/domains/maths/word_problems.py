"""The maths miniature's problems: a short story of 2 to 5 changes, each one calculation."""

from __future__ import annotations

import random
from dataclasses import dataclass

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
