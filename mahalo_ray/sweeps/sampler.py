"""What every sampler of weight vectors does: asks for weights, is told their results, says when it is done.

A sampler's state is the list of what it was told: one made anew with the same arguments and told the same
rounds asks the same weights next. Searches that survive a killed driver rest on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from mahalo_ray.metrics import FloatArray, finite_array
from mahalo_ray.objectives import Weights

_OFF_SIMPLEX = 1e-6  # how far the sum of a mapping's weights may be from 1


@runtime_checkable
class Sampler(Protocol):
    """Chooses weight vectors whose results should cover a Pareto front.

    The loop of a sampler is

        while not sampler.finished:
            asked = sampler.ask()
            sampler.tell(asked, evaluate(asked))
        chosen = sampler.ask()
    """

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in the order of the columns of `values`."""
        ...

    @property
    def finished(self) -> bool:
        """Whether asking again would bring nothing more (each sampler says when that is)."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know: failed trials, results without any spread, a gap."""
        ...

    def ask(self) -> list[Weights]:
        """The weight vectors of the next round; once finished, those that the sampler chose. Changes nothing:
        asked twice it answers the same."""
        ...

    def tell(
        self, weights: Sequence[Weights], values: ArrayLike, standard_errors: ArrayLike | None = None
    ) -> None:
        """Results of a round: `values` [n, objectives], maximised; a row of NaN is a trial that failed.

        `standard_errors` [n, objectives] of the values, if they are noisy. ValueError for shapes that do not
        match, infinities, weights outside the simplex, or a round in which nothing succeeded.
        """
        ...


def check_objectives(objectives: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple; a ValueError if there are fewer than two or one comes twice."""
    if isinstance(objectives, str) or len(objectives) < 2:
        raise ValueError(
            f"a front needs at least 2 objectives, got {objectives!r}: one alone has no trade-off"
        )
    if len(set(objectives)) != len(objectives):
        raise ValueError(f"an objective is named twice: {', '.join(objectives)}")
    return tuple(objectives)


def to_weights(objectives: Sequence[str], rows: FloatArray) -> list[Weights]:
    """Rows [n, objectives] on the simplex as `Weights`."""
    return [Weights(dict(zip(objectives, row, strict=True))) for row in np.asarray(rows).tolist()]


class SweepResults:
    """The results of all rounds of a sampler, one row per distinct weight vector.

    Args:
        objectives: at least two names.
        needed: a round may bring no fewer results than this together with the rounds before it.
    """

    def __init__(self, objectives: Sequence[str], needed: int = 1) -> None:
        self.objectives = check_objectives(objectives)
        self.needed = needed
        self.rounds = 0
        self.failed: list[Weights] = []
        self._weights = np.zeros((0, len(self.objectives)))
        self._values = np.zeros((0, len(self.objectives)))
        self._errors = np.zeros((0, len(self.objectives)))

    def add(
        self, weights: Sequence[Weights], values: ArrayLike, standard_errors: ArrayLike | None
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Check and keep one round; returns its (weights, values, standard errors), each [m, objectives],
        without failed trials. Nothing is kept of a round that raises."""
        vectors = [self.checked(vector) for vector in weights]
        rows = np.array([vector.over(self.objectives) for vector in vectors], dtype=np.float64)
        points = np.asarray(values, dtype=np.float64)
        expected = (len(vectors), len(self.objectives))
        if points.shape != expected:
            raise ValueError(
                f"values have shape {points.shape}: {expected} (weights, objectives) was asked for"
            )
        errors = (
            np.zeros(expected) if standard_errors is None else np.asarray(standard_errors, dtype=np.float64)
        )
        if errors.shape != expected:
            raise ValueError(f"standard errors have shape {errors.shape}, values {expected}")
        came = np.asarray(~np.isnan(points).any(axis=1))
        failed = [vectors[row] for row in np.flatnonzero(~came)]
        if not came.any() or len(self._values) + came.sum() < self.needed:
            raise ValueError(
                f"{came.sum()} of {len(vectors)} trials have a result: at least {self.needed} are needed. "
                f"Failed: {'; '.join(vector.label() for vector in failed)}"
            )
        points = finite_array(points[came], "values", dimensions=2)
        errors = finite_array(errors[came], "standard errors", dimensions=2)
        if (errors < 0).any():
            raise ValueError("standard errors must not be negative")
        self._weights = np.concatenate([self._weights, rows[came]])
        self._values = np.concatenate([self._values, points])
        self._errors = np.concatenate([self._errors, errors])
        self.failed += failed
        self.rounds += 1
        return rows[came], points, errors

    def __len__(self) -> int:
        """Results so far, failed trials not counted."""
        return len(self._values)

    @property
    def noisy(self) -> bool:
        """Whether any result came with a standard error above 0."""
        return bool(self._errors.any())

    def merged(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(weights, values, standard errors) of all rounds, each [m, objectives]; results of equal weights
        are averaged by the inverse of their variance, a result that was told again unchanged counts once."""
        count = len(self.objectives)
        rows = np.concatenate([np.round(self._weights, 12), self._values, self._errors], axis=1)
        weights, values, standard_errors = np.split(np.unique(rows, axis=0), [count, 2 * count], axis=1)
        distinct, member = np.unique(weights, axis=0, return_inverse=True)
        member = member.reshape(-1)
        precision = 1 / np.maximum(np.square(standard_errors), 1e-24)
        totals = _sum_by(member, precision)
        errors = np.where(totals < 1e23, 1 / np.sqrt(totals), 0.0).astype(np.float64)
        return distinct.astype(np.float64), _sum_by(member, precision * values) / totals, errors

    def notes(self) -> tuple[str, ...]:
        """Failed trials, and results that do not differ."""
        found = []
        if self.failed:
            total = len(self) + len(self.failed)
            names = "; ".join(vector.label() for vector in self.failed)
            found.append(f"{len(self.failed)} of {total} trials failed and are left out: {names}")
        if len(self) > 1 and not np.ptp(self._values, axis=0).any():
            found.append(
                f"all {len(self)} results are equal: the front is one point, and the weights stay as asked"
            )
        return tuple(found)

    def checked(self, vector: Weights | Mapping[str, float]) -> Weights:
        """The vector as `Weights`; ValueError if it is a mapping off the simplex."""
        if isinstance(vector, Weights):
            return vector
        total = sum(vector.values())
        if not abs(total - 1) <= _OFF_SIMPLEX or min(vector.values()) < 0:
            raise ValueError(
                f"weights {dict(vector)} are not on the simplex: none below 0, and a sum of 1 (it is {total})"
            )
        return Weights(vector)


def _sum_by(member: np.ndarray, rows: FloatArray) -> FloatArray:
    sums = np.zeros((int(member.max()) + 1, rows.shape[1]))
    np.add.at(sums, member, rows)
    return sums
