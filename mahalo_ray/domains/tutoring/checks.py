"""Does a simulated student stay the student it is told to be? Three checks on what was said.

They read words, not minds: `speaks_as_tutor` is a list of phrases whose rates on real tutors and students are
measured in docs/rollouts.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mahalo_ray.config.rollouts import Knowledge
from mahalo_ray.data.records import Turn

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
