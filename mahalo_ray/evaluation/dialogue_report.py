"""The report on a set of dialogues: how they ended, scores and lengths by turn, outcomes by persona.

Shards are read one after the other; what stays in memory is a few numbers per dialogue and turn.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mahalo_ray.data import storage
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.evaluation.report import SampleDialogue, SampleTurn, render_page
from mahalo_ray.evaluation.statistics import clustered_mean_interval
from mahalo_ray.rollouts.dialogue_job import CANDIDATES, DIALOGUES
from mahalo_ray.rollouts.tutors import BRANCH

SAMPLES_PER_ENDING = 2
RESAMPLES, BOOTSTRAP_UP_TO = 1000, 5000


@dataclass
class _Turn:
    """The candidate sets of one turn number: lengths in tokens, and scores of all candidates and of the one
    that was chosen."""

    sets: int = 0
    tutor: array[int] = field(default_factory=lambda: array("q"))
    student: array[int] = field(default_factory=lambda: array("q"))
    all: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    chosen: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    spread: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))


@dataclass
class _Values:
    """One metric of a group of dialogues, and the root of every dialogue."""

    values: array[float] = field(default_factory=lambda: array("d"))
    roots: array[int] = field(default_factory=lambda: array("q"))


class _Totals:
    """Sums over all shards."""

    def __init__(self) -> None:
        self.turns: dict[int, _Turn] = defaultdict(_Turn)
        self.ended: Counter[str] = Counter()
        self.dialogues = self.branches = self.candidates = 0
        self.in_tokens = True
        self.roots: dict[str, int] = {}  # dialogue that was begun -> its number; branches share their root's
        self.groups: dict[str, dict[str, _Values]] = defaultdict(lambda: defaultdict(_Values))
        self.sizes: Counter[str] = Counter()
        self.samples: list[Dialogue] = []
        self.sample_scores: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)

    def add_dialogue(self, dialogue: Dialogue) -> None:
        self.dialogues += 1
        self.branches += BRANCH in dialogue.id
        ending = dialogue.ended or "unknown"
        self.ended[ending] += 1
        if self.ended[ending] <= SAMPLES_PER_ENDING:
            self.samples.append(dialogue)
        values = dict(dialogue.outcome)
        checks = dict(dialogue.checks or {})
        if turns := checks.pop("student_turns", 0):
            checks["role_flip_rate"] = checks.pop("role_flips") / turns
        values |= checks
        traits = dialogue.persona or {}
        root = self.roots.setdefault(dialogue.id.partition(BRANCH)[0], len(self.roots))
        for group in ("all", *(f"{trait}: {value}" for trait, value in traits.items())):
            self.sizes[group] += 1
            for name, value in values.items():
                self.groups[group][name].values.append(value)
                self.groups[group][name].roots.append(root)

    def add_set(self, candidate_set: CandidateSet, samples: Mapping[str, Dialogue]) -> None:
        turn = self.turns[candidate_set.turn]
        turn.sets += 1
        self.candidates += len(candidate_set.candidates)
        chosen = candidate_set.candidates[candidate_set.chosen]
        self.in_tokens &= bool(chosen.token_ids)
        turn.tutor.append(len(chosen.token_ids) or len(chosen.content))
        turn.student.append(len(candidate_set.prompt[-1].content))
        for objective, score in (chosen.scores or {}).items():
            scores = [(candidate.scores or {})[objective] for candidate in candidate_set.candidates]
            turn.all[objective].extend(scores)
            turn.chosen[objective].append(score)
            turn.spread[objective].append(float(np.std(scores)))
        if candidate_set.dialogue in samples:
            self.sample_scores[candidate_set.dialogue][candidate_set.turn] = dict(chosen.scores or {})

    def table(self) -> dict[str, Any]:
        objectives = list(dict.fromkeys(name for turn in self.turns.values() for name in turn.chosen))
        columns = list(dict.fromkeys(name for values in self.groups.values() for name in values))
        return {
            "dialogues": self.dialogues,
            "branches": self.branches,
            "candidates": self.candidates,
            "tutor_turns": sum(turn.sets for turn in self.turns.values()),
            "ended": dict(self.ended),
            "unit": "tokens" if self.in_tokens else "characters",
            "objectives": objectives,
            "columns": columns,
            "turns": [_turn_row(n, turn, objectives) for n, turn in sorted(self.turns.items())],
            "groups": [
                {"name": name, "dialogues": size, "estimates": _estimates(self.groups[name])}
                for name, size in sorted(self.sizes.items())
                if self.groups[name]
            ],
        }


def _turn_row(number: int, turn: _Turn, objectives: list[str]) -> dict[str, Any]:
    return {
        "number": number,
        "moments": turn.sets,
        "tutor_mean": float(np.mean(turn.tutor)),
        "tutor_95": float(np.quantile(turn.tutor, 0.95)),
        "student_mean": float(np.mean(turn.student)),
        "scores": {
            name: {
                "all": float(np.mean(turn.all[name])),
                "said": float(np.mean(turn.chosen[name])),
                "spread": float(np.mean(turn.spread[name])),
            }
            for name in objectives
        },
    }


def _estimates(groups: Mapping[str, _Values]) -> dict[str, dict[str, Any]]:
    """Means with intervals that resample the dialogues begun, each with all its branches.

    Bootstrapped; normal with clustered standard errors where there are so many that it makes no difference;
    none for a single dialogue.
    """
    estimates: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        values, roots = np.array(group.values), np.array(group.roots)
        mean = float(values.mean())
        low: float | None = None
        high: float | None = None
        _, member = np.unique(roots, return_inverse=True)
        clusters = int(member.max()) + 1
        if 2 <= clusters <= BOOTSTRAP_UP_TO:
            interval = clustered_mean_interval(values, roots, resamples=RESAMPLES)
            low, high = interval.low, interval.high
        elif clusters > BOOTSTRAP_UP_TO:
            deviations = np.bincount(member, weights=values - mean)
            half = 1.96 * math.sqrt(clusters / (clusters - 1) * float((deviations**2).sum())) / len(values)
            low, high = mean - half, mean + half
        estimates[name] = {"mean": mean, "low": low, "high": high, "count": len(values)}
    return estimates


def dialogue_metrics(output: str) -> tuple[dict[str, Any], list[SampleDialogue]]:
    """Everything the page shows about the shards in `output`, and dialogues to read."""
    totals = _Totals()
    for shard in storage.list_files(storage.join(output, DIALOGUES), ".parquet"):
        for dialogue in Dialogue.read(shard):
            totals.add_dialogue(dialogue)
    samples = {dialogue.id: dialogue for dialogue in totals.samples}
    for shard in storage.list_files(storage.join(output, CANDIDATES), ".parquet"):
        for candidate_set in CandidateSet.read(shard):
            totals.add_set(candidate_set, samples)
    return totals.table(), [_sample(d, totals.sample_scores[d.id]) for d in totals.samples]


def _sample(dialogue: Dialogue, scores: Mapping[int, dict[str, float]]) -> SampleDialogue:
    """Scores stand at the turns played, which come last; those before are the opening."""
    tutor = [index for index, turn in enumerate(dialogue.turns) if turn.speaker == "tutor"]
    played = dict(zip(reversed(tutor), sorted(scores, reverse=True), strict=False))
    turns = [
        SampleTurn(
            speaker=turn.speaker,
            content=turn.content,
            scores=scores[played[index]] if index in played else {},
        )
        for index, turn in enumerate(dialogue.turns)
    ]
    traits = ", ".join(f"{name} {value}" for name, value in (dialogue.persona or {}).items())
    title = f"{dialogue.id} (ended by {dialogue.ended})"
    return SampleDialogue(method=title, topic=traits or dialogue.topic, turns=turns, outcome=dialogue.outcome)


def write_dialogue_report(output: str, name: str, run: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Write the page (self-contained, no script, no requests) and return its metrics. `run`: the stage's
    metrics, failures and pairs among them."""
    metrics, samples = dialogue_metrics(output)
    page = render_page("dialogue_report.html", name=name, figures=metrics, run=run, samples=samples)
    storage.write_bytes(url, page.encode())
    return metrics
