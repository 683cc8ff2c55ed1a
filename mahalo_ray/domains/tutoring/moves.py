"""What a tutor can say in the miniature, sentence by sentence, and how each sentence is understood.

The student, the judge and the malformed-turn check all read a tutor turn through `parse_turn`: nothing but
the text decides what a turn does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from mahalo_ray.config import Knowledge
from mahalo_ray.data.records import Turn
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


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_TUTOR_WORDS = re.compile(
    r"^\W*(teacher|tutor|assistant|instructor)\s*:"
    r"|\b(great|good|nice|excellent|fantastic|well|amazing) (job|work|done|try|effort|thinking|question)\b"
    r"|\blet'?s (break|look|take a|start|think|work|go|consider)\b"
    r"|\bwhat do you think\b|\b(how|what|why|which|where) (did|do|would|could|will|are|were|have) you\b"
    r"|\bhow you (got|get|did|worked|came|arrived|calculated|would|solved)\b"
    r"|\b(talk|walk|take) me through\b"
    r"|\byou('re| are) (absolutely|almost|nearly|on the|very close|close|so close|getting)\b"
    r"|\b(your|you'?ve) (answer|solution|reasoning|working|calculations?|code|got|done|made)\b"
    r"|\byou (should|need to|might|could|forgot|missed)\b"
    r"|\bhere'?s a hint\b|\bi'?m here to help\b|\bhow can i help\b",
    re.IGNORECASE,
)


def final_number(text: str) -> str | None:
    """The last number of a text without thousands separators; None when it has none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def same_number(text: str, answer: str) -> bool:
    """Whether the last number of `text` is the answer's (6 and 6.0 are the same)."""
    found, wanted = final_number(text), final_number(answer)
    return found is not None and wanted is not None and float(found) == float(wanted)


def says_number(text: str, answer: str) -> bool:
    """Whether the answer's number stands anywhere in the text."""
    wanted = final_number(answer)
    return wanted is not None and any(
        float(found.replace(",", "")) == float(wanted) for found in _NUMBER.findall(text)
    )


def speaks_as_tutor(text: str) -> bool:
    """Whether a student's turn has the words of a tutor (role flip)."""
    return _TUTOR_WORDS.search(text) is not None


def leaks_answer(turns: Sequence[Turn], played_from: int, answer: str) -> bool:
    """Whether the student says the answer before anybody else has: played turns begin at `played_from`."""
    for number, turn in enumerate(turns):
        if says_number(turn.content, answer):
            return turn.speaker == "student" and number >= played_from
    return False


def _solves(knowledge: Knowledge, told: bool) -> bool | None:
    """Whether the latent state solves the post-test: None where it leaves that open: partial knowledge, and a
    student who was told the answer."""
    if knowledge == "solid":
        return True
    return False if knowledge == "none" and not told else None


def consistency(
    turns: Sequence[Turn], played_from: int, knowledge: Knowledge, answer: str | None, post_test: str | None
) -> dict[str, float]:
    """What the checks found in a finished dialogue, as far as they apply to it (1 for yes, 0 for no):

    - student_turns, role_flips: counts over the turns played (those before `played_from` are the opening);
    - answer_leaked: a student that does not know the answer said it before anybody else;
    - post_test_solved, and post_test_kept: whether that is what the persona's knowledge says.
    """
    spoken = [turn.content for turn in turns[played_from:] if turn.speaker == "student"]
    found = {"student_turns": float(len(spoken)), "role_flips": float(sum(map(speaks_as_tutor, spoken)))}
    if answer is None:
        return found
    if knowledge == "none":
        found["answer_leaked"] = float(leaks_answer(turns, played_from, answer))
    if post_test is not None:
        told = any(turn.speaker == "tutor" and says_number(turn.content, answer) for turn in turns)
        solved, expected = same_number(post_test, answer), _solves(knowledge, told)
        found["post_test_solved"] = float(solved)
        if expected is not None:
            found["post_test_kept"] = float(solved == expected)
    return found
