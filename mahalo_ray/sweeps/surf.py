"""SURF: weight vectors whose results lie evenly along the Pareto front of two objectives (arXiv 2605.20619).

Equal steps of the weight are not equal steps along the front: where the front turns, a small change of the
weight moves the result far. SURF evaluates weights, measures how far apart their results lie, and asks next
for the weights that would be evenly spaced if the front were as measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights, unknown_name
from mahalo_ray.sweeps.sampler import SweepResults

_GRID = np.linspace(0.0, 1.0, 2001)
_MAX_DEGREE = 8  # of the curve fitted to noisy results
_UNEVEN = 0.1  # a coefficient of variation worth a note
_MARGINS = {"linear": 0.0, "chebyshev": 1e-3}
_NEARLY_EVEN = 0.1  # coefficient of variation below which chords are inverted directly
_GAP = 4e-3  # of a step of the weight: results that differ across so little lie at the sides of a gap
_PATIENCE = 3  # rounds without progress before the sampler stops
_CANDIDATES = 150  # weights among which the most even ones are sought
_DRAWS = 40  # of weights of the results, for stepped curves
_PROGRESS = 0.98  # a round makes progress if its unevenness is at most this share of the best before


class SurfSampler:
    """Asks for `n` weight vectors, is told their results, and asks again until the results are evenly spaced.

    Args:
        objectives: names of two objectives (three and more span a surface).
        n: points along the front, the two ends included; at least 3.
        relaxation: weight `a` of a round's estimate in Phi <- a Phi_new + (1 - a) Phi, in (0, 1]. It is
            that of the first round; as estimates use the results of all rounds, later ones count more
            (a_t = 1 - (1 - a)^t).
        tolerance: stop once no segment differs from their mean by more than this share of it.
        scalarisation: what the weights are for: "linear" (a weighted sum) or "chebyshev" (the largest
            weighted distance from an ideal point), whose ends are not Pareto-optimal: weights stay `margin`
            away from 0 and 1.
        margin: smallest weight; by default 0 for linear, 1e-3 for Chebyshev scalarisation.
        max_rounds: stop after so many rounds in any case.

    The front is measured in the units of `values`: scale the objectives first where these differ.

    Example:
        >>> import numpy as np
        >>> sampler = SurfSampler(["accuracy", "engagement"], n=5)
        >>> while not sampler.finished:
        ...     asked = sampler.ask()
        ...     w = np.array([weights["accuracy"] for weights in asked])
        ...     norm = np.hypot(w, 1 - w)  # a quarter of a circle
        ...     sampler.tell(asked, np.stack([w / norm, (1 - w) / norm], axis=1))
        >>> [round(weights["accuracy"], 3) for weights in sampler.ask()]
        [0.0, 0.293, 0.5, 0.707, 1.0]
    """

    def __init__(
        self,
        objectives: Sequence[str],
        n: int,
        relaxation: float = 0.3,
        *,
        tolerance: float = 1e-3,
        scalarisation: Literal["linear", "chebyshev"] = "linear",
        margin: float | None = None,
        max_rounds: int = 30,
    ) -> None:
        if len(objectives) != 2 or len(set(objectives)) != 2:
            raise ValueError(
                f"SURF spaces points along a curve and needs 2 objectives, got {len(objectives)} "
                f"({', '.join(objectives)}); three and more span a surface"
            )
        if n < 3:
            raise ValueError(f"n is {n}: at least 3 points are needed")
        if not 0 < relaxation <= 1:
            raise ValueError(f"relaxation is {relaxation}: it must be above 0 and at most 1")
        if scalarisation not in _MARGINS:
            raise ValueError(unknown_name("scalarisation", scalarisation, _MARGINS))
        margin = _MARGINS[scalarisation] if margin is None else margin
        if not 0 <= margin < 0.5:
            raise ValueError(f"margin is {margin}: it must be at least 0 and below 0.5")
        self.objectives = tuple(objectives)
        self.n, self.relaxation, self.tolerance, self.margin = n, relaxation, tolerance, margin
        self.max_rounds = max_rounds
        self.rounds = 0
        self.unevenness = math.inf  # largest |segment - mean segment| / mean segment of the last round
        self._next: FloatArray | None = None  # shares to ask, where they do not follow from Phi
        self._phi = _GRID.copy()  # share of the front's length up to each weight of the grid
        self._results = SweepResults(self.objectives, needed=2)
        self._best: tuple[float, FloatArray] | None = None
        self._without_progress = 0
        self._gaps = 0
        self._within_noise = self._noisy = False

    @property
    def finished(self) -> bool:
        """Whether asking again would not make the points more even: they are within the tolerance or the
        noise, three rounds brought no progress (a gap that no weight fills), or `max_rounds` are over.

        Within the noise: no segment of the curve fitted to all results differs from their mean by more than
        the standard error of a segment. On a front with gaps, whose segments stay uneven: the next weights
        would change the segments by less than their standard error, on average.
        """
        return (
            self._within_noise
            or self.unevenness <= self.tolerance
            or self._without_progress >= _PATIENCE
            or self.rounds >= self.max_rounds
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Sampler`; also what keeps the segments uneven, once the search has ended."""
        found = self._results.notes()
        if self.finished and not self._within_noise and self._best and self._best[0] > _UNEVEN:
            cause = f"{self._gaps} gaps that no weight fills" if self._gaps else "too few rounds, or a gap"
            found += (
                "the most even round's segments have a coefficient of variation of "
                f"{self._best[0]:.2g}: {cause}",
            )
        return found

    def ask(self) -> list[Weights]:
        """The next `n` weight vectors, in order along the front (the first objective's weight rising). Once
        finished, the most evenly spaced ones that were told."""
        if self.finished and self._best is not None and not self._noisy:
            return self._weights(self._best[1])
        if self._next is not None:
            return self._weights(self._next)
        return self._weights(np.interp(np.linspace(0, 1, self.n), self._phi, _GRID))

    def tell(
        self, weights: Sequence[Weights], values: ArrayLike, standard_errors: ArrayLike | None = None
    ) -> None:
        """Results of one round.

        `values` [n, 2] are maximised; a row of NaN is a trial that failed, and is left out. With
        `standard_errors` [n, 2] the noise is taken out of the distances, and the sampler stops when the
        unevenness is within it. ValueError for shapes that do not match, infinities, or fewer than 2 results.
        """
        asked, points, errors = self._results.add(weights, values, standard_errors)
        self.rounds += 1
        self._noisy |= bool(errors.any())
        if self._noisy:
            self._next = None
            estimate = self._regressed(np.sort((asked[:, 0] - self.margin) / (1 - 2 * self.margin)))
        else:
            shares = (asked[:, 0] - self.margin) / (1 - 2 * self.margin)
            order = np.argsort(shares, kind="stable")
            uneven = self._judge(shares[order], points[order])
            self._next = self._respaced(shares[order], points[order], uneven)
            estimate = self._interpolated()
        weight = 1 - (1 - self.relaxation) ** self.rounds
        self._phi = weight * estimate + (1 - weight) * self._phi
        self._phi = (self._phi - self._phi[0]) / (self._phi[-1] - self._phi[0])

    def _weights(self, shares: FloatArray) -> list[Weights]:
        first = self.margin + (1 - 2 * self.margin) * np.clip(shares, 0.0, 1.0)
        return [Weights(dict(zip(self.objectives, (w, 1 - w), strict=True))) for w in first.tolist()]

    def _judge(self, shares: FloatArray, points: FloatArray) -> float:
        """How uneven the segments of this round are (their coefficient of variation), and whether that is any
        progress."""
        segments = np.linalg.norm(np.diff(points, axis=0), axis=1)
        mean = segments.mean()
        self.unevenness = float(np.abs(segments - mean).max() / mean) if mean > 0 else 0.0
        uneven = float(segments.std() / mean) if mean > 0 else 0.0
        best = math.inf if self._best is None else self._best[0]
        self._without_progress = 0 if uneven < _PROGRESS * best else self._without_progress + 1
        if uneven < best and len(shares) == self.n:
            self._best = (uneven, shares)
        return uneven

    def _respaced(self, shares: FloatArray, points: FloatArray, uneven: float) -> FloatArray | None:
        """The next weights where Phi as a whole is not the best guide; otherwise None.

        A front with gaps is spaced component by component, with points at both sides of every gap. A front
        without gaps is nearly even after some rounds. From then on this round's chords alone are inverted:
        equal shares of the arc length are not quite equal chords.
        """
        known, values, _ = self._merged()
        chords = np.linalg.norm(np.diff(values, axis=0), axis=1)
        mean = chords.sum() / (self.n - 1)
        wide = chords > mean / 2
        gaps = np.flatnonzero(wide & (np.diff(known) < _GAP / self.n))
        self._gaps = len(gaps)
        if len(gaps) == 0:
            if uneven > _NEARLY_EVEN:
                return None
            lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
            return _evenly(shares, lengths, self.n)
        if (wide & (np.diff(known) < 0.2 / self.n)).sum() > len(gaps):
            self._without_progress = min(self._without_progress, 1)  # a gap's sides are still being found
            return None
        parts = np.split(np.arange(len(known)), gaps + 1)
        measured = [np.concatenate([[0.0], np.cumsum(chords[part[:-1]])]) for part in parts]
        counts = _shared_out(np.array([lengths[-1] for lengths in measured]), self.n)
        if counts is None:
            return None
        spaced = [
            _evenly(known[part], lengths, count)
            for part, lengths, count in zip(parts, measured, counts.tolist(), strict=True)
        ]
        return np.concatenate(spaced)

    def _merged(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Results of all rounds in order along the front: (shares of the first objective's weight [m], points
        [m, 2], their standard errors [m, 2])."""
        weights, points, errors = self._results.merged()
        shares = (weights[:, 0] - self.margin) / (1 - 2 * self.margin)
        order = np.argsort(shares, kind="stable")
        return shares[order], points[order], errors[order]

    def _interpolated(self) -> FloatArray:
        """Phi on the grid from exact results: the polygon through all of them, interpolated monotonically.
        The identity where all results are equal."""
        shares, points, _ = self._merged()
        lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        if lengths[-1] == 0:
            return _GRID.copy()
        phi = PchipInterpolator(shares, lengths / lengths[-1])(np.clip(_GRID, shares[0], shares[-1]))
        return _rising(phi)

    def _regressed(self, asked: FloatArray) -> FloatArray:
        """Phi on the grid from noisy results.

        A polygon through noisy points is longer than the front, the more so the closer the points. So a curve
        is fitted to all results, weighted by their precision, and its length is taken: a smooth one, or one
        that rises in steps where the criterion of Akaike prefers it (a front with gaps). Also tells what is
        left of the unevenness, and whether that is within the noise of a segment.
        """
        shares, points, errors = self._merged()
        errors = np.maximum(errors, 1e-12)
        u = np.interp(shares, _GRID, self._phi)
        smooth = _smooth_curve(u, points, errors, self.n)
        steps = _stepped_curves(shares, points, errors)
        if steps.criterion < smooth.criterion:
            return self._along_steps(steps.curves, asked)
        dense = np.linspace(0, 1, len(_GRID))
        lengths = _lengths(smooth.curve(dense))
        if lengths[-1] == 0:
            return self._phi
        segments = np.diff(np.interp(np.linspace(0, 1, self.n), dense, lengths))
        mean = segments.mean()
        self.unevenness = float(np.abs(segments - mean).max() / mean)
        self._within_noise = self.rounds > 1 and self.unevenness * mean <= smooth.noise
        return _rising(np.interp(self._phi, dense, lengths / lengths[-1]))

    def _along_steps(self, curves: FloatArray, asked: FloatArray) -> FloatArray:
        """Phi from curves [draws, grid, 2] that rise in steps, and the next weights: those whose chords are
        most even over all draws. Within the noise: the chords between the weights `asked` last differ from
        those between the next ones by no more than the draws differ, on average."""
        mean = curves.mean(axis=0)
        lengths = _lengths(mean)
        if lengths[-1] == 0:  # one point, within the noise
            self._within_noise = self.rounds > 1
            return self._phi
        estimate = _rising(lengths / lengths[-1])
        self._next = _evenest(curves, estimate, self.n)
        before, after = _chords_between(curves, asked), _chords_between(curves, self._next)
        noise = after.std(axis=0).mean()
        if before.shape == after.shape:
            moved = np.abs(before.mean(axis=0) - after.mean(axis=0))
            self.unevenness = float(moved.mean() / after.mean())
            self._within_noise = self.rounds > 1 and moved.mean() <= noise
        return estimate


def _evenly(shares: FloatArray, lengths: FloatArray, count: int) -> FloatArray:
    """`count` shares at even lengths along a curve whose length up to `shares` is `lengths` (one: its
    middle)."""
    distinct, first = np.unique(lengths, return_index=True)
    if len(distinct) == 1:
        return np.linspace(shares[0], shares[-1], count)
    wanted = np.linspace(0, lengths[-1], count) if count > 1 else lengths[-1:] / 2
    spaced: FloatArray = PchipInterpolator(distinct, shares[first])(wanted)
    return spaced


def _shared_out(lengths: FloatArray, n: int) -> NDArray[np.int64] | None:
    """How many of `n` points each component gets: one each, then always one more where they are farthest
    apart. None if there are more components than points."""
    if len(lengths) > n:
        return None
    counts = np.ones(len(lengths), dtype=np.int64)
    for _ in range(n - len(lengths)):
        counts[np.argmax(lengths / np.maximum(counts - 1, 0.5))] += 1
    return counts


def _rising(phi: FloatArray) -> FloatArray:
    """Strictly rising, so that every length has one weight."""
    return np.maximum.accumulate(np.clip(phi, 0, 1)) * (1 - 1e-9) + 1e-9 * _GRID


def _lengths(points: FloatArray) -> FloatArray:
    """Length of the polygon through points [m, 2] up to each of them."""
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])


def _evenest(curves: FloatArray, phi: FloatArray, n: int) -> FloatArray:
    """The n of many shares, the ends among them, whose chords l on curves [draws, grid, 2] have the smallest
    mean of (l - L)^2 / L^2 over all draws, L the best common length: by dynamic programming."""
    # Even along the curve; in a front of few steps these are few, so even weights are added.
    places = np.concatenate([np.interp(np.linspace(0, 1, _CANDIDATES), phi, _GRID), np.linspace(0, 1, n)])
    rows = np.unique(np.round(places * (len(_GRID) - 1)).astype(np.int64))
    squares = np.zeros((len(rows), len(rows)))
    chords = np.zeros_like(squares)
    for points in curves[:, rows]:
        square = np.square(points[:, None] - points[None]).sum(axis=2)
        squares += square / len(curves)
        chords += np.sqrt(square) / len(curves)
    back = np.tril_indices(len(rows))
    least, best = math.inf, rows[:n]
    for length in np.diagonal(chords, 1).sum() / (n - 1) * np.linspace(0.7, 1.1, 9):
        cost = squares / length**2 - 2 * chords / length + 1
        cost[back] = np.inf
        total, steps = cost[0], []
        for _ in range(n - 2):
            through = total[:, None] + cost
            steps.append(through.argmin(axis=0))
            total = through.min(axis=0)
        if total[-1] < least:
            path = [len(rows) - 1]
            for step in reversed(steps):
                path.append(int(step[path[-1]]))
            least, best = float(total[-1]), rows[[0, *reversed(path)]]
    return _GRID[best]


def _chords_between(curves: FloatArray, shares: FloatArray) -> FloatArray:
    """[draws, n - 1] distances between neighbours of n shares on curves [draws, grid, 2]."""
    at = np.round(shares * (len(_GRID) - 1)).astype(np.int64)
    return np.linalg.norm(np.diff(curves[:, at], axis=1), axis=2)


class _SmoothCurve(NamedTuple):
    criterion: float  # of Akaike
    curve: Callable[[FloatArray], FloatArray]  # u -> [., 2]
    noise: float  # the largest standard error of its segments between n evenly spaced u


def _smooth_curve(u: FloatArray, points: FloatArray, errors: FloatArray, n: int) -> _SmoothCurve:
    """A polynomial through points [m, 2]. In the coordinate u = Phi(w) the front has nearly constant speed,
    so a low degree fits it, chosen by its criterion."""
    best: tuple[float, list[FloatArray], FloatArray] | None = None
    spaced = np.linspace(-1, 1, n)
    for degree in range(1, min(_MAX_DEGREE, len(np.unique(u)) - 1) + 1):
        basis = np.polynomial.legendre.legvander(2 * u - 1, degree)
        steps = np.diff(np.polynomial.legendre.legvander(spaced, degree), axis=0)
        coefficients, criterion, variances = [], 0.0, np.zeros(n - 1)
        for values, error in zip(points.T, errors.T, strict=True):
            scale = 1 / error
            solved = np.linalg.lstsq(basis * scale[:, None], values * scale, rcond=None)[0]
            residuals = (basis @ solved - values) * scale
            criterion += float(residuals @ residuals) + 2 * (degree + 1)
            covariance = np.linalg.pinv((basis * scale[:, None]).T @ (basis * scale[:, None]))
            variances += np.einsum("ni,ij,nj->n", steps, covariance, steps)
            coefficients.append(solved)
        if best is None or criterion < best[0]:
            best = (criterion, coefficients, variances)
    assert best is not None
    criterion, coefficients, variances = best

    def curve(where: FloatArray) -> FloatArray:
        columns = [np.polynomial.legendre.legval(2 * where - 1, solved) for solved in coefficients]
        return np.stack(columns, axis=1)

    # along the curve: half of the variance of both
    return _SmoothCurve(criterion, curve, float(np.sqrt(variances.max() / 2)))


class _SteppedCurves(NamedTuple):
    criterion: float  # of Akaike, of the fit to the results as they are
    curves: FloatArray  # [draws, grid, 2], each fitted to the results with other weights


def _stepped_curves(shares: FloatArray, points: FloatArray, errors: FloatArray) -> _SteppedCurves:
    """Isotonic regression of points [m, 2] on the first objective's weight: more weight on an objective
    never makes its best value worse. It has as many parameters as steps (Meyer and Woodroofe 2000). Where
    steps lie is unsure, so many fits are made, their results weighted by draws (Rubin's Bayesian bootstrap
    1981): their mean is smoother, and their spread is its noise."""
    precision = 1 / np.square(errors)
    fitted = _isotonic(points, precision)
    criterion = float((np.square(fitted - points) * precision).sum())
    criterion += 2 * sum(len(np.unique(column)) for column in fitted.T)
    draws = np.random.default_rng(0).exponential(size=(_DRAWS, len(points), 1))
    fits = np.stack([_isotonic(points, precision * draw) for draw in draws])
    nodes = np.stack([[np.interp(_GRID, shares, column) for column in fit.T] for fit in fits])
    return _SteppedCurves(criterion, nodes.transpose(0, 2, 1))


def _isotonic(points: FloatArray, precision: FloatArray) -> FloatArray:
    """The first column rising, the second falling."""
    columns = [
        isotonic_regression(points[:, n], weights=precision[:, n], increasing=n == 0).x for n in range(2)
    ]
    return np.stack(columns, axis=1)
