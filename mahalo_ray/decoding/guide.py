"""One reward model beside a decoder, following many responses; ours over a kept cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.boundaries import Boundary
from mahalo_ray.decoding.candidates import StopReason
from mahalo_ray.decoding.policy import CachedBackbone
from mahalo_ray.decoding.requests import StepCandidate
from mahalo_ray.decoding.reward_cache import RewardConversations
from mahalo_ray.decoding.stopping import Vocabulary, step_starts
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.traces import StepEncoder

# Room for the tokens that close a step the policy left open, when it is scored.
CLOSING_ROOM = 16
_OPEN = (StopReason.STEP, StopReason.LENGTH, StopReason.CONTEXT)


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, as messages and as the policy's tokens."""

    messages: Sequence[Message]
    token_ids: list[int]


class Guide(Protocol):
    """One reward model that follows many responses. Row numbers are its own and valid until `drop`.

    `max_context`: most tokens of the policy that a conversation may have, None where they are not what
    counts.
    """

    max_context: int | None

    @property
    def tokens_forwarded(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...

    def check(self, messages: Sequence[Message]) -> None:
        """ValueError for a prompt this model cannot read."""
        ...

    def open(self, prompts: Sequence[Prompt]) -> list[int]: ...

    def score(
        self, rows: Sequence[int], offered: Sequence[Sequence[StepCandidate]], whole: Sequence[bool]
    ) -> tuple[Tensor, list[int]]:
        """Scores [N, K, H] of every candidate (NaN beyond a row's own, and for a row whose text has become
        too long) and the tokens encoded for every row. whole[i]: candidates of row i are whole responses, of
        which the last step counts."""
        ...

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None: ...

    def duplicate(self, rows: Sequence[int]) -> list[int]: ...

    def drop(self, rows: Sequence[int]) -> None: ...


class CachedGuide:
    """A process reward model over its own kept cache; it reads the policy's tokens as they are."""

    def __init__(
        self,
        model: ProcessRewardModel,
        backbones: Sequence[CachedBackbone],
        boundary: Boundary,
        chat: ChatFormat,
        vocabulary: Vocabulary,
    ) -> None:
        self._encoder = StepEncoder(chat.tokenizer, model.step_separator)
        self._boundary, self._vocabulary = boundary, vocabulary
        self._followed = RewardConversations(model, backbones)
        self.max_context: int | None = self._followed.max_context - CLOSING_ROOM
        self._unread: dict[int, int] = {}  # tokens of prompts that the first scoring will encode

    @property
    def tokens_forwarded(self) -> int:
        return self._followed.tokens_forwarded

    @property
    def peak_bytes(self) -> int:
        return self._followed.peak_bytes

    def check(self, messages: Sequence[Message]) -> None:
        """Whatever the policy can read."""

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        rows = self._followed.add(len(prompts))
        self._followed.append(rows, [prompt.token_ids for prompt in prompts])
        self._unread.update({row: len(p.token_ids) for row, p in zip(rows, prompts, strict=True)})
        return rows

    def score(
        self, rows: Sequence[int], offered: Sequence[Sequence[StepCandidate]], whole: Sequence[bool]
    ) -> tuple[Tensor, list[int]]:
        views = [[self._as_scored(c, w) for c in own] for own, w in zip(offered, whole, strict=True)]
        ids = [[own_ids for own_ids, _ in own] for own in views]
        starts = [[start for _, start in own] for own in views]
        scores = self._followed.score_candidates(rows, ids, starts)
        distinct = [sum(map(len, set(map(tuple, own)))) for own in ids]
        return scores, [self._unread.pop(row, 0) + count for row, count in zip(rows, distinct, strict=True)]

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        self._followed.accept(rows, [candidate.token_ids for candidate in chosen])

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        return self._followed.duplicate(rows)

    def drop(self, rows: Sequence[int]) -> None:
        self._followed.drop(rows)
        for row in rows:
            self._unread.pop(row, None)

    def _as_scored(self, candidate: StepCandidate, whole: bool) -> tuple[list[int], int]:
        """Token ids as the reward model learned to read them, and where the step to score begins in them.

        Where steps end with a separator, a response that ended without one is given it, as in training.
        """
        ids = candidate.token_ids
        start = step_starts(ids, self._boundary, self._vocabulary)[-1] if whole else 0
        if self._encoder.separator is None or candidate.reason in _OPEN:
            return ids, start
        return ids[:start] + self._encoder.step_ids(self._encoder.format.decode(ids[start:])), start
