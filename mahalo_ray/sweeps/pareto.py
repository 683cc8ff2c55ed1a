"""How good and how even a front is: dominance, hypervolume, spread and evenness. All objectives maximised."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mahalo_ray.evaluation.front import hypervolume, non_dominated
from mahalo_ray.evaluation.statistics import FloatArray, finite_array

__all__ = [
    "chord_lengths",
    "chord_variation",
    "front",
    "hypervolume",
    "largest_gap",
    "non_dominated",
    "spread",
]


def front(points: ArrayLike) -> FloatArray:
    """The distinct non-dominated points [N, objectives], ordered by the first objective, ascending."""
    array = finite_array(points, "points", dimensions=2)
    kept = array[non_dominated(array, distinct=True)]
    return kept[np.argsort(kept[:, 0], kind="stable")]


def chord_lengths(points: ArrayLike, scale: ArrayLike | None = None) -> FloatArray:
    """Euclidean distances between successive points [N, objectives], in the order given -> [N - 1].

    `scale` [objectives] divides each objective first, for objectives of different units. Two objectives only:
    with more, a front is a surface and its points have no successor.
    """
    array = finite_array(points, "points", dimensions=2)
    if array.shape[1] != 2:
        raise ValueError(f"chords are defined for 2 objectives, the points have {array.shape[1]}")
    if scale is not None:
        divisor = finite_array(scale, "scale")
        if divisor.shape != (2,) or (divisor <= 0).any():
            raise ValueError(f"scale must be 2 numbers above 0, got {divisor.tolist()}")
        array = array / divisor
    return np.asarray(np.linalg.norm(np.diff(array, axis=0), axis=1))


def chord_variation(points: ArrayLike, scale: ArrayLike | None = None) -> float:
    """Coefficient of variation (population std / mean) of the chord lengths: 0 is perfectly even.

    Needs at least 2 chords (3 points) that are not all of length 0; ValueError otherwise.
    """
    chords = chord_lengths(points, scale)
    if len(chords) < 2 or chords.mean() == 0:
        raise ValueError("evenness needs at least 3 points that are not all the same")
    return float(chords.std() / chords.mean())


def largest_gap(points: ArrayLike, scale: ArrayLike | None = None) -> float:
    """The longest chord as a multiple of the mean chord: 1 is perfectly even."""
    chords = chord_lengths(points, scale)
    if len(chords) == 0 or chords.mean() == 0:
        raise ValueError("the largest gap needs at least 2 points that are not all the same")
    return float(chords.max() / chords.mean())


def spread(points: ArrayLike) -> FloatArray:
    """How far the points [N, objectives] reach in each objective: best minus worst value -> [objectives]."""
    array = finite_array(points, "points", dimensions=2)
    if len(array) == 0:
        raise ValueError("the spread of no points is undefined")
    return np.asarray(np.ptp(array, axis=0))
