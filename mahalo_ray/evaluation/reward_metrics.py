"""Metrics of a reward model on held-out rows, one objective at a time, each with n and interval.

Steps of one dialogue (or solutions of one problem) are not independent: intervals resample dialogues and
problems, not steps or solutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import norm

from mahalo_ray.data.records import ScoredPair, ScoredTrace
from mahalo_ray.evaluation.statistics import Bootstrap, BootstrapEstimate, bootstrap_by_group
from mahalo_ray.metrics import (
    CalibrationPoint,
    FloatArray,
    accuracy,
    best_against_worst_accuracy,
    brier,
    calibration_curve,
    expected_calibration_error,
    first_error,
    first_error_f1,
    graded_auc,
    length_correlation,
    pearson,
    within_group_pair_accuracy,
    within_group_rank_correlation,
)
from mahalo_ray.models.reward_heads import OutputKind

Metrics = dict[str, BootstrapEstimate]  # by name
_MOST_GRADES = 5  # labels of more values than this are numbers, not grades


@dataclass(frozen=True)
class ObjectiveMetrics:
    """All metrics of one objective by name, its calibration curve, and AUC by number of the step, or of the
    turn in a dialogue (from 1)."""

    metrics: Metrics
    calibration: list[CalibrationPoint] = field(default_factory=list)
    auc_by_step: dict[int, BootstrapEstimate] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": {name: estimate.as_json() for name, estimate in self.metrics.items()},
            "calibration": [point._asdict() for point in self.calibration],
            "auc_by_step": {str(step): estimate.as_json() for step, estimate in self.auc_by_step.items()},
        }


@dataclass(frozen=True)
class _Steps:
    """All labelled steps of an objective as columns."""

    score: FloatArray
    label: FloatArray
    tokens: FloatArray
    number: FloatArray
    prompt: list[str]
    dialogue: list[str]

    @property
    def candidates(self) -> list[str]:
        """What competes for one next step: the same prompt and step."""
        return [f"{prompt}\n{int(step)}" for prompt, step in zip(self.prompt, self.number, strict=True)]

    @property
    def binary(self) -> bool:
        return bool(np.isin(self.label, (0.0, 1.0)).all())

    @property
    def graded(self) -> bool:
        return len(np.unique(self.label)) <= _MOST_GRADES


def objective_metrics(
    traces: Sequence[ScoredTrace],
    pairs: Sequence[ScoredPair],
    objective: str,
    kind: OutputKind,
    bootstrap: Bootstrap,
    threshold: float | None = None,
) -> ObjectiveMetrics:
    """Every estimate that the rows allow. `threshold`: of first errors; None leaves that estimate out.

    Labels of a few grades give AUC (`graded_auc`); if they are 0 and 1, probabilities give accuracy, Brier
    score and calibration; other labels give correlation and squared error.
    """
    scored = [trace for trace in traces if objective in trace.scores]
    metrics: Metrics = {}
    result = ObjectiveMetrics(metrics)
    steps = _labelled_steps(scored, objective)
    if steps is not None:
        _add_step_metrics(steps, kind, bootstrap, result)
        _add_within_prompt_metrics(steps, bootstrap, metrics)
    metrics |= _outcome_metrics(scored, objective, bootstrap)
    if threshold is not None:
        metrics |= _first_error_metrics(scored, objective, threshold, bootstrap)
    of_pairs = [pair for pair in pairs if pair.objective == objective]
    if of_pairs:
        difference = np.array([pair.chosen - pair.rejected for pair in of_pairs])
        groups = [pair.dialogue for pair in of_pairs]
        _add(metrics, "pairwise_accuracy", _share_won, [difference], groups, bootstrap)
    return result


def choose_threshold(traces: Sequence[ScoredTrace], objective: str) -> float:
    """The threshold of `first_error` with the best F1 on these traces (ProcessBench chooses it on one of its
    parts for all others). ValueError where they lack wrong or right ones."""
    sequences, actual, _ = _first_errors([trace for trace in traces if objective in trace.scores], objective)
    if not sequences or all(a == -1 for a in actual) or all(a != -1 for a in actual):
        raise ValueError(
            f"a threshold for the first error needs traces with a wrong step of '{objective}' and traces "
            "without one"
        )
    scores = np.unique(np.concatenate(sequences))
    tried = np.quantile((scores[1:] + scores[:-1]) / 2, np.linspace(0, 1, 201)) if len(scores) > 1 else scores
    f1 = [first_error_f1([first_error(s, float(t)) for s in sequences], actual) for t in tried]
    return float(tried[int(np.argmax(f1))])


def _labelled_steps(traces: Sequence[ScoredTrace], objective: str) -> _Steps | None:
    rows = [
        (
            (trace.scores[objective][step], label, trace.tokens[step], trace.turns_before + step + 1),
            trace.group,
            trace.dialogue,
        )
        for trace in traces
        for step, label in enumerate(trace.labels.get(objective, []))
        if label is not None
    ]
    if not rows:
        return None
    numbers, prompts, dialogues = zip(*rows, strict=True)
    score, label, tokens, number = np.array(numbers, dtype=np.float64).T
    return _Steps(score, label, tokens, number, list(prompts), list(dialogues))


def _add_step_metrics(
    steps: _Steps, kind: OutputKind, bootstrap: Bootstrap, result: ObjectiveMetrics
) -> None:
    metrics, columns = result.metrics, [steps.score, steps.label]
    if not steps.binary:
        _add(metrics, "correlation", pearson, columns, steps.dialogue, bootstrap)
        if kind != "preference":
            _add(metrics, "mean_squared_error", _squared_error, columns, steps.dialogue, bootstrap)
    if not steps.graded:
        return
    _add(metrics, "auc", graded_auc, columns, steps.dialogue, bootstrap)
    for number in np.unique(steps.number):
        rows = np.flatnonzero(steps.number == number)
        dialogues = [steps.dialogue[row] for row in rows]
        estimate = bootstrap_by_group(graded_auc, [column[rows] for column in columns], dialogues, bootstrap)
        if estimate is not None and len(np.unique(steps.number)) > 1:
            result.auc_by_step[int(number)] = estimate
    if kind == "probability" and steps.binary:
        _add(metrics, "accuracy", accuracy, columns, steps.dialogue, bootstrap)
        _add(metrics, "brier", brier, columns, steps.dialogue, bootstrap)
        result.calibration.extend(calibration_curve(steps.score, steps.label))
        _add(metrics, "calibration_error", _calibration_error, columns, steps.dialogue, bootstrap)


def _add_within_prompt_metrics(steps: _Steps, bootstrap: Bootstrap, metrics: Metrics) -> None:
    """Means over prompts (or over candidates of one next step) of a estimate of each."""
    truth, lengths = [steps.score, steps.label], [steps.score, steps.label, steps.tokens]
    by_candidate: dict[str, tuple[Callable[..., float], list[FloatArray]]] = {
        "rank_correlation": (within_group_rank_correlation, truth),
        "best_against_worst": (best_against_worst_accuracy, truth),
        "choice_gain": (_choice_gain, truth),
        "length_correlation_score": (lambda *columns: length_correlation(*columns)[0], lengths),
        "length_correlation_truth": (lambda *columns: length_correlation(*columns)[1], lengths),
    }
    if steps.binary:
        name = "correct_against_wrong"
        _add_mean(metrics, name, within_group_pair_accuracy, truth, steps.prompt, steps.dialogue, bootstrap)
    for name, (statistic, columns) in by_candidate.items():
        _add_mean(metrics, name, statistic, columns, steps.candidates, steps.dialogue, bootstrap)


def _outcome_metrics(traces: Sequence[ScoredTrace], objective: str, bootstrap: Bootstrap) -> Metrics:
    """Of whole traces: does the last step's score tell good outcomes from bad ones, and does choosing by it
    beat choosing at random?"""
    known = [trace for trace in traces if trace.outcome is not None and objective in trace.outcome]
    if not known:
        return {}
    metrics: Metrics = {}
    score = np.array([trace.scores[objective][-1] for trace in known])
    outcome = np.array([(trace.outcome or {})[objective] for trace in known])
    groups, dialogues = [trace.group for trace in known], [trace.dialogue for trace in known]
    if len(np.unique(outcome)) <= _MOST_GRADES:
        _add(metrics, "outcome_auc", graded_auc, [score, outcome], dialogues, bootstrap)
    else:
        _add(metrics, "outcome_correlation", pearson, [score, outcome], dialogues, bootstrap)
    _add_mean(metrics, "best_of_n_lift", _lift, [score, outcome], groups, dialogues, bootstrap)
    return metrics


def _first_error_metrics(
    traces: Sequence[ScoredTrace], objective: str, threshold: float, bootstrap: Bootstrap
) -> Metrics:
    sequences, actual, problems = _first_errors(traces, objective)
    predicted = np.array([first_error(scores, threshold) for scores in sequences], dtype=np.float64)
    guessed = np.array([1 / (len(scores) + 1) for scores in sequences])
    true = np.array(actual, dtype=np.float64)
    metrics: Metrics = {}
    _add(metrics, "first_error_f1", _f1, [(predicted == true).astype(np.float64), true], problems, bootstrap)
    _add(metrics, "first_error_f1_random", _f1, [guessed, true], problems, bootstrap)
    return metrics


def _first_errors(
    traces: Sequence[ScoredTrace], objective: str
) -> tuple[list[list[float]], list[int], list[str]]:
    """Scores, number of the first wrong step (-1: none) and problem of the traces whose steps say which it
    is. Solutions of one problem share its difficulty: they are resampled together."""
    sequences, actual, problems = [], [], []
    for trace in traces:
        labels = trace.labels.get(objective, [])
        wrong = labels.index(0.0) if 0.0 in labels else len(labels)
        if labels and all(label == 1.0 for label in labels[:wrong]):
            sequences.append(trace.scores[objective])
            actual.append(wrong if wrong < len(labels) else -1)
            problems.append(trace.group)
    return sequences, actual, problems


def _f1(right: FloatArray, actual: FloatArray) -> float:
    """Harmonic mean of the accuracy [0, 1] on erroneous and on correct traces, given per-trace accuracies."""
    erroneous = actual != -1
    if erroneous.all() or not erroneous.any():
        return float("nan")
    a, b = float(right[erroneous].mean()), float(right[~erroneous].mean())
    return 2 * a * b / (a + b) if a + b else 0.0


def _lift(score: FloatArray, outcome: FloatArray, groups: Sequence[str]) -> float:
    """Outcome of the best-scored sample (ties averaged) minus the group's mean outcome."""
    return float(outcome[score == score.max()].mean() - outcome.mean())


