"""Pareto fronts in closed form, and what an exact solver finds on them for given weights.

Points are maximised: the test functions of the literature (ZDT, DTLZ, WFG) are minimised, and come negated.
Linear scalarisation maximises w.f. Chebyshev scalarisation minimises max_i w_i (z_i - f_i), z the ideal
point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mahalo_ray.evaluation.statistics import non_dominated

Array = NDArray[np.float64]


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
        best = non_dominated(-costs, distinct=True)
        return parameter[best], costs[best]

    @cached_property
    def _ratio(self) -> Array:
        """Of the distances from the ideal point; it rises along the front."""
        shifted = self._grid[1] - self.ideal
        return shifted[:, 0] / np.maximum(shifted[:, 1], 1e-300)

    @cached_property
    def dense(self) -> Array:
        """Points along the whole front."""
        return -self._grid[1][:: max(1, len(self._grid[1]) // 20_000)]

    @cached_property
    def ideal(self) -> Array:
        return self._grid[1].min(axis=0)

    def solve(self, weights: Array) -> Array:
        """The point of the front for each row of weights [n, 2] -> [n, 2]."""
        parameter, _ = self._grid

        def excess(at: Array) -> Array:
            shifted = self.cost(at) - self.ideal
            return weights[:, 0] * shifted[:, 0] - weights[:, 1] * shifted[:, 1]

        ratio = self._ratio
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


@dataclass(frozen=True)
class Surface:
    """A front of three objectives: what an exact solver finds for weights, and points all over it."""

    name: str
    solve: Callable[[Array], Array]  # [n, 3] -> [n, 3]
    dense: Array
    scalarisation: str = "linear"


def _octant(steps: int = 140) -> Array:
    """Directions with entries of at least 0, about evenly."""
    first, second = np.meshgrid(np.linspace(0, 1, steps), np.linspace(0, np.pi / 2, steps))
    sine = np.sqrt(1 - first**2)
    return np.stack([sine * np.cos(second), sine * np.sin(second), first], axis=-1).reshape(-1, 3)


def sphere(scales: tuple[float, float, float] = (1, 1, 1), *, concave: bool, name: str) -> Surface:
    """An eighth of an ellipsoid. Concave (minimised: DTLZ2; WFG4 with scales 2, 4, 6) under Chebyshev, where
    the costs lie in the direction 1/w; convex (maximised) under linear scalarisation."""
    axes = np.array(scales)
    directions = _octant()

    def concave_solution(weights: Array) -> Array:
        costs = 1 / np.maximum(weights, 1e-12)
        return -costs / np.linalg.norm(costs / axes, axis=1, keepdims=True)

    def convex_solution(weights: Array) -> Array:
        scaled = weights * axes
        return scaled * axes / np.linalg.norm(scaled, axis=1, keepdims=True)

    if concave:
        return Surface(name, concave_solution, -directions * axes, "chebyshev")
    return Surface(name, convex_solution, directions * axes)


def sampled(name: str, cost: Callable[[Array], Array], steps: int = 500) -> Surface:
    """A front given by costs [m, 3] of two parameters in [0, 1], solved by search over a fine grid."""
    axis = np.linspace(0, 1, steps)
    parameters = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    costs = cost(parameters)
    costs = costs[non_dominated(-costs, distinct=True)]
    shifted = costs - costs.min(axis=0)

    def solution(weights: Array) -> Array:
        best = [int(np.argmin((shifted * row).max(axis=1))) for row in weights]
        return -costs[best]

    return Surface(name, solution, -costs[:: max(1, len(costs) // 20_000)], "chebyshev")


def dtlz7_of_three(parameters: Array) -> Array:
    last = 2 * (3 - (parameters / 2 * (1 + np.sin(3 * np.pi * parameters))).sum(axis=1))
    return np.concatenate([parameters, last[:, None]], axis=1)


def wfg2_of_three(parameters: Array) -> Array:
    x, y = (parameters * np.pi / 2).T
    first = 2 * (1 - np.cos(x)) * (1 - np.cos(y))
    second = 4 * (1 - np.cos(x)) * (1 - np.sin(y))
    third = 6 * (1 - parameters[:, 0] * np.cos(5 * np.pi * parameters[:, 0]) ** 2)
    return np.stack([first, second, third], axis=1)


def bandit_values(weights: Array, rewards: Array, tau: float) -> Array:
    """pi.R_k - tau KL(pi || uniform) at the optimal policy pi = softmax(w.R / tau) -> [n, objectives]."""
    logits = weights @ rewards / tau
    logits = logits - logits.max(axis=1, keepdims=True)
    policy = np.exp(logits)
    policy /= policy.sum(axis=1, keepdims=True)
    terms = policy * np.log(np.maximum(policy, 1e-300) * rewards.shape[1])
    return policy @ rewards.T - tau * terms.sum(axis=1, keepdims=True)


FIVE_ARMS = np.stack([np.linspace(0, 1, 5), 1 - np.linspace(0, 1, 5) ** 4])


def bandit_of_three(arms: int = 20, tau: float = 0.1, seed: int = 1) -> Surface:
    """Random rewards in [0, 1] of so many arms, three objectives."""
    draws = np.random.default_rng(seed)
    rewards = draws.random((3, arms))
    weights = np.concatenate(
        [draws.dirichlet(np.full(3, shape), 40_000) for shape in (0.15, 0.4, 1.0, 3.0)] + [np.eye(3)]
    )
    points = bandit_values(weights, rewards, tau)
    cells = np.round((points - points.min(axis=0)) / np.ptp(points, axis=0) * 120).astype(int)
    even = points[np.unique(cells, axis=0, return_index=True)[1]]
    return Surface(f"KL bandit, tau {tau:g}", lambda w: bandit_values(w, rewards, tau), even)
