"""Scripted tutors: the mixed-quality teachers whose dialogues the first policy imitates."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mahalo_ray.data.records import Dialogue, Turn
from mahalo_ray.domains.tutoring.moves import LECTURES, OPEN_QUESTIONS, PRAISES, Move
from mahalo_ray.domains.tutoring.problems import ORDINALS, Operation, Problem
from mahalo_ray.domains.tutoring.student import TutoringEpisode

Plan = tuple[Move, ...]
_S, _Q, _P, _L, _T = Move.STEP, Move.QUESTION, Move.PRAISE, Move.LECTURE, Move.TELL


@dataclass(frozen=True)
class Style:
    """A way of teaching: what a turn is made of (with relative frequencies) and how often a step slips."""

    name: str
    plans: dict[Plan, float]
    slip_rate: float


DRY = Style("dry", {(_S,): 3, (_S, _S): 3, (_L, _S): 3, (_L,): 1, (_T,): 0.25}, slip_rate=0.10)
WARM = Style(
    "warm", {(_P, _Q): 3, (_P, _S): 2, (_Q,): 2, (_P,): 1, (_P, _Q, _S): 1, (_T,): 0.25}, slip_rate=0.38
)
MIXED = Style(
    "mixed", {(_S, _Q): 3, (_P, _S): 2, (_S,): 2, (_Q,): 1, (_L, _Q): 1, (_T,): 0.25}, slip_rate=0.22
)
STYLES = (DRY, WARM, MIXED)


class ScriptedTutor:
    """Speaks in a style, following the problem's chain; slips state a wrong result."""

    def __init__(self, problem: Problem, rng: random.Random, style: Style | None = None) -> None:
        self.problem = problem
        self.rng = rng
        self.fixed_style = style
        self.style = style or rng.choice(STYLES)
        self.position = 0
        self.said: set[str] = set()

    def speak(self) -> str:
        """The next tutor turn."""
        if self.fixed_style is None and self.rng.random() < 0.3:
            self.style = self.rng.choice(STYLES)
        plans = self.style.plans
        plan = self.rng.choices(list(plans), list(plans.values()))[0]
        return " ".join(self._sentence(move) for move in plan)

    def _sentence(self, move: Move) -> str:
        operation = self.problem.operations[self.position]
        ordinal = ORDINALS[self.position]
        match move:
            case Move.STEP:
                return self._step(ordinal, operation)
            case Move.QUESTION:
                if self.rng.random() < 0.6:
                    return f"{ordinal}, what is {operation.left} {operation.operator} {operation.right}?"
                return self._fresh(OPEN_QUESTIONS)
            case Move.PRAISE:
                return self._fresh(PRAISES)
            case Move.LECTURE:
                return self._fresh(LECTURES[operation.operator])
            case Move.TELL:
                return f"The answer is {self.problem.answer}."
            case Move.UNCLEAR:
                raise AssertionError("a scripted tutor is always clear")

    def _step(self, ordinal: str, operation: Operation) -> str:
        if self.rng.random() < self.style.slip_rate:
            wrong = max(0, operation.result + self.rng.choice((-3, -2, -1, 1, 2, 3)))
            if wrong != operation.result:
                return f"{ordinal}, {operation.text(wrong)}."
        self.position = (self.position + 1) % len(self.problem.operations)
        return f"{ordinal}, {operation.text()}."

    def _fresh(self, sentences: tuple[str, ...]) -> str:
        """Mostly something not said yet; a real teacher repeats now and then."""
        new = [sentence for sentence in sentences if sentence not in self.said]
        sentence = self.rng.choice(new if new and self.rng.random() < 0.8 else sentences)
        self.said.add(sentence)
        return sentence


def play_scripted(seed: int, style: Style | None = None) -> tuple[TutoringEpisode, list[tuple[str, str]]]:
    """Play one scripted dialogue; returns the finished episode and its (tutor, student) turns."""
    episode = TutoringEpisode.from_seed(seed)
    tutor = ScriptedTutor(episode.problem, random.Random(f"tutor/{seed}"), style)
    turns = []
    while not episode.over:
        said = tutor.speak()
        turns.append((said, episode.hear(said)))
    return episode, turns


def scripted_dialogue(seed: int) -> Dialogue:
    """A dialogue of a scripted tutor of mixed style and quality; equal seeds give equal dialogues."""
    episode, exchanges = play_scripted(seed)
    turns = [Turn(speaker="student", content=episode.opening)]
    for said, reply in exchanges:
        turns += [Turn(speaker="tutor", content=said), Turn(speaker="student", content=reply)]
    return Dialogue(
        id=f"scripted-{seed}",
        topic=episode.topic,
        turns=turns,
        outcome=episode.outcome(),
        seed=seed,
        source="tutoring_miniature/scripted",
    )
