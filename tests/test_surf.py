"""SURF against fronts in closed form: known unevenness of uniform weights, then even spacing."""

from __future__ import annotations

import doctest
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps import SurfSampler, surf
from mahalo_ray.sweeps.front_metrics import coefficient_of_variation, segment_lengths

ARMS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
REWARDS = np.stack([ARMS, 1 - ARMS**4])
TAU = 0.05
Front = Callable[[float], np.ndarray]


def bandit(w: float) -> np.ndarray:
    """Five arms, uniform reference: pi.R_k - tau KL at the optimal policy of weights (w, 1 - w)."""
    logits = (w * REWARDS[0] + (1 - w) * REWARDS[1]) / TAU
    policy = np.exp(logits - logits.max())
    policy /= policy.sum()
    divergence = float((policy * np.log(np.maximum(policy, 1e-300) / 0.2)).sum())
    return policy @ REWARDS.T - TAU * divergence


def circle(w: float) -> np.ndarray:
    return np.array([w, 1 - w]) / np.hypot(w, 1 - w)


def segments(weights: list[Weights], front: Front) -> np.ndarray:
    points = np.array([front(vector["a"]) for vector in weights])
    return np.linalg.norm(np.diff(points, axis=0), axis=1)


def unevenness(weights: list[Weights], front: Front) -> float:
    lengths = segments(weights, front)
    return float(lengths.std() / lengths.mean())


def uniform(n: int) -> list[Weights]:
    return [Weights({"a": w, "b": 1 - w}) for w in np.linspace(0, 1, n).tolist()]


def test_the_bandit_is_spaced_as_evenly_as_the_exact_rule_in_fewer_rounds() -> None:
    before = segments(uniform(12), bandit)
    assert before.std() / before.mean() == pytest.approx(0.658, abs=1e-3)
    assert before.max() / before.min() == pytest.approx(11.5, abs=0.05)
    sampler = SurfSampler(["a", "b"], 12)
    assert [vector["a"] for vector in sampler.ask()] == pytest.approx(np.linspace(0, 1, 12), abs=1e-6)
    while not sampler.finished:
        asked = sampler.ask()
        assert [v["a"] for v in asked] == sorted(v["a"] for v in asked)
        sampler.tell(asked, np.array([bandit(v["a"]) for v in asked]))
    assert sampler.rounds < 15
    after = segments(sampler.ask(), bandit)
    assert after.std() / after.mean() < 1e-3
    assert after.max() / after.min() < 1.003
    assert after.sum() == pytest.approx(1.41723, abs=2e-3)
    # Rounding takes interpolated shares a digit beyond the simplex here: the weights stay on it.
    finer = SurfSampler(["a", "b"], 16, tolerance=1e-4)
    while not finer.finished:
        finer.tell(finer.ask(), np.array([bandit(v["a"]) for v in finer.ask()]))
    assert unevenness(finer.ask(), bandit) < 1e-4


@pytest.mark.parametrize(
    ("front", "uniform_weights", "published"),
    [
        ("dtlz2", 0.2023, 4.6e-5),
        ("wfg4", 0.3326, 3.4e-5),
        ("zdt2", 0.1523, 5e-5),
        ("zdt3", 0.6334, 0.2412),
        ("dtlz7", 0.6605, 0.5102),
        ("wfg2", 0.7018, 0.2896),
    ],
)
def test_published_unevenness_is_reached_in_fewer_rounds(
    front: str, uniform_weights: float, published: float, fronts: ModuleType
) -> None:
    """Figures of arXiv 2605.20619: 16 points, 30 rounds, exact solver, Chebyshev scalarisation."""
    curve = fronts.Curve(front, getattr(fronts, front))
    sampler = SurfSampler(["a", "b"], 16, scalarisation="chebyshev", tolerance=1e-4)
    first = coefficient_of_variation(segment_lengths(curve.solve(rows(sampler.ask()))))
    assert first == pytest.approx(uniform_weights, abs=1e-4)
    while not sampler.finished:
        asked = sampler.ask()
        sampler.tell(asked, curve.solve(rows(asked)))
    assert sampler.rounds <= 15
    reached = coefficient_of_variation(segment_lengths(curve.solve(rows(sampler.ask()))))
    assert reached <= published
    assert bool(sampler.notes) == (published > 0.1)  # a gap is stated


