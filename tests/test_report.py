"""The report: three files that agree, a page that is safe, the table in the terminal."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated_run import OBJECTIVES, method, run_of, table_of
from rich.console import Console

from mahalo_ray.evaluation import claims, plots, report
from mahalo_ray.evaluation.guided_table import (
    SUM,
    UNGUIDED,
    PlayedPolicy,
    guided_rows,
    markdown_of,
    pooled,
)
from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.evaluation.statistics import Estimate


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


def test_a_front_that_a_sampler_covered_has_its_own_picture(tmp_path: Path) -> None:
    table = table_of(run_of())
    points = [m for m in table.methods if m.in_sweep][:3]
    even = report.EvenFront("surf", table_of(points), cv=0.125, cv_of_list=0.5)
    files = report.write_report(str(tmp_path), table, claims.check_claims(table), contents_of(), even=even)
    page, results = Path(files.html).read_text(), json.loads(Path(files.results).read_text())
    assert page.count("<svg") > report.render_html(table, [], contents_of()).count("<svg")
    assert "3 decoding weights that SURF asked for" in page and "0.12; of the list's points 0.50" in page
    assert [row["name"] for row in results["even_front"]["rows"]] == [point.name for point in points]
    assert len(results["rows"]) == len(table.rows)  # the table and its claims stay those of the list


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
        report.print_table(console, table)
        report.print_claims(console, claims.check_claims(table))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 100
        estimate = table.rows[0].means[objectives[-1]]
        assert f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" in text
        assert "0.040" in text and "31k" in text and "1.0%" in text


def test_pooled_seeds_and_policies_by_guide() -> None:
    seeds = [run_of(), run_of(accuracy_head=0.34)]
    extra = method("only here", "weights", (0.2, 0.5), 7, weights={"accuracy": 1})
    methods = pooled([[*seeds[0], extra], seeds[1]])
    assert [m.name for m in methods] == [m.name for m in seeds[0]]  # what one seed alone played is left out
    assert len(set(methods[0].student_ids)) == 2 * len(seeds[0][0].student_ids)
    assert methods[0].tokens == 2 * seeds[0][0].tokens and methods[0].kl_to_reference == pytest.approx(0.04)
    policies = [
        PlayedPolicy("SFT", {UNGUIDED: "SFT", SUM: "SFT, guided"}),
        PlayedPolicy("accuracy head", {UNGUIDED: "accuracy head"}),
    ]
    tables = [table_of(one) for one in seeds]
    sft, head = guided_rows(table_of(methods), policies, tables)
    assert sft.cells[UNGUIDED].relative["accuracy"] == Estimate(value=0, low=0, high=0)
    cell = head.cells[UNGUIDED]
    means = [float(np.mean(one[2].values["accuracy"])) for one in seeds]
    assert [figures["accuracy"] for figures in cell.by_seed] == pytest.approx(means)
    assert cell.means["accuracy"].value == pytest.approx(np.mean(means))
    base = np.mean([np.mean(one[0].values["accuracy"]) for one in seeds])
    change = cell.relative["accuracy"]
    assert change is not None and change.value == pytest.approx(np.mean(means) / base - 1)
    assert change.low < change.value < change.high
    lines = markdown_of([sft, head], table_of(methods).objectives).splitlines()
    assert len(lines) == 2 + 3 and "(+0%)" in lines[2] and lines[2].count("|") == lines[0].count("|")
