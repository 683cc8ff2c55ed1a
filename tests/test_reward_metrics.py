"""Metrics of a reward model against values worked by hand: first errors, best of N, turns, intervals."""

from __future__ import annotations

import numpy as np
import pytest

from mahalo_ray.data.records import ScoredPair, ScoredTrace
from mahalo_ray.evaluation.reward_metrics import choose_threshold, expected_best, objective_metrics
from mahalo_ray.evaluation.statistics import Bootstrap, bootstrap_by_group

HOW = Bootstrap(resamples=200)


def trace(
    name: str,
    scores: list[float],
    labels: list[float | None],
    group: str | None = None,
    outcome: float | None = None,
    turns: int = 0,
) -> ScoredTrace:
    return ScoredTrace(
        id=name,
        group=group or name,
        dialogue=group or name,
        turns_before=turns,
        tokens=[3 + n for n in range(len(scores))],
        scores={"x": scores},
        labels={"x": labels},
        outcome=None if outcome is None else {"x": outcome},
    )


# First wrong steps: 1, 0, none, none.
MATHS = [
    trace("a", [0.9, 0.2, 0.8], [1, 0, None]),
    trace("b", [0.6, 0.9], [0, None]),
    trace("c", [0.7, 0.8], [1, 1]),
    trace("d", [0.9, 0.4], [1, 1]),
]


def test_first_error_f1_resamples_problems_not_solutions() -> None:
    copies = [
        trace(f"{one.id}{n}", one.scores["x"], one.labels["x"], group=one.group)
        for one in MATHS
        for n in range(20)
    ]
    settings = Bootstrap(resamples=200)
    once, often = (
        objective_metrics(traces, [], "x", "probability", settings, threshold=0.5).metrics["first_error_f1"]
        for traces in (MATHS, copies)
    )
    # Twenty copies of four solutions say no more than the four.
    assert (often.low, often.value, often.high) == pytest.approx((once.low, once.value, once.high))
    assert often.n == 80


def test_first_error_f1_and_its_random_baseline() -> None:
    found = objective_metrics(MATHS, [], "x", "probability", HOW, threshold=0.5).metrics
    # said: 1, none, none, 1: half of the erroneous and half of the correct traces are right
    assert found["first_error_f1"].value == pytest.approx(0.5) and found["first_error_f1"].n == 4
    guess_wrong, guess_right = (1 / 4 + 1 / 3) / 2, (1 / 3 + 1 / 3) / 2
    expected = 2 * guess_wrong * guess_right / (guess_wrong + guess_right)
    assert found["first_error_f1_random"].value == pytest.approx(expected)
    found = objective_metrics(MATHS, [], "x", "probability", HOW, threshold=-1.0).metrics
    assert found["first_error_f1"].value == 0  # a judge for whom all is correct
    # below .4: only trace a is told; between .6 and .7 also b, and then d is lost: 2/3 against 2/3
    assert 0.2 < choose_threshold(MATHS[:3], "x") < 0.7
    best = objective_metrics(MATHS[:3], [], "x", "probability", HOW, choose_threshold(MATHS[:3], "x"))
    assert best.metrics["first_error_f1"].value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs traces with a wrong step of 'x'"):
        choose_threshold(MATHS[2:], "x")


def test_steps_against_each_other() -> None:
    found = objective_metrics(MATHS, [], "x", "probability", HOW).metrics
    right, wrong = [0.9, 0.7, 0.8, 0.9, 0.4], [0.2, 0.6]
    wins = np.mean([(r > w) + 0.5 * (r == w) for r in right for w in wrong])
    assert found["auc"].value == pytest.approx(wins) and found["auc"].n == 7
    assert found["accuracy"].value == pytest.approx(5 / 7)
    assert found["correct_against_wrong"].value == 1.0 and found["correct_against_wrong"].n == 1
    assert "first_error_f1" not in found and "best_against_worst" not in found


