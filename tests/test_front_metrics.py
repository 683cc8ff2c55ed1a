"""Metrics of fronts against answers known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps import front_metrics as metrics

ANGLES = np.linspace(0, np.pi / 2, 9)
CIRCLE = np.stack([np.sin(ANGLES), np.cos(ANGLES)], axis=1)
DENSE = np.stack([np.sin(np.linspace(0, np.pi / 2, 1001)), np.cos(np.linspace(0, np.pi / 2, 1001))], axis=1)
WEIGHTS = [Weights({"a": w, "b": 1 - w}) for w in np.linspace(0, 1, 9).tolist()]


def test_an_even_circle_has_even_segments_and_reaches_its_ends() -> None:
    lengths = metrics.segment_lengths(CIRCLE[::-1])
    assert lengths == pytest.approx(np.full(8, 2 * np.sin(np.pi / 32)))
    assert metrics.coefficient_of_variation(lengths) == pytest.approx(0, abs=1e-12)
    assert metrics.max_min_ratio(lengths) == pytest.approx(1)
    assert metrics.spread(CIRCLE, ends=[[1, 0], [0, 1]]) == pytest.approx(0, abs=1e-12)
    assert metrics.spread(CIRCLE[1:-1], ends=[[1, 0], [0, 1]]) > 0.1
    # halfway between neighbours, the nearest point is half a step away
    assert metrics.largest_empty_ball(CIRCLE, DENSE) == pytest.approx(2 * np.sin(np.pi / 64), abs=1e-3)
    assert metrics.igd(CIRCLE, DENSE) == pytest.approx(np.sin(np.pi / 64), abs=1e-3)
    assert metrics.igd_plus(CIRCLE + 0.5, DENSE) == 0
    assert metrics.igd(CIRCLE + 0.5, DENSE) > 0.3


def test_three_objectives_have_nearest_neighbours_for_segments() -> None:
    cube = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 3]], dtype=float)
    assert metrics.segment_lengths(cube) == pytest.approx([1, 1, 1, 3])


def test_noise_is_taken_out_of_segments() -> None:
    draws = np.random.default_rng(0)
    even = np.stack([np.linspace(0, 1, 2001), np.linspace(1, 0, 2001)], axis=1)[::200]
    errors = np.full(even.shape, 0.03)
    squares = [
        np.square(metrics.segment_lengths(even + draws.normal(size=even.shape) * errors, errors)).mean()
        for _ in range(400)
    ]
    assert np.mean(squares) == pytest.approx(2 * 0.1**2, rel=0.05)


def test_degenerate_fronts_have_defined_or_no_answers() -> None:
    assert math.isnan(metrics.coefficient_of_variation(metrics.segment_lengths([[1, 2]])))
    assert math.isnan(metrics.max_min_ratio(metrics.segment_lengths(np.ones((4, 2)))))
    assert math.isnan(metrics.spread(np.ones((4, 2))))
    assert metrics.max_min_ratio([0.0, 1.0]) == math.inf
    assert metrics.knee(np.ones((4, 2))) == 0
    one = metrics.measure_front(WEIGHTS[:2], [[1, 1], [np.nan, 0]], ["a", "b"], [0, 0])
    assert (one.n, one.hypervolume, one.knee) == (1, 1.0, 0)
    assert one.as_dict()["cv"] is None
    with pytest.raises(ValueError, match="no point has values"):
        metrics.measure_front(WEIGHTS[:1], [[np.nan, 0]], ["a", "b"], [0, 0])


def test_weights_that_steer_and_weights_that_do_not() -> None:
    assert metrics.rank_agreement(WEIGHTS, CIRCLE, "ab") == {"a": 1.0, "b": 1.0}
    assert metrics.rank_agreement(WEIGHTS, CIRCLE[::-1], "ab") == {"a": -1.0, "b": -1.0}
    measured = metrics.measure_front(WEIGHTS, CIRCLE, ["a", "b"], [0, 0])
    assert measured.non_dominated == 9
    assert measured.knee == 4
    assert measured.hypervolume == pytest.approx(0.7, abs=0.05)


def test_the_knee_of_three_objectives_bulges_most() -> None:
    points = np.array([[100, 0, 0], [0, 1, 0], [0, 0, 1], [30, 0.3, 0.3], [50, 0.5, 0.4], [5, 0.1, 0.8]])
    assert metrics.knee(points) == 4


def test_probabilities_and_bands_from_common_samples() -> None:
    draws = np.random.default_rng(1)
    students = draws.normal(size=(1, 400, 2)) * 0.5
    means = np.array([[0, 1], [0.5, 0.5], [1, 0], [0.49, 0.49]])
    values = means[:, None] + students + draws.normal(size=(4, 400, 2)) * 0.1
    boot = metrics.bootstrap_values(values, 500, seed=2)
    assert boot.std(axis=0) == pytest.approx(np.full((4, 2), 0.51 / 20), rel=0.2)
    chance = metrics.probability_non_dominated(boot)
    assert chance[[0, 2]].tolist() == [1, 1]
    assert chance[1] > 0.95
    assert 0.01 < chance[3] < 0.6
    band = metrics.front_band(boot, 0.9)
    middle = int(np.argmin(np.abs(band.at - 0.3)))
    assert band.low[middle] < band.middle[middle] < band.high[middle]
    assert band.low[middle] == pytest.approx(0.5, abs=0.1)
    assert math.isnan(band.middle[-1])
    with pytest.raises(ValueError, match="2 objectives"):
        metrics.front_band(np.zeros((5, 4, 3)))
