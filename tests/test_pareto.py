"""Front metrics against values worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mahalo_ray.sweeps import pareto


def test_non_dominated_keeps_trade_offs_and_drops_what_is_beaten() -> None:
    points = [(0.2, 0.8), (0.5, 0.5), (0.4, 0.5), (0.8, 0.1), (0.5, 0.4)]
    assert pareto.non_dominated(points).tolist() == [True, True, False, True, False]


def test_equal_points_do_not_dominate_each_other_but_count_once_when_distinct() -> None:
    points = [(0.5, 0.5), (0.5, 0.5), (0.2, 0.2)]
    assert pareto.non_dominated(points).tolist() == [True, True, False]
    assert pareto.non_dominated(points, distinct=True).tolist() == [True, False, False]


def test_one_objective_keeps_the_best_only() -> None:
    assert pareto.non_dominated([(0.1,), (0.7,), (0.7,)]).tolist() == [False, True, True]
    assert pareto.non_dominated([(0.1,), (0.7,), (0.7,)], distinct=True).tolist() == [False, True, False]
    assert pareto.hypervolume([(0.1,), (0.7,)], [0.2]) == pytest.approx(0.5)


def test_hypervolume_is_the_area_of_the_staircase() -> None:
    # 0.2 x 0.8, then 0.3 more to the right at height 0.5, then 0.3 more at height 0.1
    assert pareto.hypervolume([(0.2, 0.8), (0.5, 0.5), (0.8, 0.1)], [0, 0]) == pytest.approx(
        0.16 + 0.15 + 0.03
    )


def test_hypervolume_in_three_objectives_is_a_union_of_boxes() -> None:
    points = [(1, 1, 2), (1, 2, 1)]  # 2 + 2 minus the shared unit cube
    assert pareto.hypervolume(points, [0, 0, 0]) == pytest.approx(3)


def test_points_that_do_not_exceed_the_reference_add_nothing() -> None:
    assert pareto.hypervolume([(-0.5, 0.9), (0.5, 0.0)], [0, 0]) == 0
    assert pareto.hypervolume([(-0.5, 0.9), (0.5, 0.4)], [0, 0]) == pytest.approx(0.2)


def test_wrong_shapes_and_values_are_errors() -> None:
    with pytest.raises(ValueError, match="2 objectives, the reference point has 3"):
        pareto.hypervolume([(0.1, 0.2)], [0, 0, 0])
    with pytest.raises(ValueError, match="not finite"):
        pareto.non_dominated([(0.1, float("nan"))])


def test_chords_are_distances_in_the_order_given() -> None:
    assert pareto.chord_lengths([(0, 1), (0.3, 0.6), (0.3, 0.0)]) == pytest.approx([0.5, 0.6])
    assert pareto.chord_lengths([(0, 0), (30, 0.4)], scale=(100, 1)) == pytest.approx([0.5])
    with pytest.raises(ValueError, match="2 objectives"):
        pareto.chord_lengths([(0, 0, 0), (1, 1, 1)])


def test_evenness_is_zero_for_equal_chords_and_grows_with_gaps() -> None:
    even = [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert pareto.chord_variation(even) == pytest.approx(0)
    assert pareto.largest_gap(even) == pytest.approx(1)
    uneven = [(0, 0), (1, 0), (4, 0)]  # chords 1 and 3: mean 2, std 1
    assert pareto.chord_variation(uneven) == pytest.approx(0.5)
    assert pareto.largest_gap(uneven) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="at least 3 points"):
        pareto.chord_variation([(0, 0), (0, 0), (0, 0)])


def test_front_and_spread() -> None:
    points = [(0.8, 0.1), (0.4, 0.4), (0.2, 0.8), (0.5, 0.5), (0.5, 0.5)]
    assert pareto.front(points).tolist() == [[0.2, 0.8], [0.5, 0.5], [0.8, 0.1]]
    assert pareto.spread(points) == pytest.approx([0.6, 0.7])


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=8))
def test_dominance_agrees_with_its_definition(points: list[list[int]]) -> None:
    array = np.array(points, dtype=float)
    expected = [not any((q >= p).all() and (q > p).any() for q in array) for p in array]
    assert pareto.non_dominated(array).tolist() == expected
    assert pareto.hypervolume(array[expected], [0, 0, 0]) == pytest.approx(
        pareto.hypervolume(array, [0, 0, 0])
    )
