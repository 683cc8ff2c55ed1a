"""Two rivals of SURF for two objectives: equal chords by root finding, and arc-length continuation.

Both walk along the front from one end to the other and evaluate one weight vector after the other: they need
few evaluations for each point and cannot use many workers at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights, unknown_name
from mahalo_ray.sweeps.sampler import SweepResults, check_objectives

_MARGINS = {"linear": 0.0, "chebyshev": 1e-3}
_ATTEMPTS = 3
_ROUNDED = 1e-3  # weights told may differ by this from those asked for
_NARROWEST = 1e-9  # bracket of a weight: a chord that is still missed then is that of a gap

Asked = Generator[list[float], FloatArray, list[float]]  # asks weights [m], is sent results [m, 2], returns n


class _CurveWalk:
    """A sampler that walks along the curve: `_steps` of a subclass asks for one result after the other."""

    def __init__(
        self,
        objectives: Sequence[str],
        n: int,
        *,
        scalarisation: Literal["linear", "chebyshev"] = "linear",
        tolerance: float = 1e-2,
        most: int | None = None,
    ) -> None:
        if len(check_objectives(objectives)) != 2:
            raise ValueError(f"a walk along a curve needs 2 objectives, got {len(objectives)}")
        if n < 3:
            raise ValueError(f"n is {n}: at least 3 points are needed")
        if scalarisation not in _MARGINS:
            raise ValueError(unknown_name("scalarisation", scalarisation, _MARGINS))
        if not tolerance > 0:
            raise ValueError(f"tolerance is {tolerance}: it must be above 0")
        self.n, self.tolerance = n, tolerance
        self.most = 40 * n if most is None else most
        self.evaluations = 0
        self._margin = _MARGINS[scalarisation]
        self._results = SweepResults(objectives)
        self._noise = 0.0  # variance of the difference of two results
        self._final: list[float] | None = None
        self._walk = self._steps()
        self._open = next(self._walk)
        self._begun = list(self._open)  # the weights of the last whole walk
        self._known: dict[int, FloatArray] = {}  # results of the open question, by position
        self._attempts = 0
        self._sent: list[FloatArray] = []  # to the generator so far

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be pickled: it is run again up to where it was.
        return {name: value for name, value in self.__dict__.items() if name != "_walk"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._walk = self._steps()
        next(self._walk)
        for points in self._sent if self._final is None else []:
            self._walk.send(points)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in the order of the columns of `values`."""
        return self._results.objectives

    @property
    def finished(self) -> bool:
        """Whether the chords are equal within the tolerance or the noise of a chord, or `most` evaluations
        are over."""
        return self._final is not None or self.evaluations >= self.most

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Sampler`."""
        found = self._results.notes()
        if self._final is None and self.finished:
            found += (f"{self.evaluations} evaluations were not enough: the chords are not equal yet",)
        return found

    def ask(self) -> list[Weights]:
        """The next weights, mostly one; once finished, the `n` that the walk found."""
        if self.finished:
            return self._weights(self._final or self._begun)
        return self._weights([self._open[n] for n in self._missing()])

    def _missing(self) -> list[int]:
        return [n for n in range(len(self._open)) if n not in self._known]

    def tell(
        self, weights: Sequence[Weights], values: ArrayLike, standard_errors: ArrayLike | None = None
    ) -> None:
        """See `Sampler`; `weights` must be those asked for. A failed trial is asked again, a little moved: a
        walk cannot go on without it. ValueError if three in a row fail."""
        rows = [self._results.checked(vector).over(self.objectives) for vector in weights]
        expected = [vector.over(self.objectives) for vector in self.ask()]
        if len(rows) != len(expected) or np.abs(np.subtract(rows, expected)).max() > _ROUNDED:
            raise ValueError("a walk has to be told the results of the weights that it asked for, in order")
        array = np.asarray(values, dtype=np.float64)
        failed = np.asarray(np.isnan(array).any(axis=-1))
        if array.shape == (1, 2) and failed.all() and self._attempts < _ATTEMPTS - 1:
            self._results.failed += list(weights)
        else:
            _, _, errors = self._results.add(weights, values, standard_errors)
            if errors.any():
                self._noise = float(2 * np.square(errors).sum(axis=1).mean())
        self.evaluations += len(weights)
        for position, point, missed in zip(self._missing(), array, failed, strict=True):
            if not missed:
                self._known[position] = point
            elif self._attempts == _ATTEMPTS - 1:
                raise ValueError(
                    f"the trial at {self._weights([self._open[position]])[0].label()} failed again"
                )
            else:
                share = self._open[position]
                self._open[position] = share + (1e-4 if share < 0.5 else -1e-4)
        self._attempts = self._attempts + 1 if failed.any() else 0
        if self._missing():
            return
        points = np.stack([self._known[n] for n in range(len(self._open))])
        self._known = {}
        self._sent.append(points)
        try:
            self._open = list(self._walk.send(points))
        except StopIteration as end:
            self._final = end.value

    def _chord(self, first: FloatArray, second: FloatArray) -> float:
        """Noise makes chords longer on average: E l^2 = l^2 + variance."""
        return math.sqrt(max(float(np.square(first - second).sum()) - self._noise, 0.0))

    def _chords(self, points: FloatArray) -> FloatArray:
        squares = np.square(np.diff(points, axis=0)).sum(axis=1) - self._noise
        return np.sqrt(np.maximum(squares, 0.0))

    def _weights(self, shares: Sequence[float]) -> list[Weights]:
        first = [self._margin + (1 - 2 * self._margin) * min(max(share, 0.0), 1.0) for share in shares]
        return [Weights(dict(zip(self.objectives, (w, 1 - w), strict=True))) for w in first]

    def _steps(self) -> Asked:
        raise TypeError("a walk defines its steps")

    def _within(self, miss: float, chord: float) -> bool:
        return miss <= max(self.tolerance * chord, math.sqrt(self._noise / 2))


class RootFindingSampler(_CurveWalk):
    """Equal chords by root finding: from one end, find by regula falsi the weight whose result lies one chord
    from the last; after n - 1 chords compare with the other end, correct the chord, and walk again.

    Args:
        objectives: names of two objectives.
        n: points along the front, the two ends included; at least 3.
        scalarisation: "linear" or "chebyshev" (weights stay 1e-3 away from 0 and 1).
        tolerance: share of the chord by which chords, and the last result from the other end, may differ.
        most: evaluations after which the walk stops in any case; default 40 n.
    """

    def _steps(self) -> Asked:
        begun = np.linspace(0, 1, self.n).tolist()
        points = yield begun
        ends = points[0], points[-1]
        chord = float(self._chords(points).mean())
        if chord == 0:
            return begun
        for _ in range(30):
            found, last = [0.0], ends[0]
            for _ in range(self.n - 2):
                low, high = (found[-1], -chord), (1.0, self._chord(last, ends[1]) - chord)
                if high[1] <= 0:
                    break  # the other end is nearer than a chord
                while True:
                    share = high[1] / (high[1] - low[1])
                    share = min(max(share, 0.02), 0.98)
                    weight = high[0] + (low[0] - high[0]) * share
                    point = (yield [weight])[0]
                    miss = self._chord(last, point) - chord
                    if self._within(abs(miss), chord) or high[0] - low[0] < _NARROWEST:
                        break
                    low, high = ((weight, miss), high) if miss < 0 else (low, (weight, miss))
                found.append(weight)
                last = point
            left = self._chord(last, ends[1])
            walked = len(found) - 1
            if walked == self.n - 2 and self._within(abs(left - chord), chord):
                break
            self._begun = self._filled(found)
            chord = (walked * chord + left) / (self.n - 1)
        return self._filled(found)

    def _filled(self, found: list[float]) -> list[float]:
        return found + np.linspace(found[-1], 1.0, self.n - len(found) + 1)[1:].tolist()


class ArcLengthSampler(_CurveWalk):
    """Arc-length continuation: predictor and corrector. The step of the weight is the wanted chord over the
    speed of the last step; a chord more than a quarter off is corrected once. After a walk, the weights are
    interpolated at equal lengths; further walks refine them until their chords are equal.

    Args: as for `RootFindingSampler`.
    """

    def _steps(self) -> Asked:
        begun = np.linspace(0, 1, self.n).tolist()
        points = yield begun
        chord = float(self._chords(points).mean())
        if chord == 0:
            return begun
        end = points[-1]
        chosen = begun
        for walks in range(30):
            weights, lengths, last = [0.0], [0.0], points[0]
            step = 1 / (4 * self.n)
            while weights[-1] < 1:
                for correction in range(2):
                    weight = min(weights[-1] + max(step, _NARROWEST), 1.0)
                    point = end if weight == 1 else (yield [weight])[0]
                    length = self._chord(last, point)
                    step = (weight - weights[-1]) * min(max(chord / max(length, 1e-300), 0.2), 5.0)
                    if correction or 0.75 * chord <= length <= 1.25 * chord or weight == 1 > length / chord:
                        break
                weights.append(weight)
                lengths.append(lengths[-1] + length)
                last = point
            chosen = np.interp(np.linspace(0, lengths[-1], self.n), lengths, weights).tolist()
            inner = yield chosen[1:-1]
            line = np.concatenate([points[:1], inner, points[-1:]])
            chords = self._chords(line)
            if self._within(float(np.abs(chords - chords.mean()).max()), float(chords.mean())):
                break
            self._begun = chosen
            chord = float(chords.mean()) / 2 ** min(walks + 1, 4)
        return chosen
