"""Candidate sets from dialogues in play: what could be said at every turn, and what each would lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mahalo_ray.data.records import Candidate, CandidateSet
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.rollouts.dialogues import Conversation, DialogueBatch, derived_seed

Labels = dict[str, float]


class CandidateScorer(Protocol):
    """A reward model that follows the conversations in play over a cache of its own."""

    def score(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[list[int]]]
    ) -> list[list[Labels]]:
        """Scores per objective of every candidate turn [i][k] of the waiting conversations."""
        ...

    def accept(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[list[int]]], choice: Sequence[int]
    ) -> None:
        """Turn choice[i] of those just scored is said in conversation i."""
        ...


@dataclass
class Collector:
    """Plays a batch and keeps every candidate turn.

    `continuations` M > 0 labels each distinct candidate by M independent continuations to the end: accuracy
    is the mean checked outcome, discounted by `gamma` per tutor turn that follows the candidate
    (`rollout_value`), engagement the mean judged rating of the dialogue right after the candidate
    (`judged_prefix`).
    A uniformly drawn candidate goes on, so that later turns are met as the policy meets them.
    """

    batch: DialogueBatch
    num_candidates: int
    continuations: int = 0
    gamma: float = 1.0
    scorer: CandidateScorer | None = None

    def run(self) -> list[CandidateSet]:
        """Play every conversation of the batch to its end; the candidate sets of all their turns."""
        sets: list[CandidateSet] = []
        while waiting := self.batch.active:
            candidates = self.batch.sample(waiting, self.num_candidates)
            sets += self._turn(waiting, candidates)
        return sets

    def _turn(self, waiting: Sequence[Conversation], candidates: Candidates) -> list[CandidateSet]:
        distinct = [_distinct(own) for own in candidates.token_ids]
        labels = self._labels(waiting, distinct) if self.continuations else None
        scores = self.scorer.score(waiting, candidates.token_ids) if self.scorer else None
        choice = [self._drawn(conversation) for conversation in waiting]
        sets = []
        for i, conversation in enumerate(waiting):
            found = []
            for k, ids in enumerate(candidates.token_ids[i]):
                found.append(
                    Candidate(
                        content=self.batch.text_of(ids),
                        token_ids=ids,
                        labels=labels[i][distinct[i].index(ids)] if labels else None,
                        scores=scores[i][k] if scores else None,
                    )
                )
            sets.append(self._candidate_set(conversation, found, choice[i]))
        if self.scorer:
            self.scorer.accept(waiting, candidates.token_ids, choice)
        self.batch.accept(waiting, candidates, choice)
        return sets

    def _candidate_set(self, conversation: Conversation, found: list[Candidate], chosen: int) -> CandidateSet:
        return CandidateSet(
            id=f"{conversation.id}/{conversation.tutor_turns}",
            dialogue=conversation.id,
            topic=conversation.episode.topic,
            turn=conversation.tutor_turns,
            prompt=list(conversation.messages),
            prompt_ids=[token for turn in conversation.turns for token in turn.token_ids or []],
            candidates=found,
            chosen=chosen,
        )

    def _drawn(self, conversation: Conversation) -> int:
        return derived_seed("goes on", conversation.seed, conversation.tutor_turns) % self.num_candidates

    def _labels(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[list[int]]]
    ) -> list[list[Labels]]:
        branches = self.batch.branch(waiting, turns, self.continuations)
        ratings = [[_mean([c.episode.judge_prefix() for c in copies]) for copies in own] for own in branches]
        self.batch.play_out([c for own in branches for copies in own for c in copies])
        return [
            [
                {
                    "accuracy": _mean([self._value(c, conversation) for c in copies]),
                    "engagement": rating,
                }
                for copies, rating in zip(own, own_ratings, strict=True)
            ]
            for conversation, own, own_ratings in zip(waiting, branches, ratings, strict=True)
        ]

    def _value(self, continued: Conversation, origin: Conversation) -> float:
        later_turns = continued.tutor_turns - origin.tutor_turns - 1
        return continued.episode.outcome()["accuracy"] * self.gamma**later_turns


def _distinct(turns: Sequence[list[int]]) -> list[list[int]]:
    return list(map(list, dict.fromkeys(map(tuple, turns))))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
