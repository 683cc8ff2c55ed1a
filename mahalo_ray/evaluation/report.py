"""The report of a run: `results.json`, a self-contained `report.html`, and `front.png`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mahalo_ray import __version__
from mahalo_ray.data import storage
from mahalo_ray.evaluation import plots
from mahalo_ray.evaluation.claims import Claim, headline, in_words
from mahalo_ray.evaluation.results import ComparisonTable, FamilyFront, compact_count
from mahalo_ray.evaluation.statistics import Estimate, finite_or_none

CURVE_WIDTH, CURVE_HEIGHT = 240, 72  # of the plotting area, in SVG units
_MAX_POINTS = 400

History = Mapping[str, Sequence[Mapping[str, float | int | None]]]  # stage -> [{"step": 10, "loss": 2.3}, …]


class Curve(NamedTuple):
    """One metric of one stage, ready to draw."""

    metric: str
    polyline: str  # "x,y x,y …" within CURVE_WIDTH x CURVE_HEIGHT, y downwards
    first: float
    last: float
    low: float
    high: float
    steps: tuple[float, float]
    skipped: int  # values that are not finite: left out of the line, and said so


def training_curves(history: History) -> dict[str, list[Curve]]:
    """The curves of every stage, in the order given. A record without `step` is a ValueError."""
    return {stage: _stage_curves(stage, records) for stage, records in history.items()}


def _stage_curves(stage: str, records: Sequence[Mapping[str, float | int | None]]) -> list[Curve]:
    series: dict[str, list[tuple[float, float]]] = {}
    for index, record in enumerate(records):
        step = record.get("step")
        if step is None:
            raise ValueError(f"history of stage '{stage}', record {index}: no 'step'")
        for metric, value in record.items():
            if metric != "step":
                number = math.nan if value is None else float(value)
                series.setdefault(metric, []).append((float(step), number))
    drawn = (_curve(metric, points) for metric, points in series.items())
    return [curve for curve in drawn if curve is not None]


def _curve(metric: str, points: Sequence[tuple[float, float]]) -> Curve | None:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return None
    steps, values = [step for step, _ in finite], [value for _, value in finite]
    low, high = min(values), max(values)
    stride = math.ceil(len(finite) / _MAX_POINTS)
    shown = finite[::stride] + ([finite[-1]] if (len(finite) - 1) % stride else [])
    line = " ".join(
        f"{CURVE_WIDTH * _share(step, min(steps), max(steps)):.1f},"
        f"{CURVE_HEIGHT * (1 - _share(value, low, high)):.1f}"
        for step, value in shown
    )
    return Curve(
        metric=metric,
        polyline=line,
        first=values[0],
        last=values[-1],
        low=low,
        high=high,
        steps=(min(steps), max(steps)),
        skipped=len(points) - len(finite),
    )


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


_OBJECTIVES_PER_TABLE = 2  # what fits beside the other columns


def print_table(console: Console, table: ComparisonTable) -> None:
    """Every method with mean and interval per objective; several tables where there are many."""
    for start in range(0, len(table.objectives), _OBJECTIVES_PER_TABLE):
        chunk = table.objectives[start : start + _OBJECTIVES_PER_TABLE]
        console.print(_table(table, chunk))
    front = table.sweep_front()
    if front is not None:
        volume = front.hypervolume
        console.print(
            f"Hypervolume of the sweep {_interval(volume)}, of all methods {table.hypervolume_of_all():.3f}, "
            f"over ({', '.join(f'{value:g}' for value in table.reference_point)}). "
            f"{table.dialogues} problems, {table.confidence:.0%} intervals.",
            highlight=False,
        )


def print_families(console: Console, fronts: Sequence[FamilyFront]) -> None:
    """What every family of methods covers, against MAH-DPO at the same weight vectors, and what it takes."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    drawn.add_column("family")
    for title in (
        "vectors",
        "hypervolume",
        "MAH-DPO minus it",
        "highest\nKL",
        "training\nruns",
        "models",
        "stored",
    ):
        drawn.add_column(title, justify="right", no_wrap=True)
    for front in fronts:
        drawn.add_row(
            front.name,
            str(len(front.weights)),
            _interval(front.hypervolume),
            "" if front.difference is None else _interval(front.difference, signed=True),
            "–" if front.kl_to_reference is None else f"{front.kl_to_reference[1]:.3f}",
            str(front.cost.training_runs),
            str(front.cost.models),
            f"{front.cost.parameter_bytes / 1e6:.1f} MB",
        )
    console.print(drawn)