def _choice_gain(score: FloatArray, label: FloatArray, groups: Sequence[str]) -> float:
    """How much the label rises with one standard deviation of the score: their covariance over the latter.
    Noise in labels (of few continuations) does not bias it; noise in scores lowers it, as it should."""
    covariance = np.cov(score, label)
    spread, count = math.sqrt(covariance[0, 0]), len(score)
    # The standard deviation of a few numbers is too small on average, by this factor where they are normal.
    factor = math.sqrt(2 / (count - 1)) * math.exp(math.lgamma(count / 2) - math.lgamma((count - 1) / 2))
    return float(covariance[0, 1]) / spread / factor if spread else 0.0


def expected_best(count: int) -> float:
    """Mean of the largest of `count` independent standard normal numbers: how many standard deviations of
    the score the best-scored of so many candidates is ahead of one.

    >>> [round(expected_best(count), 2) for count in (1, 2, 5, 16)]
    [0.0, 0.56, 1.16, 1.77]
    """
    x = np.linspace(-8.0, 8.0, 4001)
    density = count * norm.pdf(x) * norm.cdf(x) ** (count - 1)
    return float(np.sum(x * density) * (x[1] - x[0]))


def _share_won(difference: FloatArray) -> float:
    return float(((np.sign(difference) + 1) / 2).mean())


