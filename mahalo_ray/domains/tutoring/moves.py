"""What a tutor can say in the miniature, sentence by sentence, and how each sentence is understood.

The student, the judge and the malformed-turn check all read a tutor turn through `parse_turn`: nothing but
the text decides what a turn does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from mahalo_ray.domains.tutoring.problems import ORDINALS, Operation, Operator


class Move(Enum):
    """The kinds of sentence."""

    STEP = "step"
    QUESTION = "question"
    PRAISE = "praise"
    LECTURE = "lecture"
    TELL = "tell"
    UNCLEAR = "unclear"


PRAISES = (
    "Great work so far!",
    "You are doing really well!",
    "I like how you think!",
    "What a good try!",
    "You can do this!",
    "That was clever!",
)
OPEN_QUESTIONS = (
    "Which step comes next?",
    "How would you start here?",
    "Can you explain why?",
    "What do you notice?",
)
LECTURES: dict[Operator, tuple[str, ...]] = {
    "+": (
        "Remember that adding means we count on from the first number.",
        "The rule for adding is to join both groups and count them all.",
    ),
    "-": (
        "Remember that taking away means we count back from the first number.",
        "The rule for taking away is to remove one group and count what is left.",
    ),
    "x": (
        "Remember that times means we add the same number again and again.",
        "The rule for times is to make equal groups and count them all.",
    ),
}

_LECTURE_OF = {sentence: operator for operator, sentences in LECTURES.items() for sentence in sentences}
_ORDINAL = f"(?:{'|'.join(ORDINALS)})"
_STEP = re.compile(_ORDINAL + r", (\d+) ([-+x]) (\d+) = (\d+)\.")
_ASK = re.compile(_ORDINAL + r", what is (\d+) ([-+x]) (\d+)\?")
_TELL = re.compile(r"The answer is (\d+)\.")
_SENTENCE = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")


@dataclass(frozen=True)
class Sentence:
    """One understood sentence: its move, and what the move is about."""

    text: str
    move: Move
    operation: Operation | None = None
    stated: int | None = None
    skill: Operator | None = None


def parse_turn(text: str) -> list[Sentence]:
    """The sentences of a tutor turn in order. An empty turn is one UNCLEAR sentence."""
    sentences = [match.group().strip() for match in _SENTENCE.finditer(text) if match.group().strip()]
    return [parse_sentence(sentence) for sentence in sentences] or [Sentence("", Move.UNCLEAR)]


def parse_sentence(text: str) -> Sentence:
    """Understand one sentence; what fits no known form is UNCLEAR."""
    if text in PRAISES:
        return Sentence(text, Move.PRAISE)
    if text in OPEN_QUESTIONS:
        return Sentence(text, Move.QUESTION)
    if text in _LECTURE_OF:
        return Sentence(text, Move.LECTURE, skill=_LECTURE_OF[text])
    if match := _STEP.fullmatch(text):
        operation = _operation(match[1], match[2], match[3])
        return Sentence(text, Move.STEP, operation=operation, stated=int(match[4]))
    if match := _ASK.fullmatch(text):
        return Sentence(text, Move.QUESTION, operation=_operation(match[1], match[2], match[3]))
    if match := _TELL.fullmatch(text):
        return Sentence(text, Move.TELL, stated=int(match[1]))
    return Sentence(text, Move.UNCLEAR)


def is_malformed(text: str) -> bool:
    """Whether any sentence of a tutor turn cannot be understood."""
    return any(sentence.move is Move.UNCLEAR for sentence in parse_turn(text))


def _operation(left: str, operator: str, right: str) -> Operation:
    assert operator in ("+", "-", "x")
    return Operation(int(left), operator, int(right))  # type: ignore[arg-type]