def test_noise_on_a_front_with_gaps_leaves_less_than_half_the_unevenness(fronts: ModuleType) -> None:
    """Its jumps are as wide as four standard errors of a result, and a polynomial cannot follow them."""
    curve = fronts.Curve("zdt3", fronts.zdt3)
    error = np.tile(0.05 * np.ptp(curve.dense, axis=0), (16, 1))
    left = []
    for seed in (1, 2):
        noise = np.random.default_rng(seed)
        sampler = SurfSampler(["a", "b"], 16, scalarisation="chebyshev")
        while not sampler.finished:
            asked = sampler.ask()
            values = curve.solve(rows(asked))
            sampler.tell(asked, values + noise.normal(size=values.shape) * error, error)
        assert len(asked) == 16 and sampler.rounds <= 30
        left.append(coefficient_of_variation(segment_lengths(curve.solve(rows(sampler.ask())))))
    assert min(left) > 0.061  # the least possible
    assert np.mean(left) < 0.6334 / 2


def test_the_least_unevenness_and_the_least_ball_of_a_known_front(fronts: ModuleType) -> None:
    bounds = importlib.import_module("sweeps")
    gapless, gapped, uneven = (fronts.Curve(n, getattr(fronts, n)) for n in ("zdt2", "zdt3", "dtlz7"))
    assert bounds.most_even(gapless, 6, candidates=300) < 0.02
    assert 0.05 < bounds.most_even(gapped, 16, candidates=200) < 0.08
    assert bounds.most_even(uneven, 16, candidates=200) > 0.42  # half of 0.6605 cannot be reached
    plane = fronts.Surface("square", np.asarray, np.random.default_rng(0).random((4000, 2)))
    low, high = bounds.least_ball(plane, 4, starts=2, rounds=10)
    # Four balls cover the unit square from radius sqrt(1/8) = 0.354 on; five places in it are 0.707 apart.
    assert low == pytest.approx(0.5**0.5 / 2, abs=0.02) and high == pytest.approx(0.125**0.5, abs=0.02)


@pytest.fixture(scope="module")
def fronts() -> Iterator[ModuleType]:
    """The closed forms of the benchmarks."""
    folder = str(Path(__file__).resolve().parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("sweep_fronts")
    finally:
        sys.path.remove(folder)


def rows(weights: list[Weights]) -> np.ndarray:
    return np.array([vector.over(("a", "b")) for vector in weights])


@pytest.mark.parametrize(("front", "start"), [(bandit, 0.658), (circle, 0.2013)])
def test_noise_of_five_percent_leaves_at_most_half_the_unevenness(front: Front, start: float) -> None:
    assert unevenness(uniform(12), front) == pytest.approx(start, abs=1e-3)
    points = np.array([front(w) for w in np.linspace(0, 1, 12)])
    error = np.tile(0.05 * np.ptp(points, axis=0), (12, 1))
    left = []
    for seed in range(20):
        noise = np.random.default_rng(seed)
        sampler = SurfSampler(["a", "b"], 12)
        while not sampler.finished:
            asked = sampler.ask()
            values = np.array([front(v["a"]) for v in asked])
            sampler.tell(asked, values + noise.normal(size=values.shape) * error, error)
        left.append(unevenness(sampler.ask(), front))
    assert np.mean(left) <= start / 2


@pytest.mark.parametrize(
    "front", [lambda w: np.array([w > 0.5, w <= 0.5], dtype=float), lambda w: np.zeros(2)]
)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_front_with_a_gap_or_of_one_point_ends_the_search(front: Front, noise: float) -> None:
    draws = np.random.default_rng(0)
    sampler = SurfSampler(["a", "b"], 6)
    while not sampler.finished:
        asked = sampler.ask()
        values = np.array([front(v["a"]) for v in asked]) + noise * draws.normal(size=(6, 2))
        sampler.tell(asked, values, np.full((6, 2), noise))
    assert sampler.rounds < 12
    assert len(sampler.ask()) == 6


def test_failed_trials_are_left_out_and_bad_input_is_named() -> None:
    sampler = SurfSampler(["a", "b"], 5)
    values = np.array([circle(v["a"]) for v in sampler.ask()])
    values[2] = np.nan
    sampler.tell(sampler.ask(), values)
    assert sampler.rounds == 1
    with pytest.raises(ValueError, match="at least 2 are needed"):
        sampler.tell(sampler.ask(), np.full((5, 2), np.nan))
    with pytest.raises(ValueError, match=r"shape \(5, 3\)"):
        sampler.tell(sampler.ask(), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="needs 2 objectives, got 1"):
        SurfSampler(["a"], 5)
    with pytest.raises(ValueError, match="at least 3 points"):
        SurfSampler(["a", "b"], 2)


def test_the_docstring_example_runs() -> None:
    results = doctest.testmod(surf)
    assert results.attempted and not results.failed
