"""Statistics, the comparison table and the claims."""

from typing import Any

import numpy as np
import pytest
from evaluated_run import OBJECTIVES, STUDENTS, method, run_of, table_of
from scipy import stats

from mahalo_ray.evaluation import claims, statistics
from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.objectives import Weights

# --- statistics


def test_bootstrap_interval_agrees_with_scipy_and_is_seeded() -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, 150)
    ours = statistics.mean_interval(values, resamples=4000, seed=3)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, random_state=1)
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)
    assert ours == statistics.mean_interval(values, resamples=4000, seed=3)
    assert ours != statistics.mean_interval(values, resamples=4000, seed=4)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        interval = statistics.mean_interval(generator.normal(1.0, 1.0, 80), resamples=300, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_chunks_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(20.0).reshape(10, 2)
    whole = statistics.bootstrap_means(values, 50, seed=1)
    monkeypatch.setattr(statistics, "_CHUNK_VALUES", 60)
    assert np.array_equal(statistics.bootstrap_means(values, 50, seed=1), whole)
    assert np.allclose(whole[:, 1] - whole[:, 0], 1.0)  # columns are resampled together


def test_constant_values_have_an_interval_of_no_width() -> None:
    interval = statistics.mean_interval([0.25] * 5, seed=0)
    assert (interval.value, interval.low, interval.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("values", "message"), [([1.0], "at least 2"), ([1.0, float("nan")], "not finite"), ([], "at least 2")]
)
def test_intervals_refuse_what_has_none(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statistics.mean_interval(values)


def test_paired_difference_aligns_by_student() -> None:
    difference = statistics.paired_difference(
        ["a", "b", "c"], [3.0, 5.0, 9.0], ["c", "a", "b"], [8.0, 2.0, 4.0]
    )
    assert (difference.value, difference.low, difference.high) == (1.0, 1.0, 1.0)
    assert difference.above_zero


def test_paired_difference_refuses_other_students_and_repeated_ones() -> None:
    with pytest.raises(ValueError, match=r"same ids: 2 differ, e\.g\. 'b', 'x'"):
        statistics.paired_difference(["a", "b"], [1, 2], ["a", "x"], [1, 2])
    with pytest.raises(ValueError, match="'a' occurs twice"):
        statistics.paired_difference(["a", "b"], [1, 2], ["a", "a"], [1, 2])
    with pytest.raises(ValueError, match="3 values for 2 ids"):
        statistics.paired_difference(["a", "b"], [1, 2, 3], ["a", "b"], [1, 2])


# --- results


def test_method_result_survives_json() -> None:
    original = run_of()[1]
    assert MethodResult.model_validate_json(original.model_dump_json()) == original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "head"}, "weights go with aligned policies only"),
        ({"guidance": {"accuracy": 1}}, "guidance weights go with guided methods only"),
        ({"values": {"accuracy": [1.0, 2.0]}}, "2 values for 60 ids"),
        ({"student_ids": [0] * STUDENTS}, "occurs twice"),
        ({"kind": "weights", "weights": {"acuracy": 1}}, "Did you mean 'accuracy'"),
        ({"malformed_rate": 1.2}, "less than or equal to 1"),
    ],
)
def test_method_results_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodResult.model_validate(run_of()[0].model_dump() | change)


def test_table_rows_hold_means_and_dominance() -> None:
    methods = run_of()
    table = table_of(methods)
    row = {row.name: row for row in table.rows}
    assert row["SFT"].means["accuracy"].value == pytest.approx(np.mean(methods[0].values["accuracy"]))
    assert (
        row["SFT"].means["accuracy"].low
        < row["SFT"].means["accuracy"].value
        < row["SFT"].means["accuracy"].high
    )
    assert not row["SFT"].non_dominated  # guided SFT beats it on both
    assert row["SFT"].non_dominated_in_sweep is None
    # dominated by the guided policy, yet on the front of the sweep
    assert not row["weights 0.5 / 0.5"].non_dominated
    assert row["weights 0.5 / 0.5"].non_dominated_in_sweep


