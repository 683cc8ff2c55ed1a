"""Metrics of scores against truth: overall, within a prompt, and against length.

Overall metrics flatter: they reward knowing which prompts are easy. Guidance and pairs compare candidates of
one prompt, so the within-group metrics are the ones to watch. A metric that the data leave undefined (one
class only, no group with two different truths) is NaN.

`scipy.stats` takes half a second to import: the functions that rank do it, and workers go without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Groups = Sequence[int] | Sequence[str]


def finite_array(values: ArrayLike, what: str, dimensions: int = 1) -> FloatArray:
    """The values as float64 with `dimensions` axes; a ValueError names `what` if they are not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{what} must have {dimensions} dimension(s), not shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int(np.argmin(np.isfinite(array).reshape(-1)))
        raise ValueError(f"{what} holds a value that is not finite (position {bad})")
    return array


class CalibrationPoint(NamedTuple):
    """One bin of a calibration curve."""

    predicted: float  # mean predicted probability
    observed: float  # share of positives
    samples: int


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a random positive scores above a random negative, ties half (Mann-Whitney U)."""
    from scipy import stats

    score, label = _pair(scores, labels)
    positive = _binary(label)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = stats.rankdata(score)
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def graded_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that of two samples with different labels the one with the higher label scores higher, ties
    half: AUC for 0/1 labels, and the same for labels of a few grades. NaN when there is one grade only."""
    score, label = _pair(scores, labels)
    won = compared = 0.0
    grades = [score[label == grade] for grade in np.unique(label)]
    for low, high in itertools.combinations(grades, 2):
        truth = np.r_[np.zeros(len(low)), np.ones(len(high))]
        won += auc(np.r_[low, high], truth) * len(low) * len(high)
        compared += len(low) * len(high)
    return won / compared if compared else float("nan")


