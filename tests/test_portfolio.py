"""Portfolios against brute force, and their certificate against the truth."""

from __future__ import annotations

import doctest
import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps import Portfolio, portfolio
from mahalo_ray.sweeps.portfolio import least_eps_by_size

NAMES = "abc"


def vectors(rows: np.ndarray) -> list[Weights]:
    return [Weights(dict(zip(NAMES, row, strict=False))) for row in rows.tolist()]


def shortfall(values: np.ndarray, weights: np.ndarray, members: tuple[int, ...]) -> float:
    """The largest relative loss of the members at the weight vectors."""
    worth = weights @ values.T
    best = worth.max(axis=1)
    return float(((best - worth[:, list(members)].max(axis=1)) / np.abs(best)).max())


def test_small_cases_equal_brute_force_and_certificates_hold() -> None:
    draws = np.random.default_rng(0)
    for _ in range(20):
        count, objectives = int(draws.integers(3, 9)), int(draws.integers(2, 4))
        values, weights = draws.normal(size=(count, objectives)), draws.dirichlet(np.ones(objectives), count)
        found = portfolio(values, vectors(weights), eps=0.1)
        subsets = [s for r in range(1, count + 1) for s in itertools.combinations(range(count), r)]
        smallest = next(len(s) for s in subsets if shortfall(values, weights, s) <= 0.1)
        assert shortfall(values, weights, found.members) <= 0.1 + 1e-9
        assert len(found.members) == smallest
        assert found.exact
        pair = portfolio(values, vectors(weights), size=2)
        least = min(shortfall(values, weights, s) for s in subsets if len(s) <= 2)
        assert shortfall(values, weights, pair.members) == pytest.approx(least)
        assert pair.eps == pytest.approx(least)
        assert len(pair.members) <= 2
        for mixture in draws.dirichlet(np.ones(count), 50):
            point = mixture @ weights
            asked = vectors(point[None])[0]
            loss = (values @ point).max() - values[found.member(asked)] @ point
            assert loss <= found.loss_bound(asked) + 1e-9


def test_a_bandit_of_three_objectives_needs_few_members_within_one_and_a_half_percent() -> None:
    draws = np.random.default_rng(1)
    grid = np.array([(i, j, 12 - i - j) for i in range(13) for j in range(13 - i)]) / 12
    rewards = draws.random((3, 20))
    logits = grid @ rewards / 0.1
    policies = np.exp(logits - logits.max(axis=1, keepdims=True))
    policies /= policies.sum(axis=1, keepdims=True)
    values = policies @ rewards.T
    found = portfolio(values, vectors(grid), eps=0.015)
    assert len(found.members) <= 7
    for point in draws.dirichlet(np.ones(3), 200):
        asked = vectors(point[None])[0]
        assert (values @ point).max() - values[found.member(asked)] @ point <= found.loss_bound(asked) + 1e-9


def test_failed_policies_keep_their_rows_and_a_file_gives_it_all_back(tmp_path: Path) -> None:
    weights = vectors(np.stack([np.linspace(0, 1, 5), 1 - np.linspace(0, 1, 5)], axis=1))
    values = np.array([[0, 1], [np.nan, 0], [0.7, 0.7], [0.95, 0.4], [1, 0]])
    found = portfolio(values, weights, eps=0.02)
    assert 1 not in found.members
    assert found.member(Weights.one("a")) == 4
    url = str(tmp_path / "portfolio.json")
    found.save(url)
    again = Portfolio.load(url)
    assert again.members == found.members
    asked = Weights.parse("a=0.3,b=0.7")
    assert (again.member(asked), again.loss_bound(asked)) == (found.member(asked), found.loss_bound(asked))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json' is no portfolio"):
        Portfolio.load(str(tmp_path / "other.json"))


