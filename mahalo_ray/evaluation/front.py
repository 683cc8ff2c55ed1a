"""Dominance and hypervolume of points whose coordinates are all to be maximised."""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mahalo_ray.evaluation.statistics import FloatArray, finite_array


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