def _squared_error(score: FloatArray, label: FloatArray) -> float:
    return float(np.mean((score - label) ** 2))


def _calibration_error(score: FloatArray, label: FloatArray) -> float:
    return expected_calibration_error(calibration_curve(score, label))


def _add(
    metrics: Metrics,
    name: str,
    statistic: Callable[..., float],
    columns: Sequence[FloatArray],
    groups: Sequence[str],
    bootstrap: Bootstrap,
) -> None:
    estimate = bootstrap_by_group(statistic, columns, groups, bootstrap) if len(groups) else None
    if estimate is not None:
        metrics[name] = estimate


def _add_mean(
    metrics: Metrics,
    name: str,
    statistic: Callable[..., float],
    columns: Sequence[FloatArray],
    groups: Sequence[str],
    dialogues: Sequence[str],
    bootstrap: Bootstrap,
) -> None:
    """The mean over groups of `statistic`(*columns of the group, its group ids); n counts the groups that
    say anything. Resampled are their dialogues."""
    rows_of: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    values, clusters = [], []
    for group, rows in rows_of.items():
        if len(rows) == 1:
            continue
        value = statistic(*(column[rows] for column in columns), [group] * len(rows))
        if not np.isnan(value):
            values.append(value)
            clusters.append(dialogues[rows[0]])
    _add(metrics, name, _mean, [np.array(values)], clusters, bootstrap)


def _mean(values: FloatArray) -> float:
    return float(values.mean())
