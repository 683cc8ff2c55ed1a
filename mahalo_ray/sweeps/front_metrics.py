"""Metrics of points on a Pareto front: how good, how evenly spaced, how well the weights steer, how sure.

Points are rows of `values` [N, objectives], maximised. Distances have the units of the objectives: divide by
ranges first (`normalised`) where these differ. A metric that the points leave undefined is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from mahalo_ray.evaluation.statistics import hypervolume, non_dominated
from mahalo_ray.metrics import FloatArray, finite_array
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps.sampler import check_objectives


def normalised(values: ArrayLike, worst: ArrayLike, best: ArrayLike) -> FloatArray:
    """Values [N, objectives] so that `worst` [objectives] becomes 0 and `best` 1."""
    low, high = finite_array(worst, "worst"), finite_array(best, "best")
    if (high <= low).any():
        raise ValueError(f"best {high.tolist()} must lie above worst {low.tolist()} in every objective")
    scaled: FloatArray = (finite_array(values, "values", dimensions=2) - low) / (high - low)
    return scaled


def igd(values: ArrayLike, front: ArrayLike) -> float:
    """Inverted generational distance: mean distance of a dense front [M, objectives] to its nearest point."""
    return float(moocore.igd(_points(values), ref=_points(front), maximise=True))


def igd_plus(values: ArrayLike, front: ArrayLike) -> float:
    """IGD+ (Ishibuchi et al. 2015): as `igd`, counting only by how much a point falls short of the front."""
    return float(moocore.igd_plus(_points(values), ref=_points(front), maximise=True))


def largest_empty_ball(values: ArrayLike, front: ArrayLike) -> float:
    """Radius of the largest ball around a point of a dense front [M, objectives] that holds none of the
    points: the farthest that a place on the front is from what was found (covering radius)."""
    distances, _ = cKDTree(_points(values)).query(_points(front))
    return float(distances.max())


def segment_lengths(values: ArrayLike, standard_errors: ArrayLike | None = None) -> FloatArray:
    """Gaps between neighbouring points, [N - 1] for two objectives and [N] for more.

    Two objectives: chords between points in order of the first objective. More: the distance from each point
    to its nearest other one. Noise lengthens chords (E l^2 = l^2 + the variance of the difference): with
    `standard_errors` [N, objectives] its share is taken out, down to 0.
    """
    points = _points(values)
    noise = np.zeros(points.shape) if standard_errors is None else np.square(_points(standard_errors))
    if len(points) < 2:
        return np.zeros(0)
    if points.shape[1] == 2:
        order = np.lexsort((-points[:, 1], points[:, 0]))
        first, second = order[:-1], order[1:]
    else:
        first = np.arange(len(points))
        second = cKDTree(points).query(points, k=2)[1][:, 1]
    squares = np.square(points[first] - points[second]).sum(axis=1)
    return np.sqrt(np.maximum(squares - (noise[first] + noise[second]).sum(axis=1), 0.0))


def coefficient_of_variation(lengths: ArrayLike) -> float:
    """Standard deviation over mean: 0 for equal lengths; NaN if all are 0 or there is none."""
    array = finite_array(lengths, "lengths")
    return float(array.std() / array.mean()) if len(array) and array.mean() > 0 else math.nan


def max_min_ratio(lengths: ArrayLike) -> float:
    """Longest over shortest: 1 for equal lengths, infinite where two points coincide."""
    array = finite_array(lengths, "lengths")
    if not len(array) or array.max() == 0:
        return math.nan
    return float(array.max() / array.min()) if array.min() > 0 else math.inf


def spread(values: ArrayLike, ends: ArrayLike | None = None) -> float:
    """Generalised spread (Zhou et al. 2006), 0 for even points that reach the ends of the front.

    (sum_k d(e_k, S) + sum_x |d_x - mean d|) / (sum_k d(e_k, S) + N mean d), d_x the distance of a point to
    its nearest other one. `ends` [objectives, objectives] are the best points for each objective; by default
    those among the points, whose own distances are then 0.
    """
    points = _points(values)
    if len(points) < 2:
        return math.nan
    tree = cKDTree(points)
    gaps = tree.query(points, k=2)[0][:, 1]
    missed = 0.0 if ends is None else float(np.sum(tree.query(_points(ends))[0]))
    scale = missed + len(points) * gaps.mean()
    return float((missed + np.abs(gaps - gaps.mean()).sum()) / scale) if scale > 0 else math.nan


def rank_agreement(
    weights: Sequence[Weights], values: ArrayLike, objectives: Sequence[str]
) -> dict[str, float]:
    """Kendall's tau-b of each objective's asked weight and its reached value: 1 if more weight always brought
    more of it (controllability). NaN where the weight or the value never changes."""
    from scipy import stats

    points = _points(values)
    asked = np.array([vector.over(objectives) for vector in weights])
    if asked.shape != points.shape:
        raise ValueError(f"{len(asked)} weights for values of shape {points.shape}")
    if len(points) < 2:
        return dict.fromkeys(objectives, math.nan)
    return {
        name: float(stats.kendalltau(asked[:, column], points[:, column]).statistic)
        for column, name in enumerate(objectives)
    }


def knee(values: ArrayLike) -> int:
    """The point (its row) that bulges most: farthest, towards the better side, from the plane through the
    best points for each objective, after division by ranges (Das 1999). Where these do not span a plane: the
    point with the largest sum."""
    points = _points(values)
    ranges = np.ptp(points, axis=0)
    scaled = (points - points.min(axis=0)) / np.where(ranges > 0, ranges, 1.0)
    candidates = np.flatnonzero(non_dominated(scaled))
    ends = scaled[[candidates[np.argmax(scaled[candidates, k])] for k in range(points.shape[1])]]
    normal = np.ones(points.shape[1])
    if np.linalg.matrix_rank(ends) == points.shape[1]:
        solved = np.linalg.solve(ends, normal)
        normal = solved if (solved > 0).all() else normal
    return int(candidates[np.argmax(scaled[candidates] @ normal)])


def bootstrap_values(values: ArrayLike, resamples: int = 1000, seed: int = 0) -> FloatArray:
    """Bootstrap means [resamples, N, objectives] of values [N, samples, objectives].

    All N points were measured on the same samples (students, prompts): these are drawn anew, the same for all
    points, so that what they have in common cancels in comparisons.
    """
    array = finite_array(values, "values", dimensions=3)
    count = array.shape[1]
    if count == 0:
        raise ValueError("values have no samples to draw from")
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples) / count
    means: FloatArray = np.einsum("bs,nsk->bnk", drawn, array)
    return means


def probability_non_dominated(draws: ArrayLike) -> FloatArray:
    """[N]: the share of bootstrap draws [resamples, N, objectives] in which no other point dominates it."""
    array = finite_array(draws, "draws", dimensions=3)
    return np.mean([non_dominated(draw) for draw in array], axis=0)


class FrontBand(NamedTuple):
    """Between which values the front of two objectives runs, with the confidence asked for."""

    at: FloatArray  # [grid] of the first objective
    low: FloatArray  # [grid] of the second objective, NaN where the front does not reach
    middle: FloatArray
    high: FloatArray


def front_band(draws: ArrayLike, confidence: float = 0.95, grid: int = 101) -> FrontBand:
    """Pointwise bootstrap band of a front of two objectives, from draws [resamples, N, 2].

    For every value x of the first objective: the most of the second that a point with at least x has.
    """
    array = finite_array(draws, "draws", dimensions=3)
    if array.shape[2] != 2:
        raise ValueError(f"a band is drawn for 2 objectives, the draws have {array.shape[2]}")
    at = np.linspace(array[..., 0].min(), array[..., 0].max(), grid)
    order = np.argsort(-array[..., 0], axis=1)
    first = np.take_along_axis(array[..., 0], order, axis=1)
    best = np.maximum.accumulate(np.take_along_axis(array[..., 1], order, axis=1), axis=1)
    reached = (first[:, :, None] >= at[None, None]).sum(axis=1)  # points with at least x, [resamples, grid]
    heights = np.take_along_axis(best, np.maximum(reached - 1, 0), axis=1)
    heights = np.where(reached > 0, heights, -np.inf)
    tail = (1 - confidence) / 2
    bounds = np.quantile(heights, [tail, 0.5, 1 - tail], axis=0, method="nearest")
    low, middle, high = np.where(np.isfinite(bounds), bounds, np.nan)
    return FrontBand(at, low, middle, high)


@dataclass(frozen=True)
class FrontMeasures:
    """What `measure_front` tells of one front."""

    n: int
    non_dominated: int
    reference: tuple[float, ...]  # of the hypervolume
    hypervolume: float
    cv: float  # of the gaps between neighbours, noise taken out
    max_min: float
    spread: float
    rank_agreement: Mapping[str, float]  # Kendall's tau of asked weight and reached value
    knee: int  # row of the values

    def as_dict(self) -> dict[str, Any]:
        """For JSON; undefined numbers are None."""
        document = asdict(self)
        document["rank_agreement"] = {k: _or_none(v) for k, v in self.rank_agreement.items()}
        return {key: _or_none(value) for key, value in document.items()}


def measure_front(
    weights: Sequence[Weights],
    values: ArrayLike,
    objectives: Sequence[str],
    reference: ArrayLike,
    standard_errors: ArrayLike | None = None,
) -> FrontMeasures:
    """All metrics that need no known front, of values [N, objectives] reached at N weights.

    Rows of NaN (failed trials) are left out; `knee` still counts them. ValueError if no row is left.
    """
    check_objectives(objectives)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(weights), len(objectives)):
        raise ValueError(f"values have shape {array.shape}: {(len(weights), len(objectives))} was asked for")
    rows = np.flatnonzero(~np.isnan(array).any(axis=1))
    if not len(rows):
        raise ValueError("no point has values: all rows hold NaN")
    points = array[rows]
    origin = finite_array(reference, "reference point")
    errors = None if standard_errors is None else np.asarray(standard_errors, dtype=np.float64)[rows]
    gaps = segment_lengths(points, errors)
    return FrontMeasures(
        n=len(rows),
        non_dominated=int(non_dominated(points).sum()),
        reference=tuple(origin.tolist()),
        hypervolume=hypervolume(points, origin),
        cv=coefficient_of_variation(gaps),
        max_min=max_min_ratio(gaps),
        spread=spread(points),
        rank_agreement=rank_agreement([weights[row] for row in rows.tolist()], points, objectives),
        knee=int(rows[knee(points)]),
    )


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _points(values: ArrayLike) -> NDArray[np.float64]:
    return finite_array(values, "points", dimensions=2)