def print_claims(console: Console, claims: Sequence[Claim]) -> None:
    """The headline, then every claim with its verdict and figure."""
    failing = any(claim.required and not claim.holds for claim in claims)
    console.print(Text(headline(claims), style="bold red" if failing else "bold green"))
    for claim in claims:
        text = Text(f"{'✓' if claim.holds else '✗'} {claim.words}", style="" if claim.holds else "red")
        console.print(Padding(text, (0, 0, 0, 2 if claim.required else 4)))


def _table(table: ComparisonTable, objectives: Sequence[str]) -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    drawn.add_column("method", max_width=25, overflow="fold")
    for objective in objectives:
        drawn.add_column(Text(objective), justify="right", no_wrap=True)
    drawn.add_column("KL", justify="right", no_wrap=True)
    drawn.add_column("mal-\nformed", justify="right", no_wrap=True)
    drawn.add_column("tokens", justify="right", no_wrap=True)
    drawn.add_column("front", justify="center", no_wrap=True)
    for row in table.rows:
        drawn.add_row(
            Text(row.name),
            *(_interval(row.means[objective]) for objective in objectives),
            "–" if row.kl_to_reference is None else f"{row.kl_to_reference:.3f}",
            f"{row.malformed_rate:.1%}",
            compact_count(row.tokens),
            "yes" if row.on_front else "",
        )
    return drawn


def _interval(estimate: Estimate, signed: bool = False) -> Text:
    form = "+.3f" if signed else ".3f"
    return Text(f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]")


def render_page(template: str, **values: Any) -> str:
    """A template with its values; all texts are escaped, and a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("mahalo_ray.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "duration": duration, "count": compact_count}
    return environment.get_template(template).render(**values, version=__version__)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for the page; a dash where it is unknown or undefined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A difference with its sign (a true minus sign)."""
    return f"{value:+.3f}".replace("-", "−")


def duration(seconds: float) -> str:
    """`8.3 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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


class EvenFront(NamedTuple):
    """The points that a sampler asked for beside the sweep's list, to cover the front evenly."""

    sampler: str
    table: ComparisonTable  # of these points alone
    cv: float  # coefficient of variation of the gaps between neighbours, noise taken out
    cv_of_list: float  # the same of the sweep's list


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
    even: EvenFront | None = None,
) -> ReportFiles:
    """Write the three files into `folder` (a path or an fsspec URL) and return where they are.

    `claims` are shown as they are, failing ones included; `fronts` are those of a comparison with baselines;
    `even` is a front that a sampler covered.
    The page makes no request of any kind.
    """
    names = ("results.json", "report.html", "front.png")
    files = ReportFiles(*(storage.join(folder, name) for name in names))
    storage.write_json(files.results, results_document(table, claims, contents, fronts, even))
    storage.write_bytes(files.front, plots.front_png(table, front_title(table)))
    storage.write_bytes(files.html, render_html(table, claims, contents, fronts, even).encode())
    return files


def results_document(
    table: ComparisonTable,
    claims: Sequence[Claim],
    contents: ReportContents,
    fronts: Sequence[FamilyFront] = (),
    even: EvenFront | None = None,
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
        **({} if even is None else {"even_front": _even_document(even)}),
        "measurement": contents.measurement,
        "timings_s": contents.timings,
        "reward_metrics": contents.reward_metrics,
        "history": contents.history,
        "methods": [method.model_dump() for method in table.methods],
    }
    cleaned: dict[str, Any] = finite_or_none(document)
    return cleaned


def _even_document(even: EvenFront) -> dict[str, Any]:
    summary = even.table.sweep_front()
    return {
        "sampler": even.sampler,
        "rows": [row.model_dump() for row in even.table.rows],
        "hypervolume": None if summary is None else summary.hypervolume.model_dump(),
        "cv_of_gaps": even.cv,
        "cv_of_gaps_of_list": even.cv_of_list,
    }


def render_html(
    table: ComparisonTable,
    claims: Sequence[Claim],
    contents: ReportContents,
    fronts: Sequence[FamilyFront] = (),
    even: EvenFront | None = None,
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
        even=even,
        even_picture=None if even is None else Markup(plots.front_svg(even.table)),
        picture=Markup(plots.front_svg(table)),  # our own drawing; matplotlib escapes the labels in it
        marks=plots.MARKS,
        ranges=_ranges(table),
        differences=_grouped_differences(table),
        curves=training_curves(contents.history),
        curve_size=(CURVE_WIDTH, CURVE_HEIGHT),
        reward_columns=_metric_names(contents.reward_metrics),
    )


def front_title(table: ComparisonTable) -> str:
    """The picture's title, e.g. `accuracy against engagement: 240 problems, 95% intervals`."""
    return (
        f"{' against '.join(table.objectives)}: {table.dialogues} problems, {table.confidence:.0%} intervals"
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
