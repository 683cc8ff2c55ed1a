"""Weighted sum, soft minimum and thresholds, by hand and in guided decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_guided
import torch
from pydantic import ValidationError

from mahalo_ray import GuidedDecoder
from mahalo_ray.config import Aggregation, RequestConfig
from mahalo_ray.decoding.aggregation import aggregated, best_point
from mahalo_ray.decoding.guidance import Guidance, ScoreScale
from mahalo_ray.models.scoring import calibrate
from mahalo_ray.objectives import Weights

OBJECTIVES = ["accuracy", "engagement"]
HALF = Weights.balanced(OBJECTIVES)


def thresholds(**limits: float) -> Aggregation:
    listed = [{"objective": name, "at_least": limit} for name, limit in limits.items()]
    return Aggregation.model_validate({"kind": "thresholds", "thresholds": listed})


def totals(scores: Any, weights: Weights, aggregation: Aggregation) -> list[float]:
    rows = torch.tensor(scores)
    return aggregated(rows, weights, OBJECTIVES, aggregation, rows).tolist()


def test_soft_min_by_hand_and_between_its_limits() -> None:
    scores, weights = [[1.0, -1.0], [0.2, 0.1]], Weights.parse("accuracy=3,engagement=1")
    soft = Aggregation(kind="soft_min", temperature=0.5)
    expected = [-0.5 * math.log(0.75 * math.exp(-a / 0.5) + 0.25 * math.exp(-b / 0.5)) for a, b in scores]
    assert totals(scores, weights, soft) == pytest.approx(expected)
    sharp, wide = (Aggregation(kind="soft_min", temperature=t) for t in (1e-3, 1000))
    assert totals(scores, weights, sharp) == pytest.approx([-1.0, 0.1], abs=0.01)  # the worst score
    assert totals(scores, weights, wide) == pytest.approx([0.5, 0.175], abs=0.01)  # the weighted sum
    ignored = totals([[0.3, -50.0]], Weights.one("accuracy"), soft)
    assert ignored == pytest.approx([0.3])  # an objective of weight 0 counts for nothing


def test_thresholds_come_first_and_the_weighted_sum_decides_among_those_above() -> None:
    engaged = Weights.one("engagement")
    scores = [[0.9, 0.1], [0.2, 0.4], [0.19, 0.9], [0.1, 1.0], [0.3, 0.4]]
    # Above 0.2 in accuracy: 0, 1, 4; among them engagement 0.1 < 0.4 = 0.4. Below it the nearest comes first.
    assert totals(scores, engaged, thresholds(accuracy=0.2)) == [2.0, 3.0, 1.0, 0.0, 3.0]
    both = thresholds(engagement=0.5, accuracy=0.15)
    assert totals(scores, Weights.one("accuracy"), both) == [0.0, 1.0, 4.0, 3.0, 2.0]


def test_guidance_takes_thresholds_in_calibrated_units_whatever_the_rest_is_in() -> None:
    # Mean 0.5 and a within-prompt spread of 0.1 each.
    spread = calibrate([0.4, 0.6, 0.4, 0.6], ["a", "a", "b", "b"]) | {"mean": 0.5, "within_prompt_std": 0.1}
    scale = ScoreScale(tuple(OBJECTIVES), dict.fromkeys(OBJECTIVES, spread))  # type: ignore[arg-type]
    scores = torch.tensor([[0.71, 0.1], [0.69, 0.9], [0.75, 0.2]])
    for standardisation in ("within_candidates", "calibrated"):
        guidance = Guidance(
            scale, Weights.one("engagement"), standardisation, aggregation=thresholds(accuracy=2.0)
        )
        assert guidance.totals(scores).tolist() == [1.0, 0.0, 2.0]
        plain = Guidance(scale, Weights.one("engagement"), standardisation)
        assert int(plain.totals(scores).argmax()) == 1


def test_the_aggregation_of_a_request_changes_what_is_chosen() -> None:
    decoder = GuidedDecoder(tiny_guided.model(), tiny_guided.reward(), "math")
    options: dict[str, Any] = {"num_candidates": 4, "max_new_tokens": 12, "max_step_tokens": 4, "seed": 2}
    soft = Aggregation(kind="soft_min", temperature=0.05)
    result = decoder.generate(tiny_guided.ASK, aggregation=soft, **options)
    for step in result.steps:
        scores = torch.tensor([[c.scores[name] for name in OBJECTIVES] for c in step.candidates])
        scale = ScoreScale.of(decoder.reward_models)
        expected = Guidance(scale, HALF, aggregation=soft).totals(scores)
        assert [c.total for c in step.candidates] == pytest.approx(expected.tolist())
        assert step.chosen == int(expected.argmax())
    sums = decoder.generate(tiny_guided.ASK, **options)
    assert sums.steps[0].candidates[0].total != result.steps[0].candidates[0].total


def test_a_point_of_a_front_is_chosen_alike() -> None:
    values = [[0.25, 0.3], [0.21, 0.6], [0.15, 0.8]]
    assert best_point(values, OBJECTIVES) == 2
    assert best_point(values, OBJECTIVES, Weights.one("engagement"), thresholds(accuracy=0.2)) == 1
    assert best_point(values, OBJECTIVES, None, Aggregation(kind="soft_min", temperature=0.01)) == 0
    for wrong, message in (
        ([], "give points x objectives"),
        ([[0.1]], "give points x objectives"),
        ([[0.1, float("nan")]], "not a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            best_point(wrong, OBJECTIVES)
    with pytest.raises(ValueError, match="unknown objective 'speed'"):
        best_point(values, OBJECTIVES, None, thresholds(speed=0.2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mean"}, "'sum', 'soft_min' or 'thresholds'"),
        ({"kind": "soft_min", "temperature": 0}, "greater than or equal to 0.001"),
        ({"kind": "sum", "temperature": 0.5}, "'temperature' is not used by 'kind: sum'"),
        ({"kind": "thresholds"}, "give both or neither"),
        ({"thresholds": [{"objective": "a", "at_least": 0}]}, "give both or neither"),
        (
            {"kind": "thresholds", "thresholds": [{"objective": "a", "at_least": 0}] * 2},
            "one objective twice",
        ),
        ({"kind": "thresholds", "thresholds": [{"objective": "a"}]}, "at_least"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Aggregation.model_validate(fields)


def test_a_configuration_refuses_an_aggregation_that_nothing_uses() -> None:
    soft = {"kind": "soft_min"}
    with pytest.raises(ValidationError, match="'aggregation' is not used by 'strategy: none'"):
        RequestConfig.model_validate({"strategy": "none", "aggregation": soft})
    with pytest.raises(ValidationError, match="gives an order only"):
        RequestConfig.model_validate({"strategy": "sample", "aggregation": thresholds(a=0).model_dump()})
