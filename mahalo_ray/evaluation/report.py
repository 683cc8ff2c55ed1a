"""The report of a run: `results.json`, a self-contained `report.html`, and `front.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from mahalo_ray import __version__
from mahalo_ray.data import storage
from mahalo_ray.evaluation import curves, plots
from mahalo_ray.evaluation.claims import Claim, headline, in_words
from mahalo_ray.evaluation.families import FamilyFront
from mahalo_ray.evaluation.pages import render_page
from mahalo_ray.evaluation.results import ComparisonTable
from mahalo_ray.evaluation.statistics import finite_or_none

FORMAT = 1  # of results.json


class SampleTurn(BaseModel):
    """One turn of a sample dialogue. The content is shown as text, whatever it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speaker: Literal["tutor", "student", "system", "user", "assistant"]
    content: str
    scores: dict[str, float] = {}  # objective -> reward-model score of this turn


class SampleDialogue(BaseModel):
    """A dialogue to read in the report."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    topic: str = ""
    turns: list[SampleTurn]
    outcome: dict[str, float] = {}  # objective -> the judge's value


class ReportContents(BaseModel):
    """What stands beside the table and the claims; everything but the title may be left empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    summary: str = ""  # one sentence: what was aligned, to what
    measurement: dict[str, str | int | float] = {}  # how it was measured: seed, judges, sampling settings …
    timings: dict[str, float] = {}  # stage -> seconds
    samples: list[SampleDialogue] = []
    history: dict[str, list[dict[str, float | int | None]]] = {}  # stage -> [{"step": 10, "loss": 2.3}, …]
    reward_metrics: dict[str, dict[str, float]] = {}  # objective -> metric -> value; NaN = undefined


class ReportFiles(NamedTuple):
    """Where the report lies."""

    results: str
    html: str
    front: str


def write_report(
    folder: str,
    table: ComparisonTable,
    claims: Sequence[Claim],
    contents: ReportContents,
    fronts: Sequence[FamilyFront] = (),
) -> ReportFiles:
    """Write the three files into `folder` (a path or an fsspec URL) and return where they are.

    `claims` are shown as they are, failing ones included; `fronts` are those of a comparison with baselines.
    The page makes no request of any kind.
    """
    names = ("results.json", "report.html", "front.png")
    files = ReportFiles(*(storage.join(folder, name) for name in names))
    storage.write_json(files.results, results_document(table, claims, contents, fronts))
    storage.write_bytes(files.front, plots.front_png(table, front_title(table)))
    storage.write_bytes(files.html, render_html(table, claims, contents, fronts).encode())
    return files


def results_document(
    table: ComparisonTable,
    claims: Sequence[Claim],
    contents: ReportContents,
    fronts: Sequence[FamilyFront] = (),
) -> dict[str, Any]:
    """Everything measured, as JSON can hold it: per-dialogue values too, so that it can be analysed again."""
    front = table.sweep_front()
    document = {
        "format": FORMAT,
        "mahalo_ray": __version__,
        "title": contents.title,
        "headline": headline(claims),
        "objectives": list(table.objectives),
        "dialogues_per_method": table.dialogues,
        "bootstrap": {"confidence": table.confidence, "resamples": table.resamples, "seed": table.seed},
        "claims": [claim.model_dump() | {"words": claim.words} for claim in claims],
        "rows": [row.model_dump() for row in table.rows],
        "paired_differences": [difference.model_dump() for difference in table.paired_differences()],
        "hypervolume": {
            "reference_point": list(table.reference_point),
            "sweep": None if front is None else front.hypervolume.model_dump(),
            "all_methods": table.hypervolume_of_all(),
        },
        "sweep_front": None if front is None else front.model_dump(exclude={"hypervolume"}),
        **({"families": [family.model_dump() for family in fronts]} if fronts else {}),
        "measurement": contents.measurement,
        "timings_s": contents.timings,
        "reward_metrics": contents.reward_metrics,
        "history": contents.history,
        "methods": [method.model_dump() for method in table.methods],
    }
    cleaned: dict[str, Any] = finite_or_none(document)
    return cleaned


def render_html(
    table: ComparisonTable,
    claims: Sequence[Claim],
    contents: ReportContents,
    fronts: Sequence[FamilyFront] = (),
) -> str:
    """The page as one string: inline style and pictures, no script. All texts are escaped."""
    return render_page(
        "report.html",
        table=table,
        contents=contents,
        claims=claims,
        claim_words=in_words(claims),
        headline=headline(claims),
        all_hold=all(claim.holds for claim in claims if claim.required),
        front=table.sweep_front(),
        families=fronts,
        picture=Markup(plots.front_svg(table)),  # our own drawing; matplotlib escapes the labels in it
        marks=plots.MARKS,
        ranges=_ranges(table),
        differences=_grouped_differences(table),
        curves=curves.curves(contents.history),
        curve_size=(curves.WIDTH, curves.HEIGHT),
        reward_columns=_metric_names(contents.reward_metrics),
    )


def front_title(table: ComparisonTable) -> str:
    """The picture's title, e.g. `accuracy against engagement: 240 students, 95% intervals`."""
    return (
        f"{' against '.join(table.objectives)}: {table.dialogues} students, {table.confidence:.0%} intervals"
    )


def _ranges(table: ComparisonTable) -> dict[str, tuple[float, float]]:
    """Lowest and highest interval end per objective, over all rows: the scale of the bars in the table."""
    return {
        objective: (
            min(row.means[objective].low for row in table.rows),
            max(row.means[objective].high for row in table.rows),
        )
        for objective in table.objectives
    }


def _grouped_differences(table: ComparisonTable) -> list[dict[str, Any]]:
    """Paired differences with one line per (method, baseline) and one column per objective."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for item in table.paired_differences():
        key = (item.method, item.baseline)
        line = lines.setdefault(key, {"method": item.method, "baseline": item.baseline, "by": {}})
        line["by"][item.objective] = item.difference
    return list(lines.values())


def _metric_names(reward_metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """All metric names over the objectives, in the order they first occur."""
    return list(dict.fromkeys(name for metrics in reward_metrics.values() for name in metrics))
