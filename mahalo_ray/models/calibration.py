"""Per-objective statistics of a reward model's scores, so that scores of several objectives add up."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypedDict

import numpy as np
from torch import Tensor

QUANTILES = 101

Spread = Literal["overall", "within_prompt"]


class ObjectiveCalibration(TypedDict):
    """Statistics of one objective's scores on held-out steps.

    `std` is over all steps; `within_prompt_std` is the root of the mean variance among the scores of one
    group (candidates of one prompt), None if groups were not given; `quantiles` are the 0 %, 1 %, ... 100 %
    points.
    """

    mean: float
    std: float
    within_prompt_std: float | None
    quantiles: list[float]
    count: int


def calibrate(scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> ObjectiveCalibration:
    """Statistics of the finite scores; NaN marks a step without one. ValueError if they do not vary."""
    values = np.asarray(scores, dtype=np.float64)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(values)} scores and {len(groups)} groups: give one group per score")
    present = np.isfinite(values)
    if present.sum() < 2 or values[present].std() == 0:
        raise ValueError(f"cannot calibrate on {present.sum()} scores that do not vary")
    within = None
    if groups is not None:
        within = _within_std(values[present], [g for g, p in zip(groups, present, strict=True) if p])
    values = values[present]
    return ObjectiveCalibration(
        mean=float(values.mean()),
        std=float(values.std()),
        within_prompt_std=within,
        quantiles=[float(q) for q in np.quantile(values, np.linspace(0, 1, QUANTILES))],
        count=len(values),
    )


def _within_std(values: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Root of the pooled variance inside groups of at least two, losing one degree of freedom each."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(float(value))
    squares, freedom = 0.0, 0
    for own in members.values():
        squares += float(np.square(np.asarray(own) - np.mean(own)).sum())
        freedom += len(own) - 1
    if freedom == 0 or squares == 0:
        raise ValueError("no group has two different scores: the within-prompt spread cannot be measured")
    return math.sqrt(squares / freedom)


def standardised(
    scores: Tensor,
    objectives: Sequence[str],
    calibration: Mapping[str, ObjectiveCalibration],
    spread: Spread = "overall",
) -> Tensor:
    """(score - mean) / spread for scores [..., H] in the order of `objectives`.

    `within_prompt` divides by the spread among candidates of one prompt, which is what guidance compares.
    """
    means, spreads = [], []
    for name in objectives:
        if name not in calibration:
            raise ValueError(
                f"scores of '{name}' are not calibrated: call fit_calibration on held-out scores"
            )
        own = calibration[name]
        chosen = own["std"] if spread == "overall" else own["within_prompt_std"]
        if chosen is None:
            raise ValueError(f"'{name}' was calibrated without groups: its within-prompt spread is unknown")
        means.append(own["mean"])
        spreads.append(chosen)
    return (scores - scores.new_tensor(means)) / scores.new_tensor(spreads)
