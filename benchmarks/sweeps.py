"""Samplers of weights on Pareto fronts in closed form: how even, how complete, for how many evaluations.

    python benchmarks/sweeps.py --output sweeps.json

Two objectives: coefficient of variation (CV) and ratio of longest to shortest chord of the points at the
weights that a sampler chose, hypervolume as a share of the front's, and IGD. Three: the largest empty ball,
too. Below each table stands the least that anyone could reach who knew the front. Noisy evaluations have
normal noise with a standard deviation of 5 % of each objective's range; what a sampler then chose is judged
at its true points. An evaluation is an inner step of an exact solver. Portfolios are compared with brute
force, and their certificate with the best of all policies.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sweep_fronts
from measuring import machine, table, write_results
from scipy.spatial import cKDTree
from sweep_fronts import Array, Curve, bandit_of_three, bandit_values, sampled, sphere

from mahalo_ray.evaluation.statistics import hypervolume
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps import Sampler, make_sampler, portfolio
from mahalo_ray.sweeps.front_metrics import (
    coefficient_of_variation,
    igd,
    largest_empty_ball,
    max_min_ratio,
    segment_lengths,
)

NOISE = 0.05
TAU = 0.05
ON_A_GAP = 20  # a step between neighbours of a dense curve, in median steps, that is a gap
NARROW = 1e-3  # smallest weight under Chebyshev scalarisation
PUBLISHED = {  # SURF after 30 rounds of 16 points, exact solver (arXiv 2605.20619): (uniform weights, SURF)
    "DTLZ2": (0.2023, 4.6e-5),
    "WFG4": (0.3326, 3.4e-5),
    "ZDT3": (0.6334, 0.2412),
    "DTLZ7": (0.6605, 0.5102),
    "WFG2": (0.7018, 0.2896),
    "ZDT2": (0.1524, 0.0),
}


class Front(Protocol):
    """What `Curve` and `Surface` have in common."""

    name: str
    scalarisation: str

    @property
    def dense(self) -> Array: ...

    def solve(self, weights: Array) -> Array: ...


class Bandit:
    """The KL bandit of five arms and two objectives."""

    name, scalarisation = "KL bandit", "linear"

    def __init__(self) -> None:
        w = np.linspace(0, 1, 20_001)
        self.dense = self.solve(np.stack([w, 1 - w], axis=1))

    def solve(self, weights: Array) -> Array:
        return bandit_values(weights, sweep_fronts.FIVE_ARMS, TAU)


def curves() -> list[Front]:
    names = ("ZDT1", "ZDT2", "ZDT3", "DTLZ2", "DTLZ7", "WFG2", "WFG4")
    return [Bandit(), *(Curve(name, getattr(sweep_fronts, name.lower())) for name in names)]


def surfaces() -> list[Front]:
    return [
        sphere(concave=True, name="DTLZ2 (concave)"),
        sphere(concave=False, name="sphere (convex)"),
        bandit_of_three(tau=TAU),
        bandit_of_three(tau=2 * TAU),
        sphere((2, 4, 6), concave=True, name="WFG4 (concave)"),
        sampled("DTLZ7", sweep_fronts.dtlz7_of_three),
        sampled("WFG2", sweep_fronts.wfg2_of_three),
    ]


def names(front: Front) -> list[str]:
    return list("abc")[: front.dense.shape[1]]


def rows(front: Front, weights: Sequence[Weights]) -> Array:
    array = np.array([vector.over(names(front)) for vector in weights])
    return np.maximum(array, NARROW) if front.scalarisation == "chebyshev" else array


def search(front: Front, sampler: Sampler, noise: float, seed: int) -> tuple[Array, int]:
    """(the true points at the weights that the sampler chose, evaluations)."""
    draws = np.random.default_rng(seed)
    error = noise * np.ptp(front.dense, axis=0)
    evaluations = 0
    while not sampler.finished:
        asked = sampler.ask()
        values = front.solve(rows(front, asked))
        evaluations += len(asked)
        noisy = values + draws.normal(size=values.shape) * error
        sampler.tell(asked, noisy, np.tile(error, (len(asked), 1)) if noise else None)
    return front.solve(rows(front, sampler.ask())), evaluations


def measured(front: Front, make: Callable[[int], Sampler], noise: float, seeds: int) -> dict[str, float]:
    """Means over seeds of the noise and of the sampler."""
    reference = front.dense.min(axis=0) - 0.1 * np.ptp(front.dense, axis=0)
    whole = hypervolume(front.dense, reference)
    found = []
    started = time.perf_counter()
    for seed in range(seeds):
        points, evaluations = search(front, make(seed), noise, seed)
        gaps = segment_lengths(points)
        found.append(
            {
                "points": len(points),
                "evaluations": evaluations,
                "cv": coefficient_of_variation(gaps),
                "max_min": max_min_ratio(gaps),
                "hypervolume": hypervolume(points, reference) / whole,
                "igd": igd(points, front.dense),
                "ball": largest_empty_ball(points, front.dense),
            }
        )
    means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    return {**means, "seconds": (time.perf_counter() - started) / seeds}


def most_even(front: Front, n: int, candidates: int = 500) -> float:
    """The least coefficient of variation of the chords between n points of a known front, its two ends among
    them: no weights can lie more evenly, as chords across a gap are at least as wide as the gap.

    The least mean of (chord / L - 1)^2 over L and points is CV^2 / (1 + CV^2). For a given L dynamic
    programming finds the points, among `candidates` in even steps of the length and the sides of all gaps.
    """
    points = front.dense[np.argsort(front.dense[:, 0])]
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    gaps = np.flatnonzero(steps > max(ON_A_GAP * np.median(steps), 0.02 * steps.sum()))
    lengths = np.concatenate([[0.0], np.cumsum(steps)])
    even = np.searchsorted(lengths, np.linspace(0, lengths[-1], candidates))
    places = points[np.unique(np.concatenate([even, gaps, gaps + 1]))]
    chords = np.linalg.norm(places[:, None] - places[None], axis=2)
    backwards = np.tril_indices(len(places))
    least = np.inf
    for length in lengths[-1] / (n - 1) * np.linspace(0.5, 1.1, 61):
        cost = np.square(chords / length - 1)
        cost[backwards] = np.inf
        total = cost[0]
        for _ in range(n - 2):
            total = (total[:, None] + cost).min(axis=0)
        least = min(least, float(total[-1]) / (n - 1))
    return float(np.sqrt(least / (1 - least)))


def least_ball(front: Front, n: int, starts: int = 3, rounds: int = 40) -> tuple[float, float]:
    """(lower, upper) bound of the least radius of the largest empty ball that n points leave on a known
    front.

    Lower: of n + 1 places, each two at least d apart, two are nearest to the same point, so one of them is
    d/2 away from it. Upper: points placed by farthest insertion, then moved to the middle of what they cover.
    Both are searched for from several starts, on at most 3,000 places; the upper one is measured on all.
    """
    dense, random = front.dense, np.random.default_rng(0)
    some = dense[random.permutation(len(dense))[:3000]]
    apart, radius = 0.0, np.inf
    for _ in range(starts):
        chosen = [int(random.integers(len(some)))]
        for _ in range(n):
            chosen.append(int(cKDTree(some[chosen]).query(some)[0].argmax()))
        apart = max(apart, _spread_out(some, chosen, rounds))
        centres = some[chosen[:n]]
        for _ in range(rounds):
            owner = cKDTree(centres).query(some)[1]
            centres = np.stack([_middle_of(some[owner == row]) for row in range(n)])
            centres = some[cKDTree(some).query(centres)[1]]
            radius = min(radius, largest_empty_ball(centres, dense))
    return apart / 2, radius


def _spread_out(places: Array, chosen: Sequence[int], rounds: int) -> float:
    """The least distance between chosen places, each moved to where it is farthest from the rest."""
    rows = list(chosen)
    best = 0.0
    for _ in range(rounds):
        for position in range(len(rows)):
            others = rows[:position] + rows[position + 1 :]
            rows[position] = int(cKDTree(places[others]).query(places)[0].argmax())
        best = max(best, float(cKDTree(places[rows]).query(places[rows], k=2)[0][:, 1].min()))
    return best


def _middle_of(points: Array) -> Array:
    """Nearly the centre of the smallest ball around the points (Badoiu and Clarkson 2003)."""
    centre: Array = points.mean(axis=0)
    for step in range(2, 30):
        farthest = points[np.argmax(np.square(points - centre).sum(axis=1))]
        centre = centre + (farthest - centre) / step
    return centre


def of_two(front: Front, n: int) -> dict[str, tuple[Callable[[int], Sampler], bool]]:
    """Samplers of two objectives by name, and whether their choice depends on their seed."""
    options: dict[str, Any] = {"scalarisation": front.scalarisation}
    two = names(front)
    return {
        "lattice": (lambda seed: make_sampler("lattice", two, n), False),
        "sobol": (lambda seed: make_sampler("sobol", two, n, seed=seed), True),
        "dirichlet": (lambda seed: make_sampler("dirichlet", two, n, seed=seed), True),
        "surf": (lambda seed: make_sampler("surf", two, n, tolerance=1e-4, **options), False),
        "root_finding": (lambda seed: make_sampler("root_finding", two, n, **options), False),
        "arc_length": (lambda seed: make_sampler("arc_length", two, n, **options), False),
        "surface": (lambda seed: make_sampler("surface", two, n, seed=seed, **options), True),
    }


def of_three(front: Front, n: int, more: int) -> dict[str, tuple[Callable[[int], Sampler], bool]]:
    """Samplers of three objectives with `n` points, and with `more` evaluations that are all points."""
    options: dict[str, Any] = {"scalarisation": front.scalarisation}
    three = names(front)
    return {
        "lattice": (lambda seed: make_sampler("lattice", three, n), False),
        "sobol": (lambda seed: make_sampler("sobol", three, n, seed=seed), True),
        "dirichlet": (lambda seed: make_sampler("dirichlet", three, n, seed=seed), True),
        "surface": (lambda seed: make_sampler("surface", three, n, seed=seed, **options), True),
        "surface, respaced": (
            lambda seed: make_sampler("surface", three, n, seed=seed, respacings=3, **options),
            True,
        ),
        "lattice, more": (lambda seed: make_sampler("lattice", three, more), False),
        "surface, more": (lambda seed: make_sampler("surface", three, more, seed=seed, **options), True),
    }


def portfolios(draws: int, cases: int) -> dict[str, Any]:
    """Portfolios against brute force, and certificates against the best of all policies."""
    random = np.random.default_rng(0)
    differing = 0
    for _ in range(cases):
        count, objectives = int(random.integers(3, 10)), int(random.integers(2, 4))
        values = random.normal(size=(count, objectives))
        grid = random.dirichlet(np.ones(objectives), count)
        worth = grid @ values.T
        best = worth.max(axis=1)
        near = (best[:, None] - worth) / np.abs(best)[:, None] <= 0.1
        subsets = (s for r in range(1, count + 1) for s in itertools.combinations(range(count), r))
        least = len(next(s for s in subsets if near[:, list(s)].any(axis=1).all()))
        vectors = [Weights(dict(zip("abc", row, strict=False))) for row in grid.tolist()]
        differing += len(portfolio(values, vectors, eps=0.1).members) != least
    rewards = np.random.default_rng(1).random((3, 20))
    grid = make_sampler("lattice", list("abc"), 91).ask()
    array = np.array([vector.over("abc") for vector in grid])
    values = bandit_values(array, rewards, 2 * TAU)
    chosen = portfolio(values, grid, eps=0.015)
    plain = _rewards(array, rewards, 2 * TAU)
    members = values[list(chosen.members)]
    violated, largest, loosest = 0, 0.0, 0.0
    for row in random.dirichlet(np.ones(3), draws):
        logits = row @ rewards / (2 * TAU)
        optimum = 2 * TAU * (np.log(np.mean(np.exp(logits - logits.max()))) + logits.max())
        loss = optimum - float((members @ row).max())
        bound = chosen.loss_bound(Weights(dict(zip("abc", row.tolist(), strict=True))))
        violated += loss > bound + 1e-9
        largest, loosest = max(largest, loss / optimum), max(loosest, bound / optimum)
    return {
        "small cases": cases,
        "small cases that differ from brute force": differing,
        "members for 1.5 %, of 91 policies": len(chosen.members),
        "members for 1.5 %, rewards without the KL term": len(portfolio(plain, grid, eps=0.015).members),
        "random weights": draws,
        "certificate violated": int(violated),
        "largest loss against all policies": largest,
        "largest certified loss": loosest,
    }


def _rewards(weights: Array, rewards: Array, tau: float) -> Array:
    """pi.R_k alone, of the policies that are optimal with the KL term."""
    logits = weights @ rewards / tau
    policy = np.exp(logits - logits.max(axis=1, keepdims=True))
    plain: Array = policy / policy.sum(axis=1, keepdims=True) @ rewards.T
    return plain


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", type=int, default=16, help="of two objectives")
    parser.add_argument("--surface-points", type=int, default=28, help="of three objectives")
    parser.add_argument(
        "--more", type=int, default=105, help="evaluations of the larger budget, three objectives"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weights", type=int, default=10_000, help="at which certificates are checked")
    parser.add_argument("--parts", default="two,three,portfolio", help="objectives; comma-separated")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    results: dict[str, Any] = {
        "machine": machine(),
        "options": {**vars(options), "output": str(options.output)},
    }
    groups = {
        "two": [(f, of_two(f, options.points)) for f in curves()],
        "three": [(f, of_three(f, options.surface_points, options.more)) for f in surfaces()],
    }
    for group, fronts in groups.items():
        if group not in parts:
            continue
        results[group] = {}
        for front, samplers in fronts:
            cells: dict[str, dict[str, float]] = {}
            for name, (make, seeded) in samplers.items():
                cells[name] = measured(front, make, 0.0, options.seeds if seeded else 1)
                if name in ("lattice", "sobol", "dirichlet", "lattice, more", "surface, more"):
                    continue  # noise does not change what the first four choose; the last is the fifth again
                cells[f"{name}, noise"] = measured(front, make, NOISE, options.seeds)
            results[group][front.name] = cells
            _print(front.name, cells)
            if group == "two":
                bound = most_even(front, options.points)
                print(f"least cv possible: {bound:.3g}", flush=True)
                results.setdefault("least cv", {})[front.name] = bound
            else:
                radii = least_ball(front, options.surface_points)
                print(f"least ball possible: between {radii[0]:.3g} and {radii[1]:.3g}", flush=True)
                results.setdefault("least ball", {})[front.name] = radii
            write_results(options.output, results)
    if "portfolio" in parts:
        results["portfolio"] = portfolios(options.weights, cases=200)
        for key, value in results["portfolio"].items():
            print(f"{key}: {value:.4g}")
    results["published"] = PUBLISHED
    write_results(options.output, results)


def _print(name: str, cells: dict[str, dict[str, float]]) -> None:
    columns = ("points", "evaluations", "cv", "max_min", "hypervolume", "igd", "ball", "seconds")
    lines = [[key, *(f"{cell[column]:.3g}" for column in columns)] for key, cell in cells.items()]
    print(f"\n{name}")
    print(table(["sampler", *columns], lines), flush=True)


if __name__ == "__main__":
    main()
