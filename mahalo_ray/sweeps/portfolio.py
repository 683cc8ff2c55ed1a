"""PALM: a few policies such that every weight vector has a nearly optimal one among them (arXiv 2604.04144).

Policies are found at N weight vectors, with values F_i [objectives]; the worth of policy i at weights w is
w.F_i. A portfolio is the smallest subset that is within `eps` (relative) and `delta` (absolute) of the best
of the N at each of the N weight vectors: a minimum set cover.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.spatial import ConvexHull, Delaunay, QhullError

from mahalo_ray.data import storage
from mahalo_ray.evaluation.statistics import finite_or_none
from mahalo_ray.metrics import FloatArray, finite_array
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps.sweep_table import SWEEP

FILE_IN_RUN = "portfolio.json"
FORMAT = 2  # of the file that `save` writes; 1, without policies, unit and samples, is still read
_EXACT_UP_TO = 2000  # policies for which the cover is solved exactly
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Portfolio:
    """Members of a set of policies, and a certified loss at any weight vector.

    "Best" is over the N policies that were given: over one policy's decoding weights if these were swept,
    over trained policies if each weight vector was trained.

    Args:
        objectives: names, in the order of the columns of `values`.
        weights: [N, objectives] where the policies were found.
        values: [N, objectives] what they reached, maximised; NaN in the rows of policies that failed.
        members: rows of `values`, ascending.
        eps, delta: every one of the N weight vectors has a member worth at least
            best - eps |best| - delta.
        exact: whether no smaller portfolio does that; False: a greedy cover, at most `gap` members too many.
        gap: members more than a proven lower bound.
        policies: JSON of each of the N policies, as what serves them needs it (name, decoding weights,
            guidance, ...); empty where nobody named them.
        unit: what one unit of the weighted sum is, in words.
        best: what the best policy is the best of, in words.
        samples: [resamples, N, objectives] bootstrap means of the values, which make intervals; None where
            the values are exact.
        sweep: fingerprint of the run's sweep that it was made from; "" where it was made from none.
        scale: what every objective was divided by to make `values`; empty where nobody said.
    """

    objectives: tuple[str, ...]
    weights: FloatArray
    values: FloatArray
    members: tuple[int, ...]
    eps: float
    delta: float
    exact: bool
    gap: int
    policies: tuple[dict[str, Any], ...] = ()
    unit: str = "the values' own"
    best: str = "the given policies"
    samples: FloatArray | None = None
    sweep: str = ""
    scale: tuple[float, ...] = ()

    def member(self, weights: Weights) -> int:
        """The member (a row of `values`) that is worth most at these weights."""
        worth = self.values[list(self.members)] @ np.array(weights.over(self.objectives))
        return self.members[int(np.argmax(worth))]

    def loss_bound(self, weights: Weights) -> float:
        """At most how much more than the portfolio's member the best policy is worth at these weights, in the
        unit of the weighted sum of the objectives.

        The best worth OPT is convex in w (a maximum of linear functions), so for w = sum_j l_j v_j over the N
        weight vectors v_j it is at most sum_j l_j OPT(v_j). The tightest such bound is a linear programme. It
        holds also against policies that were not found, as long as those found are optimal at their own
        weights. `inf` where w lies outside the convex hull of the N weight vectors: nothing is known there.
        """
        point = np.array(weights.over(self.objectives))
        return _loss_bound(self._found(self.values), point, self.values[self.member(weights)])

    def known_loss(self, weights: Weights) -> float:
        """How much more than the portfolio's member the best of the N given policies is worth."""
        point = np.array(weights.over(self.objectives))
        worth = self.values @ point
        return float(np.nanmax(worth) - worth[self.member(weights)])

    def loss_interval(self, weights: Weights, confidence: float = 0.95) -> tuple[float, float]:
        """The central `confidence` share of the certified loss over bootstrap resamples of what the values
        were measured on; the member is that of the means. Both ends are `loss_bound` without samples."""
        if self.samples is None:
            return (self.loss_bound(weights),) * 2
        point, member = np.array(weights.over(self.objectives)), self.member(weights)
        bounds = [_loss_bound(self._found(sample), point, sample[member]) for sample in self.samples]
        tail = (1 - confidence) / 2
        low, high = np.quantile(bounds, [tail, 1 - tail])
        return float(low), float(high)

    def certificate(self) -> Certificate:
        """The weights in the convex hull of the N weight vectors at which `loss_bound` is largest."""
        return self.cells()[0]

    def cells(self) -> list[Certificate]:
        """The largest `loss_bound` in every cell, the worst cell first.

        The tightest bound on OPT is its lower convex envelope, which is linear over simplices (cells) of
        weight vectors; the largest loss over a cell is a linear programme.
        """
        vectors, points = self._found(self.values)
        optima = (vectors @ points.T).max(axis=1)
        members = self.values[list(self.members)]
        certificates = []
        for cell in _cells(vectors, optima):
            # max t, s.t. t <= sum_j l_j (OPT_j - v_j.F_m) for every member m, and sum_j l_j = 1
            losses = optima[cell] - members @ vectors[cell].T  # [members, corners]
            solved = linprog(
                np.append(np.zeros(len(cell)), -1.0),
                A_ub=np.hstack([-losses, np.ones((len(members), 1))]),
                b_ub=np.zeros(len(members)),
                A_eq=np.append(np.ones(len(cell)), 0.0)[None],
                b_eq=[1.0],
                bounds=[(0, None)] * len(cell) + [(None, None)],
                method="highs",
            )
            where = np.maximum(solved.x[:-1] @ vectors[cell], 0.0)
            corners = tuple(self._named(row) for row in vectors[cell])
            certificates.append(Certificate(max(0.0, float(-solved.fun)), self._named(where), corners))
        return sorted(certificates, key=lambda cell: -cell.loss)

    def described(
        self,
        policies: tuple[dict[str, Any], ...],
        unit: str,
        best: str,
        samples: FloatArray | None,
        sweep: str,
    ) -> Portfolio:
        """The same portfolio with what its policies, its unit and its best are, with resampled values
        [resamples, N, objectives], and with the fingerprint of its sweep."""
        return replace(self, policies=policies, unit=unit, best=best, samples=samples, sweep=sweep)

    def name_of(self, row: int) -> str:
        """The name of a policy, or its weights where nobody named it."""
        if self.policies:
            return str(self.policies[row]["method"])
        return self._named(self.weights[row]).label()

    def _named(self, vector: FloatArray) -> Weights:
        return Weights(dict(zip(self.objectives, vector.tolist(), strict=True)))

    def _found(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(weights, values) of the policies that did not fail."""
        known = ~np.isnan(values).any(axis=1)
        return self.weights[known], values[known]

    def save(self, url: str) -> None:
        """Write the portfolio as JSON to a path or storage URL."""
        storage.write_json(
            url,
            {
                "format": FORMAT,
                "objectives": list(self.objectives),
                "weights": self.weights.tolist(),
                "values": [None if np.isnan(row).any() else row.tolist() for row in self.values],
                "members": list(self.members),
                "eps": self.eps,
                "delta": self.delta,
                "exact": self.exact,
                "gap": self.gap,
                "policies": list(self.policies),
                "unit": self.unit,
                "best": self.best,
                "sweep": self.sweep,
                "scale": list(self.scale),
                "samples": None if self.samples is None else finite_or_none(self.samples.round(6).tolist()),
            },
        )

    @classmethod
    def of_run(cls, run: str) -> Portfolio:
        """The portfolio that `mahalo portfolio` saved in the run in this folder (a path or URL). ValueError
        where there is none, or the sweep that it was made from has been made anew since."""
        url = storage.join(storage.absolute(run), FILE_IN_RUN)
        if not storage.exists(url):
            raise ValueError(
                f"the run at '{run}' has no portfolio yet: make one with `mahalo portfolio {run} --size 5`, "
                "or --eps and --delta"
            )
        found = cls.load(url)
        if not is_made_of(run, found.sweep):
            raise ValueError(
                f"'{url}' was made from another sweep than the run now has: make it anew with "
                f"`mahalo portfolio {run}`"
            )
        return found

    @classmethod
    def load(cls, url: str) -> Portfolio:
        """Read what `save` wrote. ValueError naming the file if it is something else."""
        try:
            document = storage.read_json(url)
            if document["format"] not in (1, FORMAT):
                raise ValueError(f"format {document['format']}, this version reads 1 and {FORMAT}")
            later = ("unit", "best", "sweep") if document["format"] == FORMAT else ()
            samples = document.get("samples")
            failed = [math.nan] * len(document["objectives"])
            return cls(
                objectives=tuple(document["objectives"]),
                weights=finite_array(document["weights"], "weights", dimensions=2),
                values=np.array([row or failed for row in document["values"]], dtype=np.float64),
                members=tuple(int(member) for member in document["members"]),
                eps=float(document["eps"]),
                delta=float(document["delta"]),
                exact=bool(document["exact"]),
                gap=int(document["gap"]),
                policies=tuple(dict(policy) for policy in document.get("policies", ())),
                samples=None if samples is None else np.array(samples, dtype=np.float64),
                scale=tuple(float(value) for value in document.get("scale", ())),
                **{name: str(document[name]) for name in later},
            )
        except (KeyError, TypeError, json.JSONDecodeError, ValueError) as error:
            raise ValueError(f"'{url}' is no portfolio: {error}") from error


@dataclass(frozen=True)
class Certificate:
    """The largest certified loss of a portfolio over the convex hull of the weight vectors it was made of.

    A policy evaluated at `weights`, the worst ones, splits their cell (whose corners are weight vectors) and
    tightens the bound there.
    """

    loss: float
    weights: Weights
    cell: tuple[Weights, ...]


def _loss_bound(found: tuple[FloatArray, FloatArray], point: FloatArray, member: FloatArray) -> float:
    """See `Portfolio.loss_bound`; `found` are weights and values [N, objectives], `point` the weights asked
    for and `member` the values of the policy that answers [objectives]."""
    vectors, points = found
    optima = (vectors @ points.T).max(axis=1)
    solved = linprog(
        optima,
        A_eq=np.vstack([vectors.T, np.ones(len(optima))]),
        b_eq=np.append(point, 1.0),
        bounds=(0, None),
        method="highs",
    )
    if not solved.success:
        return math.inf
    return max(0.0, float(solved.fun) - float(member @ point))


def _cells(vectors: FloatArray, optima: FloatArray) -> list[NDArray[np.int64]]:
    """The simplices over which the lower convex envelope of `optima` [N] at `vectors` [N, objectives] is
    linear, as positions of their corners. A single weight vector is a cell of its own."""
    distinct, first = np.unique(np.round(vectors, 12), axis=0, return_index=True)
    lifted = np.column_stack([distinct[:, :-1], optima[first]])
    if len(distinct) <= vectors.shape[1]:
        return [first]
    try:
        hull = ConvexHull(lifted)
        facets = hull.simplices[hull.equations[:, -2] < -1e-12]  # those that face down
    except QhullError:  # OPT is linear: every triangulation is as tight
        try:
            facets = Delaunay(distinct[:, :-1]).simplices if vectors.shape[1] > 2 else _neighbours(distinct)
        except QhullError:  # weight vectors on a line: their envelope by one programme over all of them
            return [first]
    return [first[facet] for facet in facets]


def _neighbours(distinct: FloatArray) -> NDArray[np.int64]:
    order = np.argsort(distinct[:, 0])
    return np.stack([order[:-1], order[1:]], axis=1)


def sweep_fingerprint(run: str, stages: Sequence[str] = (SWEEP,)) -> str:
    """What the finished sweeps of a run (of these stages) were made from, as their manifests say; "" without
    one. Several are joined as `stage:fingerprint`, which tells which stages a portfolio was made from."""
    found = {}
    for stage in stages:
        url = storage.join(storage.absolute(run), stage, "manifest.json")
        found[stage] = str(storage.read_json(url)["fingerprint"]) if storage.exists(url) else ""
    if list(found) == [SWEEP]:
        return found[SWEEP]
    return " ".join(f"{stage}:{fingerprint}" for stage, fingerprint in found.items())


def is_made_of(run: str, fingerprint: str) -> bool:
    """Whether the sweeps of a run are still those of a portfolio with this fingerprint."""
    stages = [part.partition(":")[0] for part in fingerprint.split() if ":" in part] or [SWEEP]
    return fingerprint == sweep_fingerprint(run, stages)


def least_eps_by_size(
    values: ArrayLike, weights: Sequence[Weights], sizes: Sequence[int], delta: float | None = None
) -> dict[int, float]:
    """The least eps that a portfolio of at most so many members reaches, for every size.

    >>> w = [Weights.parse(f"a={n / 4},b={1 - n / 4}") for n in range(5)]
    >>> values = [[0, 1], [0.4, 0.95], [0.7, 0.7], [0.95, 0.4], [1, 0]]
    >>> {size: round(eps, 3) for size, eps in least_eps_by_size(values, w, [1, 2, 3]).items()}
    {1: 0.3, 2: 0.05, 3: 0.05}
    """
    return {size: portfolio(values, weights, delta=delta, size=size).eps for size in sizes}


def portfolio(
    values: ArrayLike,
    weights: Sequence[Weights],
    eps: float | None = None,
    delta: float | None = None,
    size: int | None = None,
) -> Portfolio:
    """The smallest portfolio within `eps` and `delta`, or the one of at most `size` members with the least
    `eps`.

    Args:
        values: [N, objectives] of the policies found at the N `weights`, maximised. A row of NaN is a
        policy that
            failed: it is never a member, and its weight vector not looked at.
        eps: relative loss allowed, at least 0 and below 1.
        delta: absolute loss allowed on top, in the unit of the weighted sum; default 0.
        size: instead of `eps`: at most so many members.

    Example:
        >>> w = [Weights.parse(f"a={n / 4},b={1 - n / 4}") for n in range(5)]
        >>> chosen = portfolio([[0, 1], [0.4, 0.95], [0.7, 0.7], [0.95, 0.4], [1, 0]], w, eps=0.1)
        >>> chosen.members
        (1, 3)
        >>> chosen.member(Weights.parse("a=0.9,b=0.1"))
        3
    """
    objectives = tuple(dict.fromkeys(name for vector in weights for name in vector))
    if len(objectives) < 2:
        raise ValueError(f"a portfolio needs at least 2 objectives, the weights name {len(objectives)}")
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(weights), len(objectives)):
        raise ValueError(
            f"values have shape {array.shape}: {len(weights)} weights over {len(objectives)} objectives "
            f"({', '.join(objectives)}) need {(len(weights), len(objectives))}"
        )
    if (eps is None and delta is None and size is None) or (eps is not None and size is not None):
        raise ValueError("give either 'eps' and/or 'delta', or 'size' (with or without 'delta')")
    came = ~np.isnan(array).any(axis=1)
    if not came.any():
        raise ValueError("no policy has values: all rows hold NaN")
    rows = np.flatnonzero(came)
    points = finite_array(array[came], "values", dimensions=2)
    vectors = np.array([vector.over(objectives) for vector in weights], dtype=np.float64)[came]
    if size is not None:
        if size < 1:
            raise ValueError(f"size is {size}: a portfolio has at least 1 member")
        members, reached, exact, gap = _least_eps(points, vectors, size, delta or 0.0)
    else:
        reached = 0.0 if eps is None else eps
        if not 0 <= reached < 1 or (delta is not None and not 0 <= delta < math.inf):
            raise ValueError(f"eps is {eps} and delta {delta}: eps must lie in [0, 1), delta be at least 0")
        members, exact, gap = _cover(_relative_losses(points, vectors, delta or 0.0) <= reached + _ROUNDING)
    all_vectors = np.array([vector.over(objectives) for vector in weights], dtype=np.float64)
    chosen = tuple(int(rows[member]) for member in members)
    return Portfolio(objectives, all_vectors, array, chosen, reached, delta or 0.0, exact, gap)


def _relative_losses(points: FloatArray, vectors: FloatArray, delta: float) -> FloatArray:
    """[N weight vectors, N policies]: the least eps at which a policy is near enough to the best."""
    worth = vectors @ points.T
    best = worth.max(axis=1, keepdims=True)
    missing = np.maximum(best - worth - delta, 0.0)
    scale = np.abs(best)
    return np.where(missing <= _ROUNDING, 0.0, missing / np.where(scale > 0, scale, np.nan).clip(min=1e-300))


def _least_eps(
    points: FloatArray, vectors: FloatArray, size: int, delta: float
) -> tuple[NDArray[np.int64], float, bool, int]:
    """The least eps for which `size` members are enough: bisection over the losses that occur."""
    losses = _relative_losses(points, vectors, delta)
    levels = np.unique(losses[np.isfinite(losses)])
    low, high = 0, len(levels) - 1
    best = _cover(losses <= levels[high] + _ROUNDING)
    while low < high:
        middle = (low + high) // 2
        cover = _cover(losses <= levels[middle] + _ROUNDING)
        if len(cover[0]) <= size:
            high, best = middle, cover
        else:
            low = middle + 1
    return best[0], float(levels[high]), best[1], best[2]


def _cover(near: NDArray[np.bool_]) -> tuple[NDArray[np.int64], bool, int]:
    """A minimum set of columns such that every row of `near` [weight vectors, policies] has one: (columns,
    whether it is proven minimal, how many more than a proven lower bound)."""
    count = near.shape[1]
    if count <= _EXACT_UP_TO:
        solved = milp(
            np.ones(count),
            constraints=LinearConstraint(near.astype(np.float64), lb=1),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            options={"time_limit": 60},
        )
        if solved.x is not None:
            members = np.flatnonzero(solved.x > 0.5)
            bound = math.ceil(float(solved.mip_dual_bound) - 1e-6)
            return members, solved.status == 0, max(0, len(members) - bound)
    members = _greedy_cover(near)
    relaxed = linprog(np.ones(count), A_ub=-near.astype(np.float64), b_ub=-np.ones(len(near)), bounds=(0, 1))
    bound = math.ceil(float(relaxed.fun) - 1e-6) if relaxed.success else 1
    return members, len(members) == bound, len(members) - bound


def _greedy_cover(near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Always the policy that is near enough to the best at most of the weight vectors still open."""
    left = np.ones(len(near), dtype=np.bool_)
    members: list[int] = []
    while left.any():
        members.append(int(np.argmax(near[left].sum(axis=0))))
        left &= ~near[:, members[-1]]
    return np.array(sorted(members), dtype=np.int64)
