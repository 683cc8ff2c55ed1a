"""Bootstrap intervals of means, paired differences and grouped metrics; dominance and hypervolume.

Everything is seeded: the same values and settings give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

from mahalo_ray.metrics import FloatArray, finite_array

StudentId = int | str

# Resampled values held in memory at once (8 bytes each).
_CHUNK_VALUES = 4_000_000


class Estimate(BaseModel):
    """A value with its confidence interval, all in the unit of the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0


def bootstrap_means(values: ArrayLike, resamples: int, seed: int) -> FloatArray:
    """Means of `resamples` resamples with replacement of the rows of `values` [n, C] -> [resamples, C].

    One draw of rows serves all columns, so columns stay paired. Raises ValueError for fewer than 2 rows.
    """
    array = finite_array(values, "values to resample", dimensions=2)
    n = len(array)
    if n < 2:
        raise ValueError(f"a bootstrap interval needs at least 2 values, got {n}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_VALUES // (n * array.shape[1]))
    means = []
    for start in range(0, resamples, rows):
        chosen = generator.integers(0, n, size=(min(rows, resamples - start), n))
        means.append(array[chosen].mean(axis=1))
    return np.concatenate(means)


def percentile_interval(samples: ArrayLike, confidence: float) -> tuple[float, float]:
    """The central `confidence` share of bootstrap samples [resamples] -> (low, high)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(samples, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `values` [n] with its percentile bootstrap interval (Efron and Tibshirani 1993, ch. 13)."""
    array = finite_array(values, "values")
    means = bootstrap_means(array[:, None], resamples, seed)[:, 0]
    low, high = percentile_interval(means, confidence)
    return Estimate(value=float(array.mean()), low=low, high=high)


def clustered_mean_interval(
    values: ArrayLike,
    clusters: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of `values` [n] with a percentile bootstrap interval that resamples whole clusters.

    Values of one cluster (the branches of one dialogue) are not independent, and resampling them one by one
    would make the interval too narrow. ValueError for fewer than 2 clusters.
    """
    array = finite_array(values, "values")
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(member, weights=array)
    counts = np.bincount(member)
    # The mean over resampled clusters is a ratio of two means: their total and their size.
    resampled = bootstrap_means(np.stack([sums, counts], axis=1), resamples, seed)
    low, high = percentile_interval(resampled[:, 0] / resampled[:, 1], confidence)
    return Estimate(value=float(array.mean()), low=low, high=high)


def align(ids: Sequence[StudentId], values: ArrayLike, order: Sequence[StudentId]) -> FloatArray:
    """`values` [n], which belong to `ids`, in the order of `order`.

    Raises ValueError when an id occurs twice or when the two sets of ids differ.
    """
    array = finite_array(values, "values")
    if len(array) != len(ids):
        raise ValueError(f"{len(array)} values for {len(ids)} ids")
    position = {identifier: index for index, identifier in enumerate(ids)}
    if len(position) != len(ids) or len(set(order)) != len(order):
        repeated = next(i for group in (ids, order) for i in group if list(group).count(i) > 1)
        raise ValueError(
            f"id {repeated!r} occurs twice: average the dialogues of one student first, "
            "they are not independent"
        )
    if position.keys() != set(order):
        different = sorted(map(repr, position.keys() ^ set(order)))
        raise ValueError(
            f"the two sides do not hold the same ids: {len(different)} differ, "
            f"e.g. {', '.join(different[:3])}"
        )
    return array[[position[identifier] for identifier in order]]


def paired_difference(
    ids: Sequence[StudentId],
    values: ArrayLike,
    baseline_ids: Sequence[StudentId],
    baseline: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of `values - baseline` over the same students, with the bootstrap interval of that mean.

    Both sides are aligned by id; ids that are not the same on both sides are a ValueError.
    """
    difference = align(ids, values, ids) - align(baseline_ids, baseline, ids)
    return mean_interval(difference, confidence=confidence, resamples=resamples, seed=seed)


def finite_or_none(value: Any) -> Any:
    """The same value with NaN and infinities as None, through dicts and lists: what JSON can hold."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made. The same settings and groups draw the same resamples, so that metrics of two
    models on one data set can be compared resample by resample."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class BootstrapEstimate:
    """A metric of `n` samples with its percentile interval; `samples` are the bootstrap's [resamples]."""

    value: float
    low: float
    high: float
    n: int
    samples: FloatArray = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Without the bootstrap's samples."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def minus(self, other: BootstrapEstimate, confidence: float) -> BootstrapEstimate:
        """The paired difference; both must be of the same rows and resampling."""
        return _estimate(self.value - other.value, self.n, self.samples - other.samples, confidence)


def bootstrap_by_group(
    statistic: Callable[..., float],
    columns: Sequence[FloatArray],
    groups: Sequence[str],
    bootstrap: Bootstrap,
) -> BootstrapEstimate | None:
    """`statistic`(*columns) over rows that belong to `groups`; resampled are the groups. None where the data
    leave it undefined (NaN)."""
    value = statistic(*columns)
    if math.isnan(value):
        return None
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(member, kind="stable")
    rows_of = np.split(order, np.flatnonzero(np.diff(member[order])) + 1)
    generator = np.random.default_rng(bootstrap.seed)
    samples = []
    for _ in range(bootstrap.resamples):
        rows = np.concatenate([rows_of[i] for i in generator.integers(0, len(rows_of), len(rows_of))])
        samples.append(statistic(*(column[rows] for column in columns)))
    return _estimate(value, len(columns[0]), np.array(samples), bootstrap.confidence)


def _estimate(value: float, n: int, samples: FloatArray, confidence: float) -> BootstrapEstimate:
    """Resamples in which the statistic is undefined (one class only) are left out of the interval."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail]) if not np.isnan(samples).all() else (np.nan, np.nan)
    return BootstrapEstimate(value, float(low), float(high), n, samples)


def non_dominated(points: ArrayLike, *, distinct: bool = False) -> NDArray[np.bool_]:
    """Which of the points [N, objectives] no other point dominates -> [N].

    A point dominates another when it is at least as good in every objective and better in one. Equal points
    do not dominate each other; with `distinct`, only the first of equal points counts.
    """
    array = finite_array(points, "points", dimensions=2)
    if len(array) == 0:
        return np.zeros(0, dtype=np.bool_)
    if array.shape[1] == 1:
        best = array[:, 0] == array[:, 0].max()
        return best & (np.cumsum(best) == 1) if distinct else best
    return np.asarray(moocore.is_nondominated(array, maximise=True, keep_weakly=not distinct), dtype=np.bool_)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between `reference` [objectives] and the points [N, objectives] that exceed it.

    In the product of the objectives' units (area for two). A point that does not exceed the reference point
    in every objective adds nothing.
    """
    array = finite_array(points, "points", dimensions=2)
    origin = finite_array(reference, "reference point")
    if array.shape[1] != len(origin):
        raise ValueError(f"points have {array.shape[1]} objectives, the reference point has {len(origin)}")
    inside: FloatArray = array[(array > origin).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    if array.shape[1] == 1:
        return float(inside.max() - origin[0])
    return float(moocore.hypervolume(inside, ref=origin, maximise=True))
