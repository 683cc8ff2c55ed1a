"""Pareto fronts in closed form, and what an exact solver finds on them for given weights.

Points are maximised: the test functions of the literature (ZDT, DTLZ, WFG) are minimised, and come negated.
Linear scalarisation maximises w.f. Chebyshev scalarisation minimises max_i w_i (z_i - f_i), z the ideal
point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import moocore
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pareto(points: Array) -> NDArray[np.bool_]:
    """Which points are not dominated (maximised)."""
    return np.asarray(moocore.is_nondominated(points, maximise=True, keep_weakly=False), dtype=bool)


@dataclass(frozen=True)
class Curve:
    """A front of two objectives under Chebyshev scalarisation, given by cost functions of a parameter in
    [0, 1]; the first cost rises with it."""

    name: str
    cost: Callable[[Array], Array]  # [m] -> [m, 2], minimised
    margin: float = 1e-3
    scalarisation: str = "chebyshev"
    samples: int = 200_001

    @cached_property
    def _grid(self) -> tuple[Array, Array]:
        parameter = np.linspace(0, 1, self.samples)
        costs = self.cost(parameter)
        best = pareto(-costs)
        return parameter[best], costs[best]

    @property
    def dense(self) -> Array:
        """Points along the whole front."""
        return -self._grid[1][:: max(1, len(self._grid[1]) // 20_000)]

    @cached_property
    def ideal(self) -> Array:
        return self._grid[1].min(axis=0)

    def solve(self, weights: Array) -> Array:
        """The point of the front for each row of weights [n, 2] -> [n, 2]."""
        parameter, costs = self._grid

        def excess(at: Array) -> Array:
            shifted = self.cost(at) - self.ideal
            return weights[:, 0] * shifted[:, 0] - weights[:, 1] * shifted[:, 1]

        shifted = costs - self.ideal
        ratio = shifted[:, 0] / np.maximum(shifted[:, 1], 1e-300)  # rises along the front
        wanted = weights[:, 1] / np.maximum(weights[:, 0], 1e-300)
        after = np.clip(np.searchsorted(ratio, wanted), 1, len(ratio) - 1)
        low, high = parameter[after - 1], parameter[after]
        across = high - low > 1.5 / (self.samples - 1)  # a gap of the front
        left, right = low.copy(), high.copy()
        for _ in range(60):
            middle = (left + right) / 2
            below = excess(middle) <= 0
            left, right = np.where(below, middle, left), np.where(below, right, middle)
        worst = [(weights * (self.cost(at) - self.ideal)).max(axis=1) for at in (low, high)]
        side = np.where(worst[0] <= worst[1], low, high)
        return -self.cost(np.where(across, side, left))


def _stack(*columns: Array) -> Array:
    return np.stack(columns, axis=1)


def zdt1(x: Array) -> Array:
    return _stack(x, 1 - np.sqrt(x))


def zdt2(x: Array) -> Array:
    return _stack(x, 1 - x**2)


def zdt3(x: Array) -> Array:
    return _stack(x, 1 - np.sqrt(x) - x * np.sin(10 * np.pi * x))


def dtlz2(x: Array) -> Array:
    return _stack(np.sin(x * np.pi / 2), np.cos(x * np.pi / 2))


def dtlz7(x: Array) -> Array:
    return _stack(x, 4 - x * (1 + np.sin(3 * np.pi * x)))


def wfg2(x: Array) -> Array:
    return _stack(2 * (1 - np.cos(x * np.pi / 2)), 4 * (1 - x * np.cos(5 * np.pi * x) ** 2))


def wfg4(x: Array) -> Array:
    return dtlz2(x) * [2, 4]
