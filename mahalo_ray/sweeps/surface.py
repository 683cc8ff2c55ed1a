"""Even spacing on the Pareto front of three and more objectives: SURF's idea, on a surface.

The front of k objectives is a surface of k - 1 dimensions, and the weights are its (badly stretched)
coordinates. Along a curve one can invert the length; on a surface no map makes all distances even at once, so
the goal is stated differently: leave no large place on the front without a point. The measure is the radius
of the largest empty ball around a place on the front (covering radius).

From the results so far the sampler builds the measured surface: the Delaunay triangulation of the weights,
each simplex carried over to the values of its corners. A simplex of corners f_0 .. f_(k-1) has the area
sqrt(det(E^T E)) / (k - 1)!, E the edges f_i - f_0: this is the speed v(w) of SURF in k - 1 dimensions. Points
are strewn over the triangles evenly by area and moved onto a smooth interpolant of the results (cubic radial
basis functions, kept between the values of the triangle's corners, so that it cannot overshoot beside a gap).
The next round's weights are those of the places that shrink the largest empty ball most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import RBFInterpolator
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial import Delaunay, cKDTree

from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights, unknown_name
from mahalo_ray.sweeps.sampler import SweepResults, check_objectives, to_weights
from mahalo_ray.sweeps.simplex import lattice_steps, simplex_lattice

_STREWN = 6000  # points strewn over the measured surface
_SCALARISATIONS = ("linear", "chebyshev")
_FUTILE = 0.2  # a result within this share of the hole's radius of a known one brought nothing new
_ROUNDED = 1e-3  # weights told may differ by this from those asked for
_PATIENCE = 2  # rounds of which every trial was futile before the sampler stops
_POLISHING = 12  # rounds of moving new points within their cells
_MOST_OBJECTIVES = 6  # triangulations grow too fast beyond


class SurfaceSampler:
    """Spreads `n` points evenly over the front; by default, every evaluation is one of them.

    It begins with a small simplex lattice; results told before (a list played in any case) are known, and not
    counted. Every later round asks for an equal part of what is left of `n`: the places
    farthest from all results on the measured surface, one after the other, then moved to the middle of what
    they have to cover. With `respacings`, all `n` places except the corners are then chosen anew on the
    surface known by now, so many times at most: more even, at `n` further evaluations each.

    Guaranteed: on the surface as measured before a round, the largest empty ball after it has at most twice
    the least radius that as many further points could give (farthest-point insertion, Gonzalez 1985;
    moves are accepted only if they shrink it). On the true front it is larger by at most the distance of the
    measured surface from it. Nothing is guaranteed about parts of the front that no scalarisation of this
    kind reaches.

    Args:
        objectives: at least two names, at most six.
        n: points, at least one more than there are objectives.
        rounds: in which the `n` points are spread, the lattice included; at least 2.
        scalarisation: "linear" (weighted sum), or "chebyshev" (the largest weighted distance from an ideal
            point). Under the latter, the result lies in the direction 1/w from the ideal point: the
            triangulation then has 1/w for coordinates, and weights stay away from 0.
        margin: smallest coordinate; by default 0 for linear, 1e-3 for Chebyshev scalarisation.
        respacings: rounds of `n` evaluations in which all places are chosen anew; they end early when one
            shrinks the largest empty ball by less than 2 %.
        tolerance: stop before `n` evaluations once the largest empty ball has at most this radius.
        seed: of the points strewn over the surface.

    With standard errors, results are first smoothed over the weights (a Gaussian process with the given
    noise, its length and height by maximum likelihood). The search then also stops before `n` evaluations
    once the largest empty ball is smaller than the noise of a smoothed point: a further point could not be
    told from its neighbours. A place that was asked for and gave a known point again (a gap of the front) is
    not asked for again.

    Example:
        >>> import numpy as np
        >>> sampler = SurfaceSampler(["a", "b", "c"], n=20)
        >>> while not sampler.finished:
        ...     asked = sampler.ask()
        ...     w = np.array([weights.over("abc") for weights in asked])
        ...     sampler.tell(asked, w / np.linalg.norm(w, axis=1, keepdims=True))  # a part of the sphere
        >>> len(sampler.ask()), sampler.radius < 0.3
        (20, True)
    """

    def __init__(
        self,
        objectives: Sequence[str],
        n: int,
        *,
        rounds: int = 6,
        scalarisation: Literal["linear", "chebyshev"] = "linear",
        margin: float | None = None,
        respacings: int = 0,
        tolerance: float = 0.0,
        seed: int = 0,
    ) -> None:
        count = len(check_objectives(objectives))
        if count > _MOST_OBJECTIVES:
            raise ValueError(f"{count} objectives: a surface is triangulated for at most {_MOST_OBJECTIVES}")
        if n <= count:
            raise ValueError(
                f"n is {n}: {count} objectives need at least {count + 1} points, corners included"
            )
        if scalarisation not in _SCALARISATIONS:
            raise ValueError(unknown_name("scalarisation", scalarisation, _SCALARISATIONS))
        self._reciprocal = scalarisation == "chebyshev"
        if margin is None:
            margin = 1e-3 if self._reciprocal else 0.0
        if not 0 <= margin < 1 / count or (self._reciprocal and margin == 0):
            raise ValueError(f"margin is {margin}: it must lie between 0 and {1 / count:.3g}")
        start = simplex_lattice(count, lattice_steps(count, max(count, n // 3)))
        if rounds < 2:
            raise ValueError(f"rounds is {rounds}: the first is a lattice, and at least one has to follow")
        if respacings < 0:
            raise ValueError(f"respacings is {respacings}: it must not be negative")
        self.n, self.margin, self.tolerance, self.seed = n, margin, tolerance, seed
        self.batch = max(1, math.ceil((n - len(start)) / (rounds - 1)))
        self.respacings = respacings
        self.radius = math.inf  # of the largest empty ball on the measured surface
        self._results = SweepResults(objectives)
        self._told = 0
        self._sets: list[FloatArray] = []  # weights [n, objectives] of each respacing
        self._chosen: FloatArray | None = None  # the most even of these sets
        self._spaced = respacings == 0  # no respacing is left
        self._started = False  # whether the lattice was told
        self._next = self._to_weights(start)
        self._expected: FloatArray | None = None  # where the round's results are expected
        self._unreachable = np.zeros((0, count))
        self._futile_rounds = 0
        self._within_noise = False

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in the order of the columns of `values`."""
        return self._results.objectives

    @property
    def finished(self) -> bool:
        """Whether `n` evaluations were told, the largest empty ball is within the tolerance or the noise, or
        two rounds on end brought nothing but known points; with respacings, when these are over."""
        return (
            (self._told >= self.n and self._spaced)
            or self.radius <= self.tolerance
            or self._within_noise
            or self._futile_rounds >= _PATIENCE
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Sampler`; also why fewer than `n` weights were evaluated."""
        found = self._results.notes()
        if self.finished and self._told < self.n:
            if self._futile_rounds >= _PATIENCE:
                reason = "new weights give points that are known (gaps, or a front that no weights reach)"
            elif self._within_noise:
                reason = f"the largest empty ball (radius {self.radius:.3g}) is within the noise"
            else:
                reason = f"the largest empty ball has radius {self.radius:.3g}"
            found += (f"{self._told} of {self.n} evaluations were enough: {reason}",)
        return found

    def ask(self) -> list[Weights]:
        """The weights of the next round; once finished, all evaluated ones, or the most even respacing."""
        if self.finished and self._chosen is not None:
            return to_weights(self.objectives, self._chosen)
        if self.finished:
            return to_weights(self.objectives, self._results.merged()[0])
        return list(self._next)

    def tell(
        self, weights: Sequence[Weights], values: ArrayLike, standard_errors: ArrayLike | None = None
    ) -> None:
        """See `Sampler`. The lattice needs as many results as there are objectives."""
        rows = np.array([self._results.checked(vector).over(self.objectives) for vector in weights])
        start = np.array([vector.over(self.objectives) for vector in self._next])
        starts = not self._started and rows.shape == start.shape and np.abs(rows - start).max() < _ROUNDED
        self._results.needed = len(self.objectives) if starts else 1
        known = self._results.merged()[1] if len(self._results) else None
        _, points, _ = self._results.add(weights, values, standard_errors)
        self._started |= starts
        if not self._started:
            return
        if self._told >= self.n:
            self._sets.append(rows)
        self._told += len(weights)
        reached = np.isfinite(np.asarray(values, dtype=np.float64)).all(axis=1)
        if known is not None and self._expected is not None and len(weights) == len(self._expected):
            missed = cKDTree(known).query(points)[0] < _FUTILE * self.radius
            self._unreachable = np.concatenate([self._unreachable, self._expected[reached][missed]])
            self._futile_rounds = self._futile_rounds + 1 if missed.all() else 0
        self._plan()

    def _to_weights(self, coordinates: FloatArray) -> list[Weights]:
        inner = self.margin + (1 - coordinates.shape[1] * self.margin) * coordinates
        return to_weights(self.objectives, 1 / inner if self._reciprocal else inner)

    def _plan(self) -> None:
        """Measure the surface, and choose the next round."""
        rows, values, errors = self._results.merged()
        inner = 1 / rows if self._reciprocal else rows
        inner = inner / inner.sum(axis=1, keepdims=True)
        coordinates = (inner - self.margin) / (1 - inner.shape[1] * self.margin)
        noise = 0.0
        if self._results.noisy:
            values, spread = _smoothed(coordinates, values, errors)
            noise = float(np.sqrt(np.square(spread).sum(axis=1).mean()))
        strewn = _strew(coordinates, values, self.seed)
        if strewn is None:
            self.radius = 0.0
            self._futile_rounds = _PATIENCE
            return
        if self._told < self.n:
            covered = np.concatenate([values, self._unreachable])
            chosen, self.radius = _farthest(strewn.values, covered, min(self.batch, self.n - self._told))
            self._within_noise = self._results.noisy and self.radius <= noise
            self._expected = strewn.values[chosen]
            self._next = self._to_weights(np.clip(strewn.coordinates[chosen], 0, 1))
            return
        self._expected = None
        self._judge(rows, values, strewn)
        if not self._spaced:
            corners = coordinates.max(axis=1) > 1 - 1e-9
            chosen, _ = _farthest(strewn.values, values[corners], self.n - int(corners.sum()))
            places = np.concatenate([coordinates[corners], strewn.coordinates[chosen]])
            self._next = self._to_weights(np.clip(places, 0, 1))

    def _judge(self, rows: FloatArray, values: FloatArray, strewn: _Strewn) -> None:
        """The largest empty ball of the points chosen so far, on the surface as it is known now."""
        if not self._sets:
            self.radius = float(cKDTree(values).query(strewn.values)[0].max())
            return
        known = cKDTree(rows)
        radii = []
        for weights in self._sets:
            distances, row = known.query(weights)
            points = values[row[distances < 1e-9]]
            radii.append(float(cKDTree(points).query(strewn.values)[0].max()) if len(points) else math.inf)
        best = int(np.argmin(radii))
        self.radius, self._chosen = radii[best], self._sets[best]
        progress = len(radii) < 2 or radii[-1] < 0.98 * min(radii[:-1])
        self._spaced = len(radii) >= self.respacings or not progress


class _Strewn(NamedTuple):
    coordinates: FloatArray  # [m, objectives], on the simplex
    values: FloatArray  # [m, objectives]


def _strew(coordinates: FloatArray, values: FloatArray, seed: int) -> _Strewn | None:
    """Points strewn over the measured surface, evenly by area; None if it has no area."""
    count = coordinates.shape[1]
    if count == 2:
        order = np.argsort(coordinates[:, 0])
        cells = np.stack([order[:-1], order[1:]], axis=1)
    elif len(coordinates) == count:
        cells = np.arange(count)[None]  # the corners alone
    else:
        cells = Delaunay(coordinates[:, :-1], qhull_options="QJ Qbb Q12").simplices
    edges = values[cells[:, 1:]] - values[cells[:, :1]]
    area = np.sqrt(np.maximum(np.linalg.det(edges @ edges.transpose(0, 2, 1)), 0.0))
    if area.sum() == 0:
        return None
    draws = np.random.default_rng(seed)
    cell = cells[draws.choice(len(cells), _STREWN, p=area / area.sum())]
    share = draws.dirichlet(np.ones(count), _STREWN)[:, None]
    inside = (share @ coordinates[cell])[:, 0]
    corners = values[cell]
    smooth = RBFInterpolator(coordinates[:, :-1], values, kernel="cubic")(inside[:, :-1])
    return _Strewn(inside, np.clip(smooth, corners.min(axis=1), corners.max(axis=1)))


def _farthest(strewn: FloatArray, covered: FloatArray, count: int) -> tuple[NDArray[np.int64], float]:
    """(rows of `strewn` that cover it best together with `covered`, the largest distance before)."""
    before: FloatArray = cKDTree(covered).query(strewn)[0]
    nearest = before.copy()
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.linalg.norm(strewn - strewn[chosen[-1]], axis=1))
    best, least = np.array(chosen), float(nearest.max())
    tree = cKDTree(strewn)
    moved = best
    for _ in range(_POLISHING):
        distances, owner = cKDTree(strewn[moved]).query(strewn)
        owner = np.where(distances < before, owner, -1)
        centres = np.stack([_middle(strewn[owner == n], strewn[row]) for n, row in enumerate(moved)])
        moved = tree.query(centres)[1]
        reached = float(np.minimum(before, cKDTree(strewn[moved]).query(strewn)[0]).max())
        if reached < least:
            best, least = moved, reached
    return best, float(before.max())


def _middle(points: FloatArray, start: FloatArray) -> FloatArray:
    """Nearly the centre of the smallest ball around the points (Badoiu and Clarkson 2003)."""
    centre = points.mean(axis=0) if len(points) else start
    for step in range(2, 12 if len(points) else 2):
        farthest = points[np.argmax(np.square(points - centre).sum(axis=1))]
        centre = centre + (farthest - centre) / step
    return centre


def _smoothed(
    coordinates: FloatArray, values: FloatArray, errors: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Values and their standard errors after smoothing over the coordinates, each [m, objectives].

    A Gaussian process per objective, Matern 5/2, with the noise of each result; length and height of the
    process are those of the largest likelihood on a grid.
    """
    distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=2)
    smooth, spread = np.empty_like(values), np.empty_like(values)
    for column in range(values.shape[1]):
        noise = np.maximum(np.square(errors[:, column]), 1e-12)
        mean = np.average(values[:, column], weights=1 / noise)
        rest = values[:, column] - mean
        scale = max(float(np.var(rest)), 1e-12)
        best: tuple[float, FloatArray, FloatArray] | None = None
        for length in np.geomspace(0.05, 4.0, 12):
            ratio = math.sqrt(5) * distances / length
            correlation = (1 + ratio + np.square(ratio) / 3) * np.exp(-ratio)
            for height in (0.5 * scale, 2 * scale, 8 * scale):
                factor = cho_factor(height * correlation + np.diag(noise), lower=True)
                solved = cho_solve(factor, rest)
                misfit = float(rest @ solved + 2 * np.log(np.diag(factor[0])).sum())
                if best is None or misfit < best[0]:
                    kernel = height * correlation
                    variance = np.diag(kernel) - np.einsum("ij,ji->i", kernel, cho_solve(factor, kernel))
                    best = (misfit, kernel @ solved, variance)
        assert best is not None
        smooth[:, column] = mean + best[1]
        spread[:, column] = np.sqrt(np.maximum(best[2], 0.0))
    return smooth, spread