def test_hypervolume_of_the_sweep_is_the_staircase_of_its_means() -> None:
    table = table_of(run_of())
    front = table.sweep_front()
    assert front is not None
    points = sorted(tuple(p) for p in table.points[table.sweep_indices])
    area, left = 0.0, 0.0
    for x, y in points:
        area, left = area + (x - left) * y, x
    assert front.hypervolume.value == pytest.approx(area)
    assert front.hypervolume.low < area < front.hypervolume.high
    assert table.hypervolume_of_all() > area  # the guided policy lies beyond the sweep


def test_students_may_come_in_another_order_but_must_be_the_same() -> None:
    methods = run_of()
    order = np.random.default_rng(0).permutation(STUDENTS)
    shuffled = methods[3].model_dump() | {
        "student_ids": order.tolist(),
        "values": {o: np.array(v)[order].tolist() for o, v in methods[3].values.items()},
    }
    again = [*methods[:3], MethodResult.model_validate(shuffled), *methods[4:]]
    assert [r.model_dump() for r in table_of(again).rows] == [r.model_dump() for r in table_of(methods).rows]
    for ours, theirs in zip(
        table_of(again).paired_differences(), table_of(methods).paired_differences(), strict=True
    ):
        assert ours.difference.value == pytest.approx(theirs.difference.value)
    others = methods[3].model_dump() | {"student_ids": list(range(1, STUDENTS + 1))}
    with pytest.raises(ValueError, match=r"method 'engagement head' against 'SFT': .*same ids"):
        table_of([*methods[:3], MethodResult.model_validate(others)])


def test_table_refuses_double_names_and_missing_objectives() -> None:
    methods = run_of()
    with pytest.raises(ValueError, match="two methods are named 'SFT'"):
        table_of([methods[0], methods[0]])
    with pytest.raises(ValueError, match="'SFT' has no values for safety"):
        table_of(methods, ("accuracy", "safety"))


def test_paired_differences_compare_with_sft_and_with_the_unguided_twin() -> None:
    pairs = {(d.method, d.baseline) for d in table_of(run_of()).paired_differences()}
    assert ("policy, guided", "weights 0.5 / 0.5") in pairs
    assert ("policy, guided", "SFT") in pairs
    assert ("SFT, guided", "SFT") in pairs
    assert len(pairs) == 9 + 1


# --- claims


def by_key(methods: list[MethodResult]) -> dict[str, claims.Claim]:
    return {claim.key: claim for claim in claims.check_claims(table_of(methods))}


def test_all_claims_hold_when_the_effects_are_there() -> None:
    found = by_key(run_of())
    assert list(found) == [
        "head:accuracy",
        "head:engagement",
        "guided:policy, guided",
        "guided:policy, guided:accuracy",
        "guided:policy, guided:engagement",
        "guided:SFT, guided",
        "guided:SFT, guided:accuracy",
        "guided:SFT, guided:engagement",
        "front",
    ]
    assert all(claim.holds for claim in found.values())
    assert claims.headline(list(found.values())) == "All 5 claims of this run hold."


def test_a_failing_head_is_named_in_the_headline() -> None:
    found = by_key(run_of(accuracy_head=0.24))
    assert not found["head:accuracy"].holds
    assert found["head:accuracy"].words.startswith(
        "DOES NOT HOLD: the accuracy head beats SFT on accuracy (paired"
    )
    words = claims.headline(list(found.values()))
    assert words == "1 of 5 claims of this run do NOT hold: the accuracy head beats SFT on accuracy."


def test_a_difference_within_the_noise_does_not_hold() -> None:
    methods = run_of()
    methods[2] = methods[0].model_copy(update={"name": "a", "kind": "head", "weights": {"accuracy": 1.0}})
    claim = by_key(methods)["head:accuracy"]
    assert claim.difference is not None and claim.difference.value == 0
    assert not claim.holds


def test_guidance_is_judged_on_its_weighted_sum_and_reports_each_part() -> None:
    # less accurate than unguided, far more engaging: the sum gains, one part loses, and both are said
    found = by_key(run_of(guided=(0.23, 0.75)))
    assert found["guided:policy, guided"].holds
    difference = found["guided:policy, guided"].difference
    parts = [found[f"guided:policy, guided:{o}"].difference for o in OBJECTIVES]
    assert difference is not None and parts[0] is not None and parts[1] is not None
    assert difference.value == pytest.approx((parts[0].value + parts[1].value) / 2)
    assert not found["guided:policy, guided:accuracy"].holds
    assert "Not shown on a single objective" in claims.headline(list(found.values()))


