"""The figures of a reward model on held-out rows, one objective at a time, each with n and interval.

Steps of one dialogue (or prompt) are not independent: intervals resample dialogues, not steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mahalo_ray.data.records import ScoredPair, ScoredTrace
from mahalo_ray.evaluation.statistics import GroupedFigure, Resampling, grouped_figure
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

OutputKind = Literal["value", "probability", "preference"]
Figures = dict[str, GroupedFigure]
_MOST_GRADES = 5  # labels of more values than this are numbers, not grades


@dataclass(frozen=True)
class ObjectiveFigures:
    """All figures of one objective by name, its calibration curve, and AUC by number of the step, or of the
    turn in a dialogue (from 1)."""

    figures: Figures
    calibration: list[CalibrationPoint] = field(default_factory=list)
    auc_by_step: dict[int, GroupedFigure] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": {name: figure.as_json() for name, figure in self.figures.items()},
            "calibration": [point._asdict() for point in self.calibration],
            "auc_by_step": {str(step): figure.as_json() for step, figure in self.auc_by_step.items()},
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


def objective_figures(
    traces: Sequence[ScoredTrace],
    pairs: Sequence[ScoredPair],
    objective: str,
    kind: OutputKind,
    how: Resampling,
    threshold: float | None = None,
) -> ObjectiveFigures:
    """Every figure that the rows allow. `threshold`: of first errors; None leaves that figure out.

    Labels of a few grades give AUC (`graded_auc`); if they are 0 and 1, probabilities give accuracy, Brier
    score and calibration; other labels give correlation and squared error.
    """
    own = [trace for trace in traces if objective in trace.scores]
    figures: Figures = {}
    result = ObjectiveFigures(figures)
    steps = _steps(own, objective)
    if steps is not None:
        _step_figures(steps, kind, how, result)
        _within_prompt_figures(steps, how, figures)
    figures |= _outcome_figures(own, objective, how)
    if threshold is not None:
        figures |= _first_error_figures(own, objective, threshold, how)
    of_pairs = [pair for pair in pairs if pair.objective == objective]
    if of_pairs:
        difference = np.array([pair.chosen - pair.rejected for pair in of_pairs])
        groups = [pair.dialogue for pair in of_pairs]
        _add(figures, "pairwise_accuracy", _share_won, [difference], groups, how)
    return result


def choose_threshold(traces: Sequence[ScoredTrace], objective: str) -> float:
    """The threshold of `first_error` with the best F1 on these traces (ProcessBench chooses it on one of its
    parts for all others). ValueError where they lack wrong or right ones."""
    sequences, actual = _first_errors([trace for trace in traces if objective in trace.scores], objective)
    if not sequences or all(a == -1 for a in actual) or all(a != -1 for a in actual):
        raise ValueError(
            f"a threshold for the first error needs traces with a wrong step of '{objective}' and traces "
            "without one"
        )
    scores = np.unique(np.concatenate(sequences))
    tried = np.quantile((scores[1:] + scores[:-1]) / 2, np.linspace(0, 1, 201)) if len(scores) > 1 else scores
    f1 = [first_error_f1([first_error(s, float(t)) for s in sequences], actual) for t in tried]
    return float(tried[int(np.argmax(f1))])


def _steps(traces: Sequence[ScoredTrace], objective: str) -> _Steps | None:
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


def _step_figures(steps: _Steps, kind: OutputKind, how: Resampling, result: ObjectiveFigures) -> None:
    figures, columns = result.figures, [steps.score, steps.label]
    if not steps.binary:
        _add(figures, "correlation", pearson, columns, steps.dialogue, how)
        if kind != "preference":
            _add(figures, "mean_squared_error", _squared_error, columns, steps.dialogue, how)
    if not steps.graded:
        return
    _add(figures, "auc", graded_auc, columns, steps.dialogue, how)
    for number in np.unique(steps.number):
        at = np.flatnonzero(steps.number == number)
        dialogues = [steps.dialogue[row] for row in at]
        figure = grouped_figure(graded_auc, [column[at] for column in columns], dialogues, how)
        if figure is not None and len(np.unique(steps.number)) > 1:
            result.auc_by_step[int(number)] = figure
    if kind == "probability" and steps.binary:
        _add(figures, "accuracy", accuracy, columns, steps.dialogue, how)
        _add(figures, "brier", brier, columns, steps.dialogue, how)
        result.calibration.extend(calibration_curve(steps.score, steps.label))
        _add(figures, "calibration_error", _calibration_error, columns, steps.dialogue, how)


def _within_prompt_figures(steps: _Steps, how: Resampling, figures: Figures) -> None:
    """Means over prompts (or over candidates of one next step) of a figure of each."""
    truth, lengths = [steps.score, steps.label], [steps.score, steps.label, steps.tokens]
    by_candidate: dict[str, tuple[Callable[..., float], list[FloatArray]]] = {
        "rank_correlation": (within_group_rank_correlation, truth),
        "best_against_worst": (best_against_worst_accuracy, truth),
        "length_correlation_score": (lambda *columns: length_correlation(*columns)[0], lengths),
        "length_correlation_truth": (lambda *columns: length_correlation(*columns)[1], lengths),
    }
    if steps.binary:
        name = "correct_against_wrong"
        _add_mean(figures, name, within_group_pair_accuracy, truth, steps.prompt, steps.dialogue, how)
    for name, (statistic, columns) in by_candidate.items():
        _add_mean(figures, name, statistic, columns, steps.candidates, steps.dialogue, how)


def _outcome_figures(traces: Sequence[ScoredTrace], objective: str, how: Resampling) -> Figures:
    """Of whole traces: does the last step's score tell good outcomes from bad ones, and does choosing by it
    beat choosing at random?"""
    known = [trace for trace in traces if trace.outcome is not None and objective in trace.outcome]
    if not known:
        return {}
    figures: Figures = {}
    score = np.array([trace.scores[objective][-1] for trace in known])
    outcome = np.array([(trace.outcome or {})[objective] for trace in known])
    groups, dialogues = [trace.group for trace in known], [trace.dialogue for trace in known]
    if len(np.unique(outcome)) <= _MOST_GRADES:
        _add(figures, "outcome_auc", graded_auc, [score, outcome], dialogues, how)
    else:
        _add(figures, "outcome_correlation", pearson, [score, outcome], dialogues, how)
    _add_mean(figures, "best_of_n_lift", _lift, [score, outcome], groups, dialogues, how)
    return figures


def _first_error_figures(
    traces: Sequence[ScoredTrace], objective: str, threshold: float, how: Resampling
) -> Figures:
    sequences, actual = _first_errors(traces, objective)
    said = np.array([first_error(scores, threshold) for scores in sequences], dtype=np.float64)
    guessed = np.array([1 / (len(scores) + 1) for scores in sequences])
    true, groups = np.array(actual, dtype=np.float64), [str(number) for number in range(len(actual))]
    figures: Figures = {}
    _add(figures, "first_error_f1", _f1, [(said == true).astype(np.float64), true], groups, how)
    _add(figures, "first_error_f1_random", _f1, [guessed, true], groups, how)
    return figures


def _first_errors(traces: Sequence[ScoredTrace], objective: str) -> tuple[list[list[float]], list[int]]:
    """Scores and number of the first wrong step (-1: none) of the traces whose steps say which it is."""
    sequences, actual = [], []
    for trace in traces:
        labels = trace.labels.get(objective, [])
        wrong = labels.index(0.0) if 0.0 in labels else len(labels)
        if labels and all(label == 1.0 for label in labels[:wrong]):
            sequences.append(trace.scores[objective])
            actual.append(wrong if wrong < len(labels) else -1)
    return sequences, actual


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


def _share_won(difference: FloatArray) -> float:
    return float(((np.sign(difference) + 1) / 2).mean())


def _squared_error(score: FloatArray, label: FloatArray) -> float:
    return float(np.mean((score - label) ** 2))


def _calibration_error(score: FloatArray, label: FloatArray) -> float:
    return expected_calibration_error(calibration_curve(score, label))


def _add(
    figures: Figures,
    name: str,
    statistic: Callable[..., float],
    columns: Sequence[FloatArray],
    groups: Sequence[str],
    how: Resampling,
) -> None:
    figure = grouped_figure(statistic, columns, groups, how) if len(groups) else None
    if figure is not None:
        figures[name] = figure


def _add_mean(
    figures: Figures,
    name: str,
    statistic: Callable[..., float],
    columns: Sequence[FloatArray],
    groups: Sequence[str],
    dialogues: Sequence[str],
    how: Resampling,
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
    _add(figures, name, _mean, [np.array(values)], clusters, how)


def _mean(values: FloatArray) -> float:
    return float(values.mean())