def test_the_certificate_is_the_largest_bound_and_what_is_played_there_tightens_it() -> None:
    draws = np.random.default_rng(2)
    for objectives in (2, 3):
        rewards = draws.random((objectives, 15))

        def solve(grid: np.ndarray, rewards: np.ndarray = rewards) -> np.ndarray:
            """The best policies of a bandit with entropy at weights [N, objectives] -> their values."""
            policies = np.exp((grid @ rewards) / 0.2)
            return (policies / policies.sum(axis=1, keepdims=True)) @ rewards.T

        grid = np.concatenate([np.eye(objectives), draws.dirichlet(np.ones(objectives), 4)])
        for _ in range(3):
            found = portfolio(solve(grid), vectors(grid), size=2)
            worst = found.certificate()
            assert worst.loss == pytest.approx(found.loss_bound(worst.weights), abs=1e-9)
            asked = vectors(draws.dirichlet(np.ones(objectives), 60))
            assert max(map(found.loss_bound, asked)) <= worst.loss + 1e-9
            before = found.loss_bound(worst.weights)
            grid = np.concatenate([grid, [worst.weights.over(NAMES[:objectives])]])
            again = portfolio(solve(grid), vectors(grid), size=2)
            assert again.loss_bound(worst.weights) <= before + 1e-9
    flat = portfolio(np.ones((5, 2)), vectors(draws.dirichlet(np.ones(2), 5)), size=1)
    assert flat.certificate().loss == pytest.approx(0)  # OPT is linear: no hull to take


def test_a_loss_has_an_interval_where_the_values_were_measured(tmp_path: Path) -> None:
    weights = vectors(np.stack([np.linspace(0, 1, 5), 1 - np.linspace(0, 1, 5)], axis=1))
    values = np.array([[0, 1], [0.4, 0.95], [0.7, 0.7], [0.95, 0.4], [1, 0]])
    exact = portfolio(values, weights, size=2)
    asked = Weights.parse("a=0.4,b=0.6")
    assert exact.loss_interval(asked) == (exact.loss_bound(asked),) * 2
    samples = values + np.random.default_rng(0).normal(0, 0.02, (300, 5, 2))
    policies = tuple({"method": f"policy {n}"} for n in range(5))
    noisy = exact.described(policies, "reward", "best of five", samples, "abc")
    low, high = noisy.loss_interval(asked)
    assert 0 <= low < high < 0.2 and high > exact.loss_bound(asked)
    url = str(tmp_path / "portfolio.json")
    noisy.save(url)
    again = Portfolio.load(url)
    assert again.loss_interval(asked) == pytest.approx((low, high), abs=1e-5)
    assert (again.policies, again.unit, again.best, again.sweep) == (
        policies,
        "reward",
        "best of five",
        "abc",
    )
    assert again.name_of(again.member(asked)).startswith("policy ")


def test_more_members_never_lose_more() -> None:
    draws = np.random.default_rng(3)
    values, weights = draws.random((12, 3)), vectors(draws.dirichlet(np.ones(3), 12))
    curve = least_eps_by_size(values, weights, range(1, 7))
    assert list(curve.values()) == sorted(curve.values(), reverse=True)


def test_weights_outside_the_hull_have_no_certificate() -> None:
    found = portfolio([[1, 0], [0, 1]], [Weights.parse("a=0.6,b=0.4"), Weights.parse("a=0.4,b=0.6")], eps=0)
    assert found.loss_bound(Weights.one("a")) == float("inf")
    assert found.loss_bound(Weights.balanced("ab")) < 0.2


def test_bad_input_is_named() -> None:
    two = [Weights.one("a"), Weights.one("b")]
    with pytest.raises(ValueError, match="at least 2 objectives"):
        portfolio([[1.0]], [Weights.one("a")], eps=0.1)
    with pytest.raises(ValueError, match="give either"):
        portfolio(np.eye(2), two)
    with pytest.raises(ValueError, match="give either"):
        portfolio(np.eye(2), two, eps=0.1, size=2)
    with pytest.raises(ValueError, match="all rows hold NaN"):
        portfolio(np.full((2, 2), np.nan), two, eps=0.1)
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        portfolio(np.zeros((3, 2)), two, eps=0.1)


def test_the_docstring_example_runs() -> None:
    results = doctest.testmod(importlib.import_module("mahalo_ray.sweeps.portfolio"))
    assert results.attempted and not results.failed