def test_guidance_on_one_objective_is_one_claim() -> None:
    methods = run_of()
    alone = {"accuracy": 1.0, "engagement": 0.0}
    methods[4] = methods[4].model_copy(update={"guidance": alone})
    keys = [key for key in by_key(methods) if key.startswith("guided:policy")]
    assert keys == ["guided:policy, guided"]


def test_missing_rows_fail_and_say_so() -> None:
    methods = [m for m in run_of() if m.name not in ("engagement head", "weights 0 / 1", "weights 0.5 / 0.5")]
    found = by_key(methods)
    for key in ("head:engagement", "guided:policy, guided"):
        assert not found[key].holds
        assert found[key].words.startswith("Not measured: ")
    only_sft = by_key(methods[:1])
    assert not any(claim.holds for claim in only_sft.values())
    assert {"guided:guided", "guided:guided_sft", "front"} <= only_sft.keys()


def test_the_front_claim_counts_four_of_five() -> None:
    methods = run_of()
    assert by_key(methods)["front"].holds
    for index, name in ((6, "weights 0.75 / 0.25"), (7, "weights 0.5 / 0.5")):
        assert methods[index].name == name
        methods[index] = method(name, "weights", (0.1, 0.1), 20, weights=methods[index].weights)
        claim = by_key(methods)["front"]
        assert claim.holds == (index == 6)  # 4 of 5, then 3 of 5
    assert claim.difference is not None and claim.difference.value == -1
    assert "3 of 5 distinct points" in claim.evidence


def test_a_sweep_that_sft_dominates_is_no_front() -> None:
    methods = run_of()
    assert methods[0].kind == "sft"
    methods[0] = method("SFT", "sft", (0.99, 0.99), 0)
    claim = by_key(methods)["front"]
    assert not claim.holds
    assert "0 of 5 distinct points" in claim.evidence


def test_resampled_clusters_widen_an_interval_and_single_ones_leave_it() -> None:
    values = [0.0, 1.0, 0.2, 0.7, 0.9, 0.1, 0.4, 0.6]
    alone = statistics.clustered_mean_interval(values, [f"d{n}" for n in range(8)], seed=3)
    assert (alone.low, alone.high) == pytest.approx(
        (statistics.mean_interval(values, seed=3).low, statistics.mean_interval(values, seed=3).high)
    )
    # Every dialogue four times over, as branches are: the same information, the same interval.
    copied = statistics.clustered_mean_interval(values * 4, [f"d{n}" for n in range(8)] * 4, seed=3)
    assert (copied.low, copied.value, copied.high) == pytest.approx((alone.low, alone.value, alone.high))
    assert statistics.mean_interval(values * 4, seed=3).high < copied.high - 0.05


def test_a_policy_that_ignores_its_weights_has_no_front() -> None:
    methods = run_of()
    same = methods[7].values
    collapsed = [m.model_copy(update={"values": same}) if m.kind == "weights" else m for m in methods]
    claim = by_key(collapsed)["front"]
    assert not claim.holds
    assert "1 of 5 distinct points" in claim.evidence


def test_a_head_row_can_be_a_point_of_the_sweep() -> None:
    methods = [m for m in run_of() if m.name not in ("weights 1 / 0", "weights 0 / 1")]
    methods = [m.model_copy(update={"sweep": True}) if m.kind == "head" else m for m in methods]
    assert "5 of 5" in by_key(methods)["front"].evidence


def test_weighted_difference_uses_normalised_weights() -> None:
    table = table_of(run_of())
    sft, head = table.method("SFT"), table.method("engagement head")
    single = [table.difference(head, sft, Weights.one(o)).value for o in OBJECTIVES]
    both = table.difference(head, sft, Weights({"accuracy": 1, "engagement": 3})).value
    assert both == pytest.approx(0.25 * single[0] + 0.75 * single[1])
