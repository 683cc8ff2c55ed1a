"""Which of the scored candidates goes on: the best, a sampled one, or any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogues import Conversation
from mahalo_ray.rollouts.seeds import derived_seed, unit_draw


@dataclass(frozen=True)
class Continuation:
    """`guidance`: weights over the scores' objectives (None: all alike); `temperature`: of `sampled`."""

    kind: Literal["best", "sampled", "random"] = "random"
    guidance: Weights | None = None
    temperature: float = 1.0


def totals(scores: Sequence[Mapping[str, float]], guidance: Weights | None) -> np.ndarray:
    """Weighted sum [K] of scores, each objective standardised among the K candidates (0 where all agree)."""
    objectives = list(scores[0])
    values = np.array([[own[name] for name in objectives] for own in scores])
    spread = values.std(axis=0)
    standardised = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    weights = (guidance or Weights.balanced(objectives)).over(objectives)
    total: np.ndarray = standardised @ np.array(weights)
    return total


def continuing(
    continuation: Continuation,
    conversation: Conversation,
    count: int,
    scores: Sequence[Mapping[str, float]] | None,
) -> list[int]:
    """Candidates of one moment, the one that goes on first; the others in the order they would follow.

    Draws depend on the dialogue and the turn alone. `sampled` draws all of them without replacement
    (Gumbel-max), so that the first is distributed as softmax(total / temperature).
    """
    seed, turn = conversation.seed, conversation.tutor_turns
    if continuation.kind == "random":
        first = derived_seed("goes on", seed, turn) % count
        return [first, *(k for k in range(count) if k != first)]
    assert scores is not None, "the configuration asks for a reward model"
    total = totals(scores, continuation.guidance)
    if continuation.kind == "sampled":
        noise = [unit_draw("sampled", seed, turn, k) for k in range(count)]
        total = total / continuation.temperature - np.array([math.log(-math.log(u or 0.5)) for u in noise])
    return [int(k) for k in np.argsort(-total, kind="stable")]
