"""How engaging the explanation of a solution is, judged by a program from its words alone.

The judge reads any English text, generated or real. It knows nothing of whether a calculation is right, and
no model takes part: what guides a policy and what judges it stay apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# What each quality of a step is worth; together 1.
REASON, ADDRESS, ASK, VARIED = 0.4, 0.15, 0.35, 0.1

_SENTENCE = re.compile(r"[^.!?\n]*(?:\.(?=\d)[^.!?\n]*)*[.!?]*")
_WHY = re.compile(r"\b(because|since|so that|therefore|that is why|the reason)\b", re.IGNORECASE)
_READER = re.compile(r"\b(you|your|yours|you're|let's|let us)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_EQUATION = re.compile(r"[\d.,$%()\s+\-−*/×x÷]*\d[\d.,$%()\s+\-−*/×x÷]*=")


@dataclass(frozen=True)
class StepRating:
    """What one step has; `value` is their worth in [0, 1]."""

    reason: bool
    address: bool
    ask: bool
    varied: bool

    @property
    def value(self) -> float:
        return REASON * self.reason + ADDRESS * self.address + ASK * self.ask + VARIED * self.varied


def rate_step(step: str, earlier: Sequence[str] = ()) -> StepRating:
    """Rate one step of a response behind its `earlier` steps.

    - reason: a sentence says why (because, since, therefore, ...) and names a number of the step's equation;
    - address: a sentence speaks to the reader (you, let us);
    - ask: a sentence asks or anticipates (ends in a question mark);
    - varied: it opens with another word than the step before (the first step: has any of the three).

    A sentence that stood in an earlier step, numbers aside, counts for nothing: who asks the same at every
    step is not engaging. Reasons are compared with their numbers, since one may give a like reason twice.

    Example:
        >>> rate_step("We add because Mia finds 5 more. So 12 + 5 = 17. What comes next?").value
        0.85
        >>> rate_step("So 12 + 5 = 17.").value
        0.0
    """
    said = [sentence for text in earlier for sentence in _sentences(text)]
    said_exactly, said_before = set(said), {_without_numbers(sentence) for sentence in said}
    operands = {number for equation in _EQUATION.findall(step) for number in _NUMBER.findall(equation)}
    reason = address = ask = False
    for sentence in _sentences(step):
        if _WHY.search(sentence) and sentence not in said_exactly:
            reason |= not operands.isdisjoint(_NUMBER.findall(sentence))
        if _without_numbers(sentence) not in said_before:
            address |= bool(_READER.search(sentence))
            ask |= sentence.endswith("?")
    if earlier:
        varied = bool(_opening(step)) and _opening(step) != _opening(earlier[-1])
    else:
        varied = reason or address or ask
    return StepRating(reason, address, ask, varied)


def engagement(steps: Sequence[str], needed: int = 1) -> float:
    """Mean rating of the steps of a response, in [0, 1]. Steps that are missing of those that are `needed`
    count 0.

    Example:
        >>> engagement(["So 2 + 3 = 5.", "Can you go on? Then 5 + 1 = 6."])
        0.3
    """
    ratings = [rate_step(step, steps[:number]).value for number, step in enumerate(steps)]
    return sum(ratings) / max(len(ratings), needed, 1)


def judge_engagement(prompt: Sequence[dict[str, str]], steps: Sequence[str], answer: str | None) -> float:
    """`engagement` as a judge of kind `program` calls it; of the steps, those with words count."""
    del prompt, answer  # the explanation alone is judged
    return engagement([step for step in steps if step.strip()])


def _sentences(text: str) -> list[str]:
    return [sentence.strip().lower() for sentence in _SENTENCE.findall(text) if sentence.strip()]


def _without_numbers(sentence: str) -> str:
    return _NUMBER.sub("#", sentence)


def _opening(step: str) -> str:
    """Its first word, in lower case; empty where it has none."""
    found = re.search(r"[^\W\d_]+", step)
    return found.group().lower() if found else ""
