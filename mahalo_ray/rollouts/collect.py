"""Candidate sets from dialogues in play: what could be said at every turn, and what each would lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mahalo_ray.config import BranchingConfig
from mahalo_ray.data.records import Candidate, CandidateSet
from mahalo_ray.domains.tutoring.student import Episode
from mahalo_ray.rollouts.dialogues import Continuation, Conversation, DialogueBatch, Offered, continuing
from mahalo_ray.rollouts.scoring import CandidateScorer
from mahalo_ray.rollouts.tutors import TutorTurn

Labels = dict[str, float]


@dataclass
class Collector:
    """Plays a batch and keeps every candidate turn.

    `continuations` M > 0 labels each distinct candidate by M independent continuations to the end (the
    miniature's students only): accuracy is the mean checked outcome, discounted by `gamma` per tutor turn
    that follows the candidate (`rollout_value`), engagement the mean judged rating of the dialogue right
    after the candidate (`judged_prefix`).
    `continuation` says which candidate goes on; by default a uniformly drawn one, so that later turns are met
    as the policy meets them. With `branching`, others go on too, as dialogues of their own.
    """

    batch: DialogueBatch
    num_candidates: int
    continuations: int = 0
    gamma: float = 1.0
    scorer: CandidateScorer | None = None
    continuation: Continuation = field(default_factory=Continuation)
    branching: BranchingConfig | None = None

    def run(self) -> list[CandidateSet]:
        """Play every conversation of the batch to its end; the candidate sets of all their turns."""
        sets: list[CandidateSet] = []
        while waiting := self.batch.active:
            offered = self.batch.sample(waiting, self.num_candidates)
            if offered.conversations:
                sets += self._turn(offered)
        return sets

    def _turn(self, offered: Offered) -> list[CandidateSet]:
        distinct = [list(dict.fromkeys(own)) for own in offered.turns]
        labels = self._labels(offered.conversations, distinct) if self.continuations else None
        scores = self.scorer.score(offered) if self.scorer else None
        order = [
            continuing(self.continuation, conversation, len(own), None if scores is None else scores[i])
            for i, (conversation, own) in enumerate(zip(offered.conversations, offered.turns, strict=True))
        ]
        choice = [own[0] for own in order]
        sets = []
        for i, conversation in enumerate(offered.conversations):
            found = [
                Candidate(
                    content=turn.text,
                    token_ids=list(turn.token_ids),
                    labels=labels[i][distinct[i].index(turn)] if labels else None,
                    scores=scores[i][k] if scores else None,
                )
                for k, turn in enumerate(offered.turns[i])
            ]
            sets.append(_candidate_set(conversation, found, choice[i]))
        self._go_on(offered, order)
        return sets

    def _go_on(self, offered: Offered, order: Sequence[Sequence[int]]) -> None:
        """Say the first of every conversation's `order`; where dialogues branch, say the next ones too."""
        more = [
            self._also(conversation, own, picks)
            for conversation, own, picks in zip(offered.conversations, offered.turns, order, strict=True)
        ]
        split: list[Conversation] = []
        if any(more):
            made = self.batch.split_off(offered, more)
            if self.scorer:
                self.scorer.split_off(offered, more, made)
            split = [conversation for own in made for conversation in own]
        choice = [picks[0] for picks in order]
        if self.scorer:
            self.scorer.accept(offered, choice)
        self.batch.accept(offered, choice)
        if split:
            said = [own[k] for own, picks in zip(offered.turns, more, strict=True) for k in picks]
            self.batch.go_on(split, said)

    def _also(
        self, conversation: Conversation, turns: Sequence[TutorTurn], order: Sequence[int]
    ) -> list[int]:
        """Which candidates besides the first of `order` go on: other words than those taken already."""
        if self.branching is None or conversation.tutor_turns >= self.branching.depth:
            return []
        taken = {turns[order[0]]: order[0]}
        for k in order[1:]:
            if len(taken) < self.branching.width:
                taken.setdefault(turns[k], k)
        return list(taken.values())[1:]

    def _labels(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[TutorTurn]]
    ) -> list[list[Labels]]:
        branches = self.batch.branch(waiting, turns, self.continuations)
        ratings = [
            [_mean([_episode(c).judge_prefix() for c in copies]) for copies in own] for own in branches
        ]
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
        return _episode(continued).outcome()["accuracy"] * self.gamma**later_turns


def _candidate_set(conversation: Conversation, found: list[Candidate], chosen: int) -> CandidateSet:
    return CandidateSet(
        id=f"{conversation.id}/{conversation.tutor_turns}",
        dialogue=conversation.id,
        topic=conversation.student.topic,
        turn=conversation.tutor_turns,
        prompt=list(conversation.messages),
        prompt_ids=[token for turn in conversation.turns for token in turn.token_ids or []],
        candidates=found,
        chosen=chosen,
    )


def _episode(conversation: Conversation) -> Episode:
    assert isinstance(conversation.student, Episode), "labels by continuations are the miniature's"
    return conversation.student


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
