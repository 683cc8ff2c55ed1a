"""Multi-step arithmetic word problems of the miniature, each with its chain of operations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Operator = Literal["+", "-", "x"]
ORDINALS = ("First", "Second", "Third", "Fourth")
OPERATORS: tuple[Operator, ...] = ("+", "-", "x")
LARGEST_NUMBER = 40
MAX_TURNS = 6

_NAMES = ("Mia", "Ben", "Zoe", "Sam", "Lia", "Tom")
_THINGS = ("coins", "cards", "shells", "pens", "books", "beads")
_PHRASES: dict[Operator, tuple[str, ...]] = {
    "+": ("get {} more", "find {} more"),
    "-": ("lose {}", "give {} away"),
    "x": ("make it {} times as many",),
}


@dataclass(frozen=True)
class Operation:
    """`left operator right = result`, all integers of 0 to LARGEST_NUMBER."""

    left: int
    operator: Operator
    right: int

    @property
    def result(self) -> int:
        if self.operator == "+":
            return self.left + self.right
        return self.left - self.right if self.operator == "-" else self.left * self.right

    def text(self, result: int | None = None) -> str:
        """`12 + 7 = 19`; another result can be stated (a slip)."""
        return f"{self.left} {self.operator} {self.right} = {self.result if result is None else result}"


@dataclass(frozen=True)
class Problem:
    """A word problem with 2 to 4 operations, worked in a given number of tutor turns (3 to 6)."""

    text: str
    operations: tuple[Operation, ...]
    turn_limit: int

    @property
    def answer(self) -> int:
        return self.operations[-1].result

    @property
    def topic(self) -> str:
        """The kind of problem: its operators in order."""
        return "".join(operation.operator for operation in self.operations)


def make_problem(rng: random.Random) -> Problem:
    """Draw a problem. The same generator state gives the same problem."""
    value = start = rng.randint(3, 15)
    operations: list[Operation] = []
    for _ in range(rng.randint(2, 4)):
        operation = _draw_operation(rng, value)
        operations.append(operation)
        value = operation.result
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    changes = [
        f"{ordinal}, {rng.choice(_PHRASES[operation.operator]).format(operation.right)}."
        for ordinal, operation in zip(ORDINALS, operations, strict=False)
    ]
    text = f"{name} has {start} {things}. {' '.join(changes)} How many {things} now?"
    turn_limit = min(MAX_TURNS, len(operations) + rng.randint(1, 2))
    return Problem(text, tuple(operations), turn_limit)


def _draw_operation(rng: random.Random, value: int) -> Operation:
    while True:
        operator = rng.choice(OPERATORS)
        right = rng.randint(2, 3) if operator == "x" else rng.randint(2, 9)
        operation = Operation(value, operator, right)
        if 1 <= operation.result <= LARGEST_NUMBER:
            return operation
