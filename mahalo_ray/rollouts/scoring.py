"""A reward model beside the dialogues in play: scores of candidate turns, and the choice they guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from mahalo_ray.decoding.cached_scorer import RewardConversations
from mahalo_ray.decoding.cpu_matmul import OneDNNRewardModel
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import standardised
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogues import Conversation, Offered
from mahalo_ray.rollouts.tutors import TutorTurn

Scores = dict[str, float]


class CandidateScorer(Protocol):
    """A reward model that follows the conversations in play."""

    def score(self, offered: Offered) -> list[list[Scores]]:
        """Scores per objective of every candidate turn [i][k]."""
        ...

    def accept(self, offered: Offered, choice: Sequence[int]) -> None:
        """Turn choice[i] of those just scored is said in conversation i."""
        ...

    def split_off(
        self, offered: Offered, chosen: Sequence[Sequence[int]], made: Sequence[Sequence[Conversation]]
    ) -> None:
        """Before `accept`: in new dialogue made[i][j], candidate chosen[i][j] of those scored is said."""
        ...


class CachedScorer:
    """Follows opened conversations over the reward model's own cache, in the tutor's tokens: each is encoded
    once.

    A reward model whose steps end with a separator reads a candidate as it learned to: its text, closed with
    that. Said turns are then read again as they were sampled, once.
    """

    def __init__(self, model: ProcessRewardModel, conversations: Sequence[Conversation]) -> None:
        self.model = model
        self.followed = RewardConversations(model)
        rows = self.followed.add(len(conversations))
        self._row = {c.id: row for c, row in zip(conversations, rows, strict=True)}
        self._read = dict.fromkeys(self._row, 0)

    def score(self, offered: Offered) -> list[list[Scores]]:
        scores = self.tensor(offered)
        names = self.model.objectives
        return [
            [dict(zip(names, scores[i, k].tolist(), strict=True)) for k in range(len(own))]
            for i, own in enumerate(offered.turns)
        ]

    def tensor(self, offered: Offered) -> torch.Tensor:
        """The same scores as a tensor [N, K, H]."""
        self._catch_up(offered.conversations)
        rows = [self._row[c.id] for c in offered.conversations]
        read = [[self._as_scored(turn) for turn in own] for own in offered.turns]
        return self.followed.score_candidates(rows, read)

    def accept(self, offered: Offered, choice: Sequence[int]) -> None:
        """What the student replies is read at the next scoring."""
        rows = [self._row[c.id] for c in offered.conversations]
        said = [own[k].token_ids for own, k in zip(offered.turns, choice, strict=True)]
        self.followed.accept(rows, said)
        for conversation in offered.conversations:
            self._read[conversation.id] += 1

    def split_off(
        self, offered: Offered, chosen: Sequence[Sequence[int]], made: Sequence[Sequence[Conversation]]
    ) -> None:
        for origin, turns, picks, own in zip(offered.conversations, offered.turns, chosen, made, strict=True):
            rows = self.followed.duplicate([self._row[origin.id]] * len(own))
            self.followed.accept(rows, [turns[k].token_ids for k in picks])
            for conversation, row in zip(own, rows, strict=True):
                self._row[conversation.id] = row
                self._read[conversation.id] = self._read[origin.id] + 1

    def _as_scored(self, turn: TutorTurn) -> Sequence[int]:
        return turn.token_ids if self.model.step_separator is None else self.model.encoder.step_ids(turn.text)

    def _catch_up(self, waiting: Sequence[Conversation]) -> None:
        """Append the turns the reward model has not read yet."""
        rows, unread = [], []
        for conversation in waiting:
            read = self._read[conversation.id]
            turns = conversation.turns[read:]
            if turns:
                rows.append(self._row[conversation.id])
                unread.append([token for turn in turns for token in turn.token_ids or []])
                self._read[conversation.id] = len(conversation.turns)
        self.followed.append(rows, unread)


class TextScorer:
    """Scores candidates as text, the whole conversation each time: for a reward model with another tokenizer
    than the tutor's, and for turns that came without token ids."""

    def __init__(self, model: ProcessRewardModel) -> None:
        self.model = model
        self._fast = OneDNNRewardModel(model)

    def score(self, offered: Offered) -> list[list[Scores]]:
        """A turn without words, which is no step to score, is as bad as its worst rival."""
        traces = {
            (i, turn.text): (conversation.messages, [turn.text])
            for i, (conversation, own) in enumerate(zip(offered.conversations, offered.turns, strict=True))
            for turn in own
            if turn.text.strip()
        }
        with self._fast():
            scored = self.model.score_batch(list(traces.values()))
        found = {
            key: {name: values[0] for name, values in scores.items()}
            for key, scores in zip(traces, scored, strict=True)
        }
        return [
            [found.get((i, turn.text)) or self._worst(found, i) for turn in own]
            for i, own in enumerate(offered.turns)
        ]

    def accept(self, offered: Offered, choice: Sequence[int]) -> None:
        """Nothing is kept."""

    def split_off(
        self, offered: Offered, chosen: Sequence[Sequence[int]], made: Sequence[Sequence[Conversation]]
    ) -> None:
        """Nothing is kept."""

    def _worst(self, found: Mapping[tuple[int, str], Scores], conversation: int) -> Scores:
        spoken = [scores for (i, _), scores in found.items() if i == conversation]
        return {name: min((own[name] for own in spoken), default=0.0) for name in self.model.objectives}


class GuidedChoice:
    """Takes the candidate with the largest weighted sum of standardised scores (argmax guidance)."""

    def __init__(self, scorer: CachedScorer, guidance: Weights) -> None:
        self.scorer = scorer
        self.weights = torch.tensor(guidance.over(scorer.model.objectives))

    def __call__(self, offered: Offered) -> list[int]:
        model = self.scorer.model
        raw = self.scorer.tensor(offered)
        scores = standardised(raw, model.objectives, model.calibration, "within_prompt")
        choice: list[int] = (scores @ self.weights).argmax(dim=1).tolist()
        self.scorer.accept(offered, choice)
        return choice
