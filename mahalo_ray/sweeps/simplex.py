"""Samplers that choose all weight vectors beforehand, whatever the front is: a simplex lattice, a Sobol
sequence, and draws from a Dirichlet distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps.sampler import SweepResults, check_objectives, to_weights


def simplex_lattice(objectives: int, steps: int) -> FloatArray:
    """All weight vectors whose entries are multiples of 1/steps (Das and Dennis 1998): [C(steps + objectives
    - 1, objectives - 1), objectives], the first entry falling.

    >>> simplex_lattice(2, 2).tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    bars = np.array(
        list(itertools.combinations(range(steps + objectives - 1), objectives - 1)), dtype=np.int64
    )
    padded = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, steps + objectives - 1)))
    rows: FloatArray = (np.diff(padded, axis=1) - 1)[::-1] / steps
    return rows


def lattice_steps(objectives: int, n: int) -> int:
    """Steps of the largest lattice of at most `n` weight vectors; a ValueError if `n` has no place for all
    the corners."""
    if n < objectives:
        raise ValueError(f"n is {n}: a lattice over {objectives} objectives has at least {objectives} points")
    steps = 1
    while math.comb(steps + objectives, objectives - 1) <= n:
        steps += 1
    return steps


class _ChosenBeforehand:
    """One round of weight vectors that no result changes."""

    def __init__(self, objectives: Sequence[str], rows: FloatArray, notes: tuple[str, ...] = ()) -> None:
        self._results = SweepResults(objectives)
        self._weights = to_weights(self.objectives, rows)
        self._notes = notes

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in the order of the columns of `values`."""
        return self._results.objectives

    @property
    def finished(self) -> bool:
        """Whether the one round was told. Noise changes nothing: the weights do not depend on results."""
        return self._results.rounds > 0

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Sampler`."""
        return self._notes + self._results.notes()

    def ask(self) -> list[Weights]:
        """All weight vectors."""
        return list(self._weights)

    def tell(
        self, weights: Sequence[Weights], values: ArrayLike, standard_errors: ArrayLike | None = None
    ) -> None:
        """See `Sampler`; the results are checked and counted."""
        self._results.add(weights, values, standard_errors)


class LatticeSampler(_ChosenBeforehand):
    """The simplex lattice: weights in equal steps, corners included.

    With three and more objectives a lattice has 3, 6, 10, 15, ... points: the largest of at most `n` is
    taken, and `notes` says how many that are.

    Example:
        >>> [weights.label() for weights in LatticeSampler(["a", "b"], n=3).ask()]
        ['a=1,b=0', 'a=0.5,b=0.5', 'a=0,b=1']
    """

    def __init__(self, objectives: Sequence[str], n: int) -> None:
        count = len(check_objectives(objectives))
        rows = simplex_lattice(count, lattice_steps(count, n))
        notes = () if len(rows) == n else (f"the largest lattice of at most {n} points has {len(rows)}",)
        super().__init__(objectives, rows, notes)


class SobolSampler(_ChosenBeforehand):
    """A scrambled Sobol sequence, mapped to the simplex with equal density everywhere.

    Coordinate i of the unit cube breaks off the share 1 - (1 - u_i)^(1/(k-1-i)) of what is left of the
    weight, which is uniform on the simplex for uniform u. Corners and edges are approached, not met.
    """

    def __init__(self, objectives: Sequence[str], n: int, seed: int = 0) -> None:
        count = len(check_objectives(objectives))
        if n < 1:
            raise ValueError(f"n is {n}: at least 1 point is needed")
        from scipy.stats import qmc  # takes half a second: not for all that read a portfolio

        sequence = qmc.Sobol(count - 1, rng=np.random.default_rng(seed))
        cube = sequence.random_base2(max(0, math.ceil(math.log2(n))))[:n]
        parts = 1 - (1 - cube) ** (1 / np.arange(count - 1, 0, -1))
        left = np.cumprod(np.concatenate([np.ones((n, 1)), 1 - parts], axis=1), axis=1)
        super().__init__(objectives, np.concatenate([left[:, :-1] * parts, left[:, -1:]], axis=1))


class DirichletSampler(_ChosenBeforehand):
    """Independent draws from a symmetric Dirichlet distribution: concentration 1 is uniform on the simplex,
    above 1 nearer to its middle, below 1 nearer to its corners."""

    def __init__(
        self, objectives: Sequence[str], n: int, seed: int = 0, *, concentration: float = 1.0
    ) -> None:
        count = len(check_objectives(objectives))
        if n < 1:
            raise ValueError(f"n is {n}: at least 1 point is needed")
        if not 0 < concentration < math.inf:
            raise ValueError(f"concentration is {concentration}: it must be above 0")
        draws = np.random.default_rng(seed).dirichlet(np.full(count, concentration), n)
        super().__init__(objectives, draws)
