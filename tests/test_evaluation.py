"""Statistics, the comparison table, the claims and the report."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from mahalo_ray.evaluation import claims, plots, report, statistics, terminal
from mahalo_ray.evaluation.outcomes import MethodResult
from mahalo_ray.evaluation.results import ComparisonTable
from mahalo_ray.objectives import Weights

STUDENTS = 60
OBJECTIVES = ("accuracy", "engagement")


def method(name: str, kind: str, means: tuple[float, ...], seed: int = 0, **more: Any) -> MethodResult:
    """A method whose students scatter around `means`: each has the same luck with every method."""
    luck = np.random.default_rng(99).normal(0, 0.1, STUDENTS)
    noise = np.random.default_rng(seed).normal(0, 0.02, (len(means), STUDENTS))
    names = (*OBJECTIVES, "helpfulness", "safety")
    values = {
        o: (mean + luck + noise[i]).tolist() for i, (o, mean) in enumerate(zip(names, means, strict=False))
    }
    return MethodResult.model_validate(
        {"name": name, "kind": kind, "student_ids": list(range(STUDENTS)), "values": values}
        | {"malformed_rate": 0.01, "tokens": 31400, "kl_to_reference": 0.04}
        | more
    )


def run_of(accuracy_head: float = 0.30, guided: tuple[float, float] = (0.29, 0.71)) -> list[MethodResult]:
    """A whole table in which everything holds unless told otherwise."""
    half = {"accuracy": 0.5, "engagement": 0.5}
    methods = [
        method("SFT", "sft", (0.26, 0.45), 1),
        method("SFT, guided", "guided_sft", (0.29, 0.65), 2, guidance=half, num_candidates=5),
        method("accuracy head", "head", (accuracy_head, 0.42), 3, weights={"accuracy": 1}),
        method("engagement head", "head", (0.19, 0.74), 4, weights={"engagement": 1}),
        method("policy, guided", "guided", guided, 5, weights=half, guidance=half, num_candidates=5),
    ]
    for i, (a, e) in enumerate([(0.30, 0.42), (0.28, 0.52), (0.26, 0.61), (0.23, 0.68), (0.19, 0.74)]):
        weights = {"accuracy": 1 - i / 4, "engagement": i / 4}
        methods.append(
            method(f"weights {1 - i / 4:g} / {i / 4:g}", "weights", (a, e), 10 + i, weights=weights)
        )
    return methods


def table_of(methods: list[MethodResult], objectives: tuple[str, ...] = OBJECTIVES) -> ComparisonTable:
    return ComparisonTable(methods, objectives, resamples=200)


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


# --- report


def contents_of(**more: Any) -> report.ReportContents:
    return report.ReportContents.model_validate(
        {
            "title": "Run <one> & only",
            "measurement": {"seed": 17, "judge": "a program, independent of the reward model"},
            "timings": {"sft": 152.0, "policy": 44.0},
            "samples": [
                {
                    "method": "SFT",
                    "topic": "3 + 4",
                    "turns": [
                        {
                            "speaker": "tutor",
                            "content": "<script>alert('x')</script>",
                            "scores": {"accuracy": 0.5},
                        }
                    ],
                    "outcome": {"accuracy": 0.4},
                }
            ],
            "history": {
                "sft": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}]
            },
            "reward_metrics": {
                "accuracy": {"auc": float("nan"), "correlation": 0.77},
                "engagement": {"auc": 0.9},
            },
        }
        | more
    )


def test_report_writes_three_files_that_agree(tmp_path: Path) -> None:
    table = table_of(run_of())
    found = claims.check_claims(table)
    files = report.write_report(str(tmp_path / "report"), table, found, contents_of())
    results = json.loads(Path(files.results).read_text())
    assert results["headline"] == "All 5 claims of this run hold."
    assert [row["name"] for row in results["rows"]] == [m.name for m in table.methods]
    assert results["reward_metrics"]["accuracy"] == {"auc": None, "correlation": 0.77}
    assert results["history"]["sft"][1]["loss"] is None
    assert [MethodResult.model_validate(m) for m in results["methods"]] == list(table.methods)
    assert [
        claims.Claim.model_validate({k: v for k, v in c.items() if k != "words"}) for c in results["claims"]
    ] == found
    png = Path(files.front).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20]) >= 1600
    html = Path(files.html).read_text()
    assert "All 5 claims of this run hold." in html
    assert f"{table.rows[0].means['accuracy'].value:.3f}" in html
    assert "value(s) not finite" in html


def test_page_asks_nothing_of_the_network_and_runs_nothing() -> None:
    html = report.render_html(table_of(run_of()), [], contents_of())
    assert "default-src 'none'" in html
    # only links inside the page and names of XML vocabularies may look like addresses
    addresses = re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert all(address.startswith("#") for address in addresses)
    left = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"https?://|<script|<link|@import", left)


def test_untrusted_text_is_escaped_everywhere() -> None:
    nasty = "<img src=x onerror=alert(1)>"
    methods = run_of()
    methods[0] = methods[0].model_copy(update={"name": nasty})
    table = table_of(methods)
    html = report.render_html(table, claims.check_claims(table), contents_of(title=nasty, summary=nasty))
    assert "<img" not in html
    assert "&lt;script&gt;alert" in html
    assert html.count("&lt;img src=x") >= 4  # title, table, claims, picture


def test_page_says_plainly_that_a_claim_fails() -> None:
    table = table_of(run_of(accuracy_head=0.24))
    html = report.render_html(table, claims.check_claims(table), contents_of())
    assert 'class="verdict fails"' in html
    assert "do NOT hold: the accuracy head beats SFT on accuracy" in html
    assert html.count("✗ does not hold") == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_objectives_makes_a_whole_report(count: int, tmp_path: Path) -> None:
    objectives = (*OBJECTIVES, "helpfulness", "safety")[:count]
    methods = [
        method("SFT", "sft", (0.2, 0.3, 0.4, 0.5), 1),
        method("$head$ of_accuracy", "head", (0.3, 0.3, 0.4, 0.5), 2, weights={"accuracy": 1}),
        method("weights a", "weights", (0.3, 0.2, 0.5, 0.4), 3, weights={"accuracy": 1, "engagement": 1}),
        method("weights b", "weights", (0.2, 0.4, 0.5, 0.4), 4, weights={"accuracy": 1, "engagement": 2}),
    ]
    table = table_of(methods, objectives)
    found = claims.check_claims(table)
    assert ("front" in {claim.key for claim in found}) == (count > 1)
    files = report.write_report(str(tmp_path), table, found, report.ReportContents(title="many"))
    assert Path(files.front).stat().st_size > 10_000
    figure = plots.draw_front(table, width=6, title=None)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert len(panels) == max(1, count * (count - 1) // 2)


def test_labels_of_the_picture_stay_off_each_other() -> None:
    figure = plots.draw_front(table_of(run_of()), width=8.4, title=None)
    texts = figure.axes[0].texts
    assert len(texts) == 10
    boxes = [text.get_window_extent() for text in texts]
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not overlapping


def test_history_without_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="stage 'sft', record 0: no 'step'"):
        report.render_html(table_of(run_of()), [], contents_of(history={"sft": [{"loss": 1.0}]}))


def test_terminal_table_fits_100_columns() -> None:
    for objectives in (OBJECTIVES, (*OBJECTIVES, "helpfulness", "safety")):
        methods = [
            method(
                f"weights {i} / 0.25 of it",
                "weights",
                (0.3, 0.2, 0.5, 0.4),
                i,
                weights={"accuracy": 1, "engagement": i},
            )
            for i in range(3)
        ]
        console = Console(width=100, record=True, file=io.StringIO())
        table = table_of(methods, objectives)
        terminal.print_table(console, table)
        terminal.print_claims(console, claims.check_claims(table))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 100
        estimate = table.rows[0].means[objectives[-1]]
        assert f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" in text
        assert "0.040" in text and "31k" in text and "1.0%" in text


def test_weighted_difference_uses_normalised_weights() -> None:
    table = table_of(run_of())
    sft, head = table.method("SFT"), table.method("engagement head")
    single = [table.difference(head, sft, Weights.one(o)).value for o in OBJECTIVES]
    both = table.difference(head, sft, Weights({"accuracy": 1, "engagement": 3})).value
    assert both == pytest.approx(0.25 * single[0] + 0.75 * single[1])
