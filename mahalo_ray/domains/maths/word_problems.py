"""The maths miniature: short stories of 2 to 5 changes, each one calculation, and scripted solvers of mixed
quality, whose solutions the SFT model imitates."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable
from dataclasses import dataclass, replace

from mahalo_ray.data.records import Dialogue
from mahalo_ray.domains.math import final_answer, is_correct
from mahalo_ray.domains.maths.explanations import engagement, rate_step
from mahalo_ray.domains.protocol import AnswerEpisode, DomainObjective, Speaker
from mahalo_ray.domains.tutoring.problems import OPERATORS, Operation, Operator

LARGEST_RESULT = 24
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
    return 12 + 9 * steps


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
        right = rng.randint(2, 3) if operator == "x" else rng.randint(2, 7)
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


TERSE = Voice("terse", 0.05, 0.05, 0.02, slip=0.03)
CHATTY = Voice("chatty", 0.65, 0.65, 0.35, slip=0.16)
MIXED_VOICE = Voice("mixed", 0.35, 0.3, 0.15, slip=0.08)
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
        value = max(0, operation.result)  # below 0 only behind a slip
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


_SENTENCES = [*map(re.escape, (*QUESTIONS, *ADDRESSES))]
_EVENT = "|".join(event.format(r"\d+") for events in _EVENTS.values() for event in events)
_OTHER = rf"(?:{'|'.join(_SENTENCES)}|We (?:{'|'.join(_VERBS.values())}) because \w+ (?:{_EVENT})\.)"
_CALCULATION = rf"(?:{'|'.join(OPENERS)}) \d+ [-+x] \d+ = \d+\."
_LINE = re.compile(rf"(?:{_OTHER} )*{_CALCULATION}(?: {_OTHER})*|#### \d+")

OBJECTIVES = {
    "accuracy": DomainObjective(
        "is the final answer right, and within the words allowed", ("rollout_value", "judged_rollouts")
    ),
    "engagement": DomainObjective(
        "does every step say why, speak to the reader, ask, and vary", ("judged_prefix", "rollout_value")
    ),
}


@dataclass
class WordProblemEpisode(AnswerEpisode):
    """A word problem and its solution so far, line by line."""

    problem: WordProblem | None = None

    @property
    def posed(self) -> WordProblem:
        """The problem, which every episode has."""
        assert self.problem is not None
        return self.problem

    @property
    def problem_key(self) -> Hashable:
        """The calculations: who has what is the same to a learner."""
        return tuple(change.operation for change in self.posed.changes)

    @property
    def lines(self) -> list[str]:
        """What was written so far, the line with the answer left out."""
        lines = [line.strip() for line in self.answer.split("\n")]
        return [line for line in lines if line and final_answer(line) is None]

    def judge_prefix(self) -> dict[str, float]:
        """Engagement of the last line; of the whole explanation once it is complete."""
        lines = self.lines
        if self.complete or not lines:
            return {"engagement": engagement(lines, len(self.posed.changes))}
        return {"engagement": rate_step(lines[-1], lines[:-1]).value}

    def outcome(self) -> dict[str, float]:
        """Accuracy: 1 if a complete solution within the word limit marks the right answer. Engagement: the
        mean rating of the lines that the problem needs, and of those beyond."""
        marked = final_answer(self.answer)
        fits = self.complete and len(self.answer.split()) <= self.posed.word_limit
        right = fits and marked is not None and is_correct(f"#### {marked}", str(self.posed.answer))
        return {"accuracy": float(right), "engagement": engagement(self.lines, len(self.posed.changes))}


class MathsMiniature:
    """The miniature as a domain: one solution, whose lines are its steps."""

    boundary = "lines"
    speakers: tuple[Speaker, Speaker] = ("assistant", "user")
    objectives = OBJECTIVES

    def episode(self, seed: int) -> WordProblemEpisode:
        problem = make_word_problem(random.Random(f"maths/{seed}"))
        return WordProblemEpisode(seed, problem.question, problem.topic, 10, problem=problem)

    def sft_dialogue(self, seed: int) -> Dialogue:
        episode = self.episode(seed)
        lines = write_solution(episode.posed, random.Random(f"solution/{seed}"))
        return episode.dialogue("\n".join(lines), "maths_miniature/scripted")

    def is_malformed(self, text: str) -> bool:
        lines = text.strip().split("\n")
        return not all(_LINE.fullmatch(line) for line in lines)


DOMAIN = MathsMiniature()
