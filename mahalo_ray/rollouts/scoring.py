"""A reward model beside the dialogues in play: scores of candidate turns, and the choice they guide."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.reward_cache import RewardConversations
from mahalo_ray.models.calibration import standardised
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogues import Conversation


class CachedScorer:
    """Follows opened conversations over the reward model's own cache: each token is encoded once."""

    def __init__(self, model: ProcessRewardModel, conversations: Sequence[Conversation]) -> None:
        self.model = model
        self.followed = RewardConversations(model)
        rows = self.followed.add(len(conversations))
        self._row = {c.id: row for c, row in zip(conversations, rows, strict=True)}
        self._read = dict.fromkeys(self._row, 0)

    def score(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[list[int]]]
    ) -> list[list[dict[str, float]]]:
        """Scores per objective of candidate turn [i][k]."""
        scores = self.tensor(waiting, turns)
        names = self.model.objectives
        return [
            [dict(zip(names, scores[i, k].tolist(), strict=True)) for k in range(len(own))]
            for i, own in enumerate(turns)
        ]

    def tensor(self, waiting: Sequence[Conversation], turns: Sequence[Sequence[list[int]]]) -> torch.Tensor:
        """The same scores as a tensor [N, K, H]."""
        self._catch_up(waiting)
        return self.followed.score_candidates([self._row[c.id] for c in waiting], turns)

    def accept(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[list[int]]], choice: Sequence[int]
    ) -> None:
        """Turn choice[i] of conversation i was said; what the student replies is read at the next scoring."""
        rows = [self._row[c.id] for c in waiting]
        said = [own[k] for own, k in zip(turns, choice, strict=True)]
        self.followed.accept(rows, said)
        for conversation in waiting:
            self._read[conversation.id] += 1

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


class GuidedChoice:
    """Takes the candidate with the largest weighted sum of standardised scores (argmax guidance)."""

    def __init__(self, scorer: CachedScorer, guidance: Weights) -> None:
        self.scorer = scorer
        self.weights = torch.tensor(guidance.over(scorer.model.objectives))

    def __call__(self, waiting: Sequence[Conversation], candidates: Candidates) -> list[int]:
        turns = candidates.token_ids
        model = self.scorer.model
        raw = self.scorer.tensor(waiting, turns)
        scores = standardised(raw, model.objectives, model.calibration, "within_prompt")
        choice: list[int] = (scores @ self.weights).argmax(dim=1).tolist()
        self.scorer.accept(waiting, turns, choice)
        return choice