def test_candidates_of_one_prompt_and_best_of_n() -> None:
    traces = [
        trace("a", [0.9], [1.0], "p", outcome=1),
        trace("b", [0.1], [0.0], "p", outcome=0),
        trace("c", [0.2], [1.0], "q", outcome=1),
        trace("d", [0.7], [0.0], "q", outcome=0),
        trace("e", [0.6], [0.0], "q", outcome=0),
        trace("f", [0.6], [0.0], "alone", outcome=0),
    ]
    found = objective_metrics(traces, [], "x", "value", HOW).metrics
    assert found["best_against_worst"].value == 0.5 and found["best_against_worst"].n == 2
    # p: 1 - 1/2; q: 0 - 1/3
    assert found["best_of_n_lift"].value == pytest.approx((1 / 2 - 1 / 3) / 2)
    assert found["outcome_auc"].value == pytest.approx((1 + 3 / 4 + 0 + 1 / 4) / 4, abs=0.2)
    assert "accuracy" not in found and "brier" not in found  # values are no probabilities


def test_the_gain_of_choosing_is_what_a_choice_gains() -> None:
    random = np.random.default_rng(7)
    scores = random.normal(2.0, 0.4, size=(2000, 5))
    labels = 0.3 * scores + random.normal(size=scores.shape)  # noise as of labels from few continuations
    traces = [
        trace(f"{prompt}/{k}", [scores[prompt, k]], [labels[prompt, k]], f"p{prompt}")
        for prompt in range(len(scores))
        for k in range(5)
    ]
    gain = objective_metrics(traces, [], "x", "value", Bootstrap(20)).metrics["choice_gain"]
    assert gain.n == 2000 and gain.value == pytest.approx(0.3 * 0.4, abs=0.03)
    chosen = labels[np.arange(len(scores)), scores.argmax(axis=1)].mean() - labels.mean()
    assert gain.value * expected_best(5) == pytest.approx(chosen, abs=0.03)


def test_turns_of_a_dialogue_and_three_outcomes() -> None:
    rows = [
        trace(f"{d}{turn}", [s], [label], group=f"d{d}", turns=turn)
        for d, label in enumerate([0.0, 0.5, 1.0, 1.0])
        for turn, s in ((0, 0.3), (1, label + 0.1 * d))
    ]
    result = objective_metrics(rows, [], "x", "probability", HOW)
    assert result.auc_by_step[1].value == 0.5 and result.auc_by_step[1].n == 4
    assert result.auc_by_step[2].value == 1.0
    assert "brier" not in result.metrics and "correlation" in result.metrics
    assert not result.calibration


def test_pairs_and_objectives_are_kept_apart() -> None:
    def pair(name: str, objective: str, gap: float) -> ScoredPair:
        return ScoredPair(id=name, dialogue=name, objective=objective, chosen=gap, rejected=0)

    pairs = [pair("a", "x", 1), pair("b", "x", -1), pair("c", "x", 0), pair("d", "y", 1)]
    found = objective_metrics(MATHS, pairs, "x", "preference", HOW).metrics
    assert found["pairwise_accuracy"].value == 0.5 and found["pairwise_accuracy"].n == 3
    assert set(objective_metrics(MATHS, pairs, "y", "preference", HOW).metrics) == {"pairwise_accuracy"}


def test_whole_groups_are_resampled_and_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    groups = [str(n // 10) for n in range(400)]
    values = np.repeat(rng.normal(size=40), 10)
    mean = lambda column: float(column.mean())  # noqa: E731
    by_group = bootstrap_by_group(mean, [values], groups, HOW)
    alone = bootstrap_by_group(mean, [values], [str(n) for n in range(400)], HOW)
    assert by_group is not None and alone is not None
    assert by_group.high - by_group.low > 2 * (alone.high - alone.low)
    shifted = bootstrap_by_group(mean, [values + 0.1], groups, HOW)
    assert shifted is not None
    difference = shifted.minus(by_group, 0.95)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert bootstrap_by_group(lambda column: float("nan"), [values], groups, HOW) is None
