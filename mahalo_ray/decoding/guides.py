"""The reward models beside a decoder: several at once, ours over kept caches, others over the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.boundaries import Boundary
from mahalo_ray.decoding.guidance import ScoreScale
from mahalo_ray.decoding.guide import CachedGuide, Guide, Prompt
from mahalo_ray.decoding.policy import CachedBackbone
from mahalo_ray.decoding.requests import GuidedRequest, StepCandidate
from mahalo_ray.decoding.reward_cache import cached_backbones
from mahalo_ray.decoding.stopping import Vocabulary
from mahalo_ray.decoding.text_guide import TextGuide
from mahalo_ray.models.foreign import SequenceClassifierScorer
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepScorer, TraceScorer


class Guides:
    """All reward models of a session side by side; their objectives follow each other."""

    def __init__(
        self,
        scorers: Sequence[StepScorer],
        backbones: Sequence[Sequence[CachedBackbone]],
        boundary: Boundary,
        chat: ChatFormat,
        vocabulary: Vocabulary,
    ) -> None:
        self.scale = ScoreScale.of(scorers)
        self._guides: list[Guide] = []
        for scorer, own in zip(scorers, backbones, strict=True):
            if isinstance(scorer, ProcessRewardModel):
                self._guides.append(CachedGuide(scorer, own, boundary, chat, vocabulary))
            elif isinstance(scorer, SequenceClassifierScorer | TraceScorer):
                self._guides.append(TextGuide(scorer, boundary, vocabulary))
            else:
                raise ValueError(f"{type(scorer).__name__} cannot guide decoding")
        self._rows: dict[int, tuple[int, ...]] = {}
        self._next = 0

    @property
    def max_context(self) -> int | None:
        """Most tokens of the policy that a conversation may have; None: no limit."""
        return min((g.max_context for g in self._guides if g.max_context is not None), default=None)

    @property
    def tokens_forwarded(self) -> int:
        """Tokens encoded by all of them."""
        return sum(guide.tokens_forwarded for guide in self._guides)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values kept."""
        return sum(guide.peak_bytes for guide in self._guides)

    def check(self, messages: Sequence[Message]) -> None:
        """ValueError for a prompt that one of the models cannot read."""
        for guide in self._guides:
            guide.check(messages)

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        """Rows that follow the responses to these prompts."""
        return self._numbered([guide.open(prompts) for guide in self._guides])

    def score(
        self, rows: Sequence[int], offered: Sequence[Sequence[StepCandidate]], whole: Sequence[bool]
    ) -> tuple[Tensor, list[int]]:
        """As `Guide.score`, for all objectives."""
        each = [
            guide.score(own, offered, whole) for guide, own in zip(self._guides, self._own(rows), strict=True)
        ]
        return torch.cat([scores for scores, _ in each], dim=-1), [
            sum(counts) for counts in zip(*(counts for _, counts in each), strict=True)
        ]

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        """These candidates are now part of the responses."""
        for guide, own in zip(self._guides, self._own(rows), strict=True):
            guide.accept(own, chosen)

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        """Rows of copies that go on independently."""
        return self._numbered(
            [guide.duplicate(own) for guide, own in zip(self._guides, self._own(rows), strict=True)]
        )

    def drop(self, rows: Sequence[int]) -> None:
        """Forget rows."""
        for guide, own in zip(self._guides, self._own(rows), strict=True):
            guide.drop(own)
        for row in rows:
            del self._rows[row]

    def _own(self, rows: Sequence[int]) -> list[list[int]]:
        """The same rows in each guide's numbers."""
        return [[self._rows[row][at] for row in rows] for at in range(len(self._guides))]

    def _numbered(self, each: Sequence[Sequence[int]]) -> list[int]:
        given = list(zip(*each, strict=True))
        rows = list(range(self._next, self._next + len(given)))
        self._next += len(given)
        self._rows.update(zip(rows, given, strict=True))
        return rows


def check_guidance(request: GuidedRequest, guides: Guides | None, messages: Sequence[Message]) -> None:
    """ValueError if this request cannot be guided as it asks."""
    if not request.is_guided:
        if request.guidance is not None and request.strategy == "none":
            raise ValueError("guidance was given with strategy 'none', which does not use it")
        return
    if guides is None:
        raise ValueError(f"strategy '{request.strategy}' needs a reward model; this decoder has none")
    scale = guides.scale
    request.guidance_over(scale.objectives).over(scale.objectives)
    if request.standardisation == "calibrated" and not scale.is_calibrated:
        raise ValueError(
            "standardisation 'calibrated' needs the within-prompt spread of every objective, which not all "
            f"reward models of {', '.join(scale.objectives)} carry: use 'within_candidates'"
        )
    guides.check(messages)


def backbones_of(scorers: Sequence[StepScorer]) -> list[list[CachedBackbone]]:
    """The checked backbones of those that keep a cache; made once, used by every session."""
    return [cached_backbones(s) if isinstance(s, ProcessRewardModel) else [] for s in scorers]
