"""Families of methods compared: fronts, their differences, claims, and how the report shows them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_world as world
from rich.console import Console

from mahalo_ray.evaluation import plots, report
from mahalo_ray.evaluation.claims import check_claims, comparison_claims, headline
from mahalo_ray.evaluation.results import ComparisonTable, FamilyCost, MethodResult, family_fronts
from mahalo_ray.objectives import Weights


def constant(name: str, kind: str, means: tuple[float, float], **more: Any) -> MethodResult:
    """A method with which every student fares the same: intervals have no width."""
    values = {o: [mean] * 5 for o, mean in zip(world.OBJECTIVES, means, strict=True)}
    return MethodResult.model_validate(
        {"name": name, "kind": kind, "student_ids": list(range(5)), "values": values}
        | {"malformed_rate": 0.1, "tokens": 10, "kl_to_reference": 0.05}
        | more
    )


SKEWED, OTHER = {"accuracy": 0.9, "engagement": 0.1}, {"accuracy": 0.1, "engagement": 0.9}
COSTS: Any = {
    name: FamilyCost(training_runs=runs, pairs_trained=100, models=runs, parameter_bytes=1000)
    for name, runs in (("mah_dpo", 1), ("dpo", 2), ("soup", 2), ("scalarised", 2))
}


def rows() -> list[MethodResult]:
    return [
        constant("SFT", "sft", (0.2, 0.2)),
        constant("accuracy head", "head", (0.5, 0.1), weights={"accuracy": 1}),
        constant("engagement head", "head", (0.1, 0.5), weights={"engagement": 1}),
        constant("weights 0.9 / 0.1", "weights", (0.4, 0.2), weights=SKEWED, kl_to_reference=0.02),
        constant("weights 0.1 / 0.9", "weights", (0.2, 0.4), weights=OTHER, kl_to_reference=0.03),
        constant("DPO accuracy", "dpo", (0.6, 0.1), weights={"accuracy": 1}),
        constant("DPO engagement", "dpo", (0.1, 0.5), weights={"engagement": 1}, malformed_rate=0.3),
        constant("soup 0.9 / 0.1", "soup", (0.3, 0.2), weights=SKEWED),
        constant("soup 0.1 / 0.9", "soup", (0.2, 0.3), weights=OTHER),
        constant("scalarised 0.9 / 0.1", "scalarised", (0.4, 0.2), weights=SKEWED),
        constant("scalarised 0.1 / 0.9", "scalarised", (0.2, 0.4), weights=OTHER),
    ]


def table_of(methods: list[MethodResult]) -> ComparisonTable:
    return ComparisonTable(methods, world.OBJECTIVES, resamples=20)


def test_families_cover_what_is_worked_out_by_hand() -> None:
    ours, dpo, soup, _ = family_fronts(table_of(rows()), COSTS)
    # Two rectangles less their overlap: .4 x .2 + .2 x .4 - .2 x .2, and so on.
    assert ours.hypervolume.value == pytest.approx(0.12) and ours.difference is None
    assert ours.kl_to_reference == (0.02, 0.03)
    assert dpo.hypervolume.value == pytest.approx(0.06 + 0.05 - 0.01)
    assert dpo.mah_dpo is not None and dpo.difference is not None
    assert dpo.mah_dpo.value == pytest.approx(0.05 + 0.05 - 0.01)  # its heads alone, not its sweep
    assert dpo.difference.value == pytest.approx(-0.01)
    assert dpo.malformed_rate == 0.3
    assert soup.hypervolume.value == pytest.approx(0.06 + 0.06 - 0.04)
    assert soup.difference is not None
    assert soup.difference.low == pytest.approx(0.04) == pytest.approx(soup.difference.high)
    assert soup.weights == [SKEWED, OTHER] and soup.cost.training_runs == 2


def test_a_difference_of_hypervolumes_is_paired_by_student() -> None:
    luck = np.random.default_rng(0).uniform(0.2, 0.8, 40)
    methods = []
    for kind, extra in (("weights", 0.05), ("soup", 0.0)):
        for name, weights in (("a", SKEWED), ("b", OTHER)):
            values = {o: (luck * (1 + w) + extra).tolist() for o, w in weights.items()}
            methods.append(
                MethodResult(
                    name=f"{kind} {name}",
                    kind=kind,
                    weights=weights,
                    student_ids=list(range(40)),
                    values=values,
                    malformed_rate=0.0,
                    tokens=1,
                )
            )
    table = ComparisonTable(methods, world.OBJECTIVES, resamples=200)
    _, soup = family_fronts(table, {name: COSTS[name] for name in ("mah_dpo", "soup")})
    assert soup.mah_dpo is not None and soup.difference is not None
    apart = soup.mah_dpo.low - soup.hypervolume.high
    assert soup.difference.value == pytest.approx(soup.mah_dpo.value - soup.hypervolume.value)
    assert soup.difference.low > 0 > apart  # the two intervals overlap, the paired difference is clear


def test_a_baseline_without_a_row_of_mah_dpo_to_compare_is_named() -> None:
    methods = [method for method in rows() if method.name != "weights 0.1 / 0.9"]
    with pytest.raises(ValueError, match=r"no row of MAH-DPO has the weights of 'soup 0\.1 / 0\.9'"):
        family_fronts(table_of(methods), COSTS)


def test_a_better_baseline_and_an_equal_one_are_said_plainly() -> None:
    table = table_of(rows())
    found = {claim.key: claim for claim in comparison_claims(table, family_fronts(table, COSTS))}
    assert {key: claim.holds for key, claim in found.items()} == {
        "hypervolume:dpo": False,
        "hypervolume:soup": True,
        "hypervolume:scalarised": False,
    }
    assert "hypervolume 0.090 against 0.100" in found["hypervolume:dpo"].words
    assert "the baseline covers more" in found["hypervolume:dpo"].words
    assert "the two are not told apart" in found["hypervolume:scalarised"].words
    assert headline(list(found.values())).startswith("2 of 3 claims of this run do NOT hold: MAH-DPO covers")


def test_baselines_change_no_claim_about_heads_and_guidance() -> None:
    half = {"accuracy": 0.5, "engagement": 0.5}
    guided = constant("guided", "guided", (0.5, 0.5), weights=half, guidance=half, num_candidates=5)
    twin = constant("weights 0.5 / 0.5", "weights", (0.3, 0.3), weights=half)
    soup = constant("soup 0.5 / 0.5", "soup", (0.9, 0.9), weights=half)
    ours = [*rows()[:5], guided, twin]
    before = check_claims(table_of(ours))
    after = check_claims(table_of([soup, *rows()[5:], *ours]))
    assert [claim.words for claim in before] == [claim.words for claim in after]


def test_report_terminal_and_picture_show_every_family(tmp_path: Path) -> None:
    table = table_of(rows())
    fronts = family_fronts(table, COSTS)
    claims = comparison_claims(table, fronts)
    contents = report.ReportContents(title="comparison")
    document = report.results_document(table, claims, contents, fronts)
    assert [family["family"] for family in document["families"]] == list(COSTS)
    assert "families" not in report.results_document(table, claims, contents)
    html = report.render_html(table, claims, contents, fronts)
    assert "Families of methods" in html and "a training run, a model" in html
    assert "Families of methods" not in report.render_html(table, claims, contents)
    console = Console(width=120, record=True, file=io.StringIO())
    report.print_families(console, fronts)
    text = console.export_text()
    assert "-0.010 [-0.010, -0.010]" in text and "scalarised DPO" in text
    panel = plots.draw_front(table, width=8.4, title=None).axes[0]
    lines = {tuple(np.asarray(line.get_xdata())) for line in panel.lines if line.get_linestyle() == "-"}
    # one line per family from left to right: the sweep (and the equal scalarised), DPO, the soup
    assert {(0.2, 0.4), (0.1, 0.6), (0.2, 0.3)} <= lines
    labels = {text.get_text() for text in panel.texts}
    assert "SFT" in labels and not any("soup" in label for label in labels)


def test_weights_of_one_objective_are_the_head_alone() -> None:
    head = rows()[1]
    assert head.same_weights(Weights.one("accuracy")) and not head.same_weights(SKEWED)
    assert not rows()[0].same_weights(SKEWED)