def accuracy(probabilities: ArrayLike, labels: ArrayLike, threshold: float = 0.5) -> float:
    """Share of samples whose probability lies on the label's side of the threshold (at it counts as 1)."""
    probability, label = _pair(probabilities, labels)
    return float(((probability >= threshold) == _binary(label)).mean())


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared difference of probability and label (Brier 1950): 0 is perfect."""
    probability, label = _pair(probabilities, labels)
    return float(np.mean((probability - _binary(label)) ** 2))


def pearson(scores: ArrayLike, truth: ArrayLike) -> float:
    """Linear correlation; NaN when either side does not vary."""
    score, true = _pair(scores, truth)
    return _correlation(score, true)


def within_group_rank_correlation(
    scores: ArrayLike,
    truth: ArrayLike,
    groups: Groups,
    kind: Literal["spearman", "kendall"] = "spearman",
) -> float:
    """Mean over groups of the rank correlation of score and truth (Spearman's rho or Kendall's tau-b).

    Groups whose truth does not vary say nothing and are left out; one whose scores are all equal counts 0.
    """
    from scipy import stats

    rank = stats.spearmanr if kind == "spearman" else stats.kendalltau

    def correlation(score: FloatArray, true: FloatArray) -> float:
        return 0.0 if np.ptp(score) == 0 else float(rank(score, true).statistic)

    return _mean_over_groups(correlation, scores, truth, groups)


def pair_accuracy(better: ArrayLike, worse: ArrayLike) -> float:
    """How often the better one of a pair scores higher, ties half."""
    high, low = _pair(better, worse)
    return float(_wins(high, low).mean())


def within_group_pair_accuracy(
    scores: ArrayLike, truth: ArrayLike, groups: Groups, min_gap: float = 0.0
) -> float:
    """How often the truly better of two samples of a group scores higher, ties half; mean over all pairs
    whose truths differ by more than `min_gap`."""
    won = compared = 0.0
    for score, true in _informative_groups(scores, truth, groups):
        better = true[:, None] - true[None, :] > min_gap
        compared += better.sum()
        won += _wins(score[:, None], score[None, :])[better].sum()
    return float(won / compared) if compared else float("nan")


def best_against_worst_accuracy(scores: ArrayLike, truth: ArrayLike, groups: Groups) -> float:
    """How often a group's truly best sample scores above its truly worst, ties half; mean over groups.

    Where several samples share the best or the worst truth, all their pairs are averaged.
    """

    def share_won(score: FloatArray, true: FloatArray) -> float:
        best, worst = score[true == true.max()], score[true == true.min()]
        return float(_wins(best[:, None], worst[None, :]).mean())

    return _mean_over_groups(share_won, scores, truth, groups)


def length_correlation(
    scores: ArrayLike, truth: ArrayLike, lengths: ArrayLike, groups: Groups
) -> tuple[float, float]:
    """Mean within-group correlation with length (tokens) of the score, and of the truth: (score, truth).

    A score that follows length more than the truth does is biased towards long (or short) candidates. Both
    are averaged over the groups whose lengths vary; a group whose scores (or truths) are all equal counts 0.
    """
    score, true = _pair(scores, truth)
    length = finite_array(lengths, "lengths")

    def correlation(values: FloatArray, lengths_of_group: FloatArray) -> float:
        return 0.0 if np.ptp(values) == 0 else _correlation(values, lengths_of_group)

    return (
        _mean_over_groups(correlation, score, length, groups),
        _mean_over_groups(correlation, true, length, groups),
    )


def calibration_curve(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> list[CalibrationPoint]:
    """Predicted probability against the share of positives, in equally wide bins of [0, 1] that hold any."""
    probability, label = _pair(probabilities, labels)
    positive = _binary(label)
    if (probability < 0).any() or (probability > 1).any():
        raise ValueError("a calibration curve needs probabilities between 0 and 1")
    index = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        CalibrationPoint(
            float(probability[index == b].mean()), float(positive[index == b].mean()), int((index == b).sum())
        )
        for b in np.unique(index)
    ]


def expected_calibration_error(curve: Sequence[CalibrationPoint]) -> float:
    """Mean distance of predicted and observed over the bins, weighted by count (Naeini et al. 2015)."""
    total = sum(point.samples for point in curve)
    return sum(point.samples * abs(point.predicted - point.observed) for point in curve) / total


def first_error(step_scores: Sequence[float], threshold: float = 0.5) -> int:
    """Index of the first step that scores below the threshold; -1 when none does."""
    return next((index for index, score in enumerate(step_scores) if score < threshold), -1)


def first_error_f1(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """ProcessBench's F1 (Zheng et al. 2024, arXiv 2412.06559): harmonic mean of two accuracies.

    The accuracy on samples with an error (the first wrong step is named exactly) and on correct ones (-1 is
    predicted where -1 is true). NaN when either kind of sample is missing.
    """
    predictions, true = _pair(predicted, actual)
    erroneous = true != -1
    if erroneous.all() or not erroneous.any():
        return float("nan")
    on_errors = float((predictions == true)[erroneous].mean())
    on_correct = float((predictions == true)[~erroneous].mean())
    total = on_errors + on_correct
    return 2 * on_errors * on_correct / total if total else 0.0


def _pair(left: ArrayLike, right: ArrayLike) -> tuple[FloatArray, FloatArray]:
    a, b = finite_array(left, "scores"), finite_array(right, "truth")
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"need two lists of the same length, at least 1; got {len(a)} and {len(b)}")
    return a, b


def _binary(labels: FloatArray) -> NDArray[np.bool_]:
    if not np.isin(labels, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    return labels == 1.0


def _wins(left: FloatArray, right: FloatArray) -> FloatArray:
    """1 where left is higher, 0.5 at a tie, 0 where it is lower (broadcast)."""
    return np.asarray((np.sign(left - right) + 1) / 2)


def _correlation(left: FloatArray, right: FloatArray) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])


def _informative_groups(
    scores: ArrayLike, truth: ArrayLike, groups: Groups
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """(scores, truth) of every group whose truth varies."""
    score, true = _pair(scores, truth)
    if len(groups) != len(score):
        raise ValueError(f"{len(score)} scores but {len(groups)} group ids")
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(member, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(member[order])) + 1):
        if np.ptp(true[rows]) > 0:
            yield score[rows], true[rows]


def _mean_over_groups(
    statistic: Callable[[FloatArray, FloatArray], float], scores: ArrayLike, truth: ArrayLike, groups: Groups
) -> float:
    values = [statistic(score, true) for score, true in _informative_groups(scores, truth, groups)]
    return float(np.mean(values)) if values else float("nan")
