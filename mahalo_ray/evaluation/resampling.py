"""Bootstrap intervals of any statistic of grouped rows, whole groups at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mahalo_ray.evaluation.statistics import FloatArray


@dataclass(frozen=True)
class Resampling:
    """How intervals are made. The same settings and groups draw the same resamples, so that figures of two
    models on one data set can be compared resample by resample."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class GroupedFigure:
    """A figure of `n` samples with its percentile interval; `samples` are the bootstrap's [resamples]."""

    value: float
    low: float
    high: float
    n: int
    samples: FloatArray = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Without the bootstrap's samples."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def minus(self, other: GroupedFigure, confidence: float) -> GroupedFigure:
        """The paired difference; both must be of the same rows and resampling."""
        return _figure(self.value - other.value, self.n, self.samples - other.samples, confidence)


def grouped_figure(
    statistic: Callable[..., float],
    columns: Sequence[FloatArray],
    groups: Sequence[str],
    how: Resampling,
) -> GroupedFigure | None:
    """`statistic`(*columns) over rows that belong to `groups`; resampled are the groups. None where the data
    leave it undefined (NaN)."""
    value = statistic(*columns)
    if math.isnan(value):
        return None
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(member, kind="stable")
    rows_of = np.split(order, np.flatnonzero(np.diff(member[order])) + 1)
    generator = np.random.default_rng(how.seed)
    samples = []
    for _ in range(how.resamples):
        rows = np.concatenate([rows_of[i] for i in generator.integers(0, len(rows_of), len(rows_of))])
        samples.append(statistic(*(column[rows] for column in columns)))
    return _figure(value, len(columns[0]), np.array(samples), how.confidence)


def _figure(value: float, n: int, samples: FloatArray, confidence: float) -> GroupedFigure:
    """Resamples in which the statistic is undefined (one class only) are left out of the interval."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail]) if not np.isnan(samples).all() else (np.nan, np.nan)
    return GroupedFigure(value, float(low), float(high), n, samples)
