"""Reward metrics against values worked by hand."""

import math

import pytest
from scipy import stats

from mahalo_ray import metrics


def test_auc_counts_pairs_with_ties_half() -> None:
    # positives .9 .4; negatives .5 .4 .1: .9 wins 3, .4 loses to .5, ties .4, beats .1
    assert metrics.auc([0.9, 0.4, 0.5, 0.4, 0.1], [1, 1, 0, 0, 0]) == pytest.approx(4.5 / 6)
    assert math.isnan(metrics.auc([0.1, 0.2], [1, 1]))


def test_accuracy_and_brier() -> None:
    probabilities, labels = [0.9, 0.5, 0.4, 0.2], [1, 0, 1, 0]
    assert metrics.accuracy(probabilities, labels) == 0.5
    assert metrics.accuracy(probabilities, labels, threshold=0.3) == 0.75
    assert metrics.brier(probabilities, labels) == pytest.approx((0.01 + 0.25 + 0.36 + 0.04) / 4)
    with pytest.raises(ValueError, match="0 or 1"):
        metrics.brier([0.3], [0.7])


def test_within_group_correlation_does_not_see_differences_between_groups() -> None:
    # group b is better than a as a whole, which the score knows; within each the order is reversed
    scores, truth, groups = [2, 1, 12, 11], [0.1, 0.2, 0.8, 0.9], ["a", "a", "b", "b"]
    assert metrics.pearson(scores, truth) > 0.9
    assert metrics.within_group_rank_correlation(scores, truth, groups) == pytest.approx(-1)
    assert metrics.within_group_rank_correlation(scores, truth, groups, kind="kendall") == pytest.approx(-1)


def test_within_group_correlation_averages_informative_groups() -> None:
    scores = [1, 2, 3, 3, 2, 1, 5, 5, 7, 8]
    truth = [
        1,
        2,
        3,
        1,
        3,
        2,
        0,
        1,
        4,
        4,
    ]  # groups: rho 1, rho -0.5, constant score (0), constant truth (left out)
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    expected = (1 + float(stats.spearmanr([3, 2, 1], [1, 3, 2]).statistic) + 0) / 3
    assert metrics.within_group_rank_correlation(scores, truth, groups) == pytest.approx(expected)
    assert math.isnan(metrics.within_group_rank_correlation([1, 2], [4, 4], [0, 0]))


def test_groups_may_lie_scattered() -> None:
    scores, truth, groups = [1, 5, 2, 4], [1, 1, 2, 2], ["x", "y", "x", "y"]
    assert metrics.within_group_pair_accuracy(scores, truth, groups) == 0.5
    with pytest.raises(ValueError, match="4 scores but 3 group ids"):
        metrics.within_group_pair_accuracy(scores, truth, groups[:3])


def test_pair_accuracy_counts_pairs_and_best_against_worst_counts_groups() -> None:
    # group 0: truth 1 2 3, scores 1 3 2: pairs (2>1) won, (3>1) won, (3>2) lost. group 1: tie.
    scores, truth, groups = [1, 3, 2, 4, 4], [1, 2, 3, 0, 1], [0, 0, 0, 1, 1]
    assert metrics.within_group_pair_accuracy(scores, truth, groups) == pytest.approx(2.5 / 4)
    assert metrics.best_against_worst_accuracy(scores, truth, groups) == pytest.approx((1 + 0.5) / 2)


def test_best_against_worst_averages_over_tied_bests() -> None:
    # best truth 1 at scores 5 and 1, worst truth 0 at score 3: one of two wins
    assert metrics.best_against_worst_accuracy([5, 1, 3], [1, 1, 0], [0, 0, 0]) == 0.5


def test_length_correlation_shows_the_bias_of_the_score() -> None:
    lengths, groups = [1, 2, 3, 10, 20], [0, 0, 0, 1, 1]
    score, truth = metrics.length_correlation([1, 2, 3, 5, 6], [1, 3, 2, 4, 4], lengths, groups)
    assert score == pytest.approx(1)
    assert truth == pytest.approx((0.5 + 0) / 2)


def test_calibration_curve_and_error() -> None:
    curve = metrics.calibration_curve([0.05, 0.15, 0.1, 0.95, 1.0], [0, 1, 0, 1, 1], bins=5)
    assert [point.samples for point in curve] == [3, 2]
    assert curve[0].predicted == pytest.approx(0.1)
    assert curve[0].observed == pytest.approx(1 / 3)
    assert metrics.expected_calibration_error(curve) == pytest.approx((3 * (1 / 3 - 0.1) + 2 * 0.025) / 5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.calibration_curve([1.2], [1])


def test_first_error_f1_is_the_harmonic_mean_of_two_accuracies() -> None:
    # erroneous samples: 2 of 3 found exactly; correct samples: 1 of 2
    actual, predicted = [0, 2, 4, -1, -1], [0, 2, 3, -1, 1]
    assert metrics.first_error_f1(predicted, actual) == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert metrics.first_error_f1([0, 0], [-1, 1]) == 0
    assert math.isnan(metrics.first_error_f1([-1], [-1]))
    assert metrics.first_error([0.9, 0.4, 0.2]) == 1
    assert metrics.first_error([0.9, 0.5]) == -1


def test_graded_auc_orders_pairs_of_different_grades() -> None:
    # grades 0: .1 .4; .5: .3; 1: .4 -> pairs (0,.5): 1 of 2, (0,1): 1.5 of 2, (.5,1): 1 of 1
    assert metrics.graded_auc([0.1, 0.4, 0.3, 0.4], [0, 0, 0.5, 1]) == pytest.approx(3.5 / 5)
    scores, labels = [0.9, 0.4, 0.5, 0.4, 0.1], [1, 1, 0, 0, 0]
    assert metrics.graded_auc(scores, labels) == pytest.approx(metrics.auc(scores, labels))
    assert math.isnan(metrics.graded_auc([0.1, 0.2], [0.5, 0.5]))
