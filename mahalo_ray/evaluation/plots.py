"""The picture of the front: every method with its error bars. Drawn with matplotlib, without a display."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mahalo_ray.evaluation.results import BASELINES, ComparisonTable, MethodKind, Row
from mahalo_ray.evaluation.statistics import Estimate
from mahalo_ray.metrics import FloatArray


class LabelledPoint(NamedTuple):
    """A point with its intervals, and the text to put beside it ("": none)."""

    text: str
    across: Estimate
    up: Estimate


def place_labels(panel: Axes, points: Sequence[LabelledPoint], lines: Sequence[FloatArray] = ()) -> None:
    """Annotate every point; labels move away from points, `lines` [n, 2] and each other (adjustText).

    The figure must have been drawn and its layout fixed: places are compared in pixels.
    """
    texts = [
        panel.text(*_beside(panel, point), point.text, fontsize="small") for point in points if point.text
    ]
    bars = [_error_bars(point) for point in points]
    across, up = np.concatenate([_along(line) for line in [*lines, *itertools.chain(*bars)]]).T
    # A limit of iterations, not of time: the picture is the same on every machine.
    adjust_text(
        texts,
        x=across,
        y=up,
        ax=panel,
        iter_lim=400,
        expand=(1.05, 1.3),
        force_static=(0.1, 0.3),
        force_explode=0,
        force_pull=(0.02, 0.02),
    )


def _beside(panel: Axes, point: LabelledPoint) -> tuple[float, float]:
    """Where a label begins its search: up and to the right of the point, in the data's units."""
    pixels = panel.transData.transform((point.across.value, point.up.value)) + 0.1 * panel.figure.dpi
    x, y = panel.transData.inverted().transform(pixels)
    return float(x), float(y)


def _error_bars(point: LabelledPoint) -> list[FloatArray]:
    """Both bars of a point as lines [2, 2]."""
    x, y = point.across, point.up
    return [
        np.array([[min(x.low, x.value), y.value], [max(x.high, x.value), y.value]]),
        np.array([[x.value, min(y.low, y.value)], [x.value, max(y.high, y.value)]]),
    ]


def _along(line: FloatArray) -> FloatArray:
    """Points [m, 2] along a line [n, 2], dense enough that no label fits between two."""
    pieces = [np.linspace(start, end, 12) for start, end in itertools.pairwise(line)]
    return np.concatenate(pieces)


INK, SURFACE = "#1d2530", "#ffffff"
# In the page's SVG these two become CSS colours, so that the picture follows light and dark.
_THEMED = {INK: "currentColor", SURFACE: "var(--surface)"}


class Mark(NamedTuple):
    """How a kind of method is drawn; the kinds differ in colour and in shape."""

    color: str
    shape: str
    size: float
    legend: str


MARKS: dict[MethodKind, Mark] = {
    "sft": Mark("#7b7f86", "s", 7.5, "SFT"),
    "guided_sft": Mark("#c98500", "D", 7.0, "SFT, guided"),
    "head": Mark("#8b62d0", "^", 8.5, "one head alone"),
    "weights": Mark("#2f7de1", "o", 7.0, "sweep"),
    "guided": Mark("#e0562b", "*", 13.0, "policy, guided"),
    "dpo": Mark("#14967f", "X", 8.5, "DPO per objective"),
    "scalarised": Mark("#c2377e", "v", 7.5, "scalarised DPO"),
    "modpo": Mark("#6b8e23", "P", 8.0, "MODPO"),
    "soup": Mark("#8c5a2b", "p", 8.0, "DPO soup"),
}


def front_png(table: ComparisonTable, title: str) -> bytes:
    """The picture on white at 1600 pixels' width or more: sharp when a README shows it at half the size."""
    with matplotlib.rc_context(_style(font_size=11.5)):
        figure = draw_front(table, width=8.4, title=title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, facecolor=SURFACE)
    return buffer.getvalue()


def front_svg(table: ComparisonTable) -> str:
    """The picture as an inline SVG element in the page's colours, small enough to read on a phone."""
    with matplotlib.rc_context(_style(font_size=9.5) | {"svg.fonttype": "none", "svg.hashsalt": "mahalo"}):
        figure = draw_front(table, width=5.0, title=None)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, themed in _THEMED.items():
        svg = svg.replace(drawn, themed)
    return svg


def draw_front(table: ComparisonTable, width: float, title: str | None) -> Figure:
    """The figure for any number of objectives; `width` in inches.

    One objective: a dot plot. Two: the plane with the front. More: a panel for each pair of objectives.
    """
    pairs = list(itertools.combinations(range(len(table.objectives)), 2))
    if not pairs:
        figure = Figure(figsize=(width, 1.2 + 0.34 * len(table.rows)), layout="constrained")
        _draw_dots(figure.subplots(), table)
    else:
        columns = min(len(pairs), 1 if len(pairs) == 1 else 2)
        lines = math.ceil(len(pairs) / columns)
        height = width * 0.66 + 0.5 if columns == 1 else width * 0.52 * lines + 0.7
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel in panels[len(pairs) :]:
            panel.set_visible(False)
        for panel, (x, y) in zip(panels, pairs, strict=False):
            _draw_plane(panel, table, x, y)
        _draw_legend(figure, table)
    if title is not None:
        figure.suptitle(title, fontweight="bold")
    FigureCanvasAgg(figure)
    figure.canvas.draw()  # settles the layout, so that labels can look for free places ...
    figure.set_layout_engine("none")  # ... and does not move again because of them
    if pairs:
        for panel, (x, y) in zip(panels, pairs, strict=False):
            _label_points(panel, table, x, y)
    return figure


def _style(font_size: float) -> Any:  # matplotlib types rc parameters by their literal names
    return {
        "font.size": font_size,
        "axes.titlesize": font_size * 1.1,
        "figure.titlesize": font_size * 1.2,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "text.parse_math": False,
    }


def _draw_plane(panel: Axes, table: ComparisonTable, x: int, y: int) -> None:
    """Two objectives against each other; a line through the sweep's front when there are only these two."""
    first, second = table.objectives[x], table.objectives[y]
    panel.set_axisbelow(True)
    panel.grid(color=INK, alpha=0.12, linewidth=0.7)
    panel.set_xlabel(f"{first}  (better →)")
    panel.set_ylabel(f"{second}  (better →)")
    panel.margins(0.12)
    for kind, line in _front_lines(table).items():
        panel.plot(*line.T, color=MARKS[kind].color, linewidth=2, alpha=0.55, zorder=2)
    for row in table.rows:
        across, up = row.means[first], row.means[second]
        color = MARKS[row.kind].color
        horizontal, vertical = _arms(across), _arms(up)
        panel.errorbar(
            across.value,
            up.value,
            xerr=horizontal,
            yerr=vertical,
            fmt="none",
            ecolor=color,
            alpha=0.5,
            lw=1.3,
        )
        panel.plot(across.value, up.value, **_marker(row), zorder=4)


def _front_lines(table: ComparisonTable) -> dict[MethodKind, FloatArray]:
    """The non-dominated points [n, 2] of the sweep and of every baseline from left to right, where they make
    a line."""
    if len(table.objectives) != 2:
        return {}
    lines: dict[MethodKind, FloatArray] = {}
    kind: MethodKind
    for kind in ("weights", *BASELINES):
        family = [row for row in table.rows if (row.in_sweep if kind == "weights" else row.kind == kind)]
        front = sorted([row.means[o].value for o in table.objectives] for row in family if row.on_front)
        if len(front) > 1:
            lines[kind] = np.array(front)
    return lines


def _draw_dots(panel: Axes, table: ComparisonTable) -> None:
    objective = table.objectives[0]
    for line, row in enumerate(table.rows):
        estimate = row.means[objective]
        panel.errorbar(
            estimate.value,
            line,
            xerr=_arms(estimate),
            fmt="none",
            ecolor=MARKS[row.kind].color,
            alpha=0.5,
            lw=1.5,
        )
        panel.plot(estimate.value, line, **_marker(row), zorder=4)
    panel.set_yticks(range(len(table.rows)), [row.name for row in table.rows])
    panel.invert_yaxis()
    panel.grid(axis="x", color=INK, alpha=0.12, linewidth=0.7)
    panel.set_xlabel(f"{objective}  (better →)")


def _arms(estimate: Estimate) -> list[list[float]]:
    """Distances from the value to the interval's ends; 0 where a skewed interval leaves the value outside."""
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _marker(row: Row) -> dict[str, Any]:
    """Filled, or hollow where another method (for the sweep and baselines: their own points) dominates it."""
    mark = MARKS[row.kind]
    return {
        "marker": mark.shape,
        "markersize": mark.size,
        "color": mark.color,
        "markerfacecolor": mark.color if row.on_front else SURFACE,
        "markeredgecolor": mark.color,
        "markeredgewidth": 1.4,
        "linestyle": "none",
    }


def _draw_legend(figure: Figure, table: ComparisonTable) -> None:
    present = {row.kind for row in table.rows}
    order = " / ".join(table.objectives)
    handles: list[Line2D] = []
    for kind, mark in MARKS.items():
        if kind not in present:
            continue
        legend = "MAH-DPO" if kind == "weights" and present.intersection(BASELINES) else mark.legend
        text = f"{legend}: {order}" if kind == "weights" and len(order) < 30 else legend
        look: dict[str, Any] = {"color": mark.color, "marker": mark.shape, "markersize": mark.size * 0.85}
        handles.append(Line2D([], [], **look, linestyle="none", label=text))
    columns = 3 if figure.get_figwidth() > 6 else 2
    hollow: dict[str, Any] = {
        "marker": "o",
        "markerfacecolor": SURFACE,
        "markeredgecolor": INK,
        "linestyle": "none",
    }
    handles.append(Line2D([], [], **hollow, markersize=6, label="hollow: dominated"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, handletextpad=0.3
    )


def short_label(row: Row, objectives: tuple[str, ...]) -> str:
    """A label that fits beside a point: the weights of a sweep's point, the name of anything else; none for
    baselines, whose points are too many."""
    if row.kind in BASELINES:
        return ""
    if row.kind == "weights" and row.weights is not None:
        return " / ".join(f"{row.weights.get(objective, 0.0):.2g}" for objective in objectives)
    return row.name


def _label_points(panel: Axes, table: ComparisonTable, x: int, y: int) -> None:
    """Names first: they need more room than the weights of the sweep's points."""
    first, second = table.objectives[x], table.objectives[y]
    ordered = sorted(table.rows, key=lambda row: row.kind == "weights")
    points = [
        LabelledPoint(short_label(row, table.objectives), row.means[first], row.means[second])
        for row in ordered
    ]
    place_labels(panel, points, list(_front_lines(table).values()))


SERIES_COLORS = ("#2f7de1", "#e0562b", "#14967f", "#8b62d0", "#c98500", "#c2377e", "#6b8e23", "#7b7f86")
_SERIES_SHAPES = "osD^vPXp"


def fronts_png(document: Mapping[str, Any]) -> bytes:
    """Several fronts in one picture, from the document of `front.json`: a plane for two objectives, else
    parallel coordinates."""
    with matplotlib.rc_context(_style(font_size=10.5)):
        figure = Figure(figsize=(8.4, 6.2), layout="constrained")
        panel = figure.subplots()
        FigureCanvasAgg(figure)
        if len(document["objectives"]) == 2:
            _draw_fronts(panel, document)
        else:
            _draw_parallel(panel, document)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(document["title"], fontweight="bold")
        panel.set_title(document["units"], fontsize="small")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor=SURFACE, bbox_inches="tight")
    return buffer.getvalue()


def _draw_fronts(panel: Axes, document: Mapping[str, Any]) -> None:
    """The plane of two objectives: points with intervals, a line through each front, and its band."""
    first, second = document["objectives"]
    panel.set_axisbelow(True)
    panel.grid(color=INK, alpha=0.12, linewidth=0.7)
    panel.set_xlabel(f"{first}  (better →)")
    panel.set_ylabel(f"{second}  (better →)")
    for series, shape in zip(document["series"], itertools.cycle(_SERIES_SHAPES), strict=False):
        color, points = series["color"], series["points"]
        if series["band"]:
            across, low, high = np.array(series["band"]).T
            panel.fill_between(across, low, high, color=color, alpha=0.12, linewidth=0)
        if series["is_line"]:
            line = sorted((p["mean"][first], p["mean"][second]) for p in points if p["on_front"])
            panel.plot(*np.array(line).T, color=color, linewidth=1.8, alpha=0.6, zorder=2)
        for point in points:
            x, y = point["mean"][first], point["mean"][second]
            panel.plot(
                [point["low"][first], point["high"][first]], [y, y], color=color, alpha=0.35, linewidth=1.1
            )
            panel.plot(
                [x, x], [point["low"][second], point["high"][second]], color=color, alpha=0.35, linewidth=1.1
            )
            panel.plot(
                x, y, shape, color=color, markerfacecolor=color if point["on_front"] else SURFACE, zorder=4
            )
            if not series["is_line"]:
                panel.annotate(
                    point["method"], (x, y), (6, 6), textcoords="offset points", fontsize="small", color=color
                )
        style = "-" if series["is_line"] else "none"
        panel.plot([], [], shape, color=color, linestyle=style, label=series["name"])


_BEHIND_NUMBERS = {"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}


def _draw_parallel(panel: Axes, document: Mapping[str, Any]) -> None:
    """A line per point over one axis per objective, each axis from the lowest to the highest mean."""
    objectives = document["objectives"]
    points = [point for series in document["series"] for point in series["points"]]
    means = np.array([[point["mean"][name] for name in objectives] for point in points])
    low, span = means.min(axis=0), np.where(np.ptp(means, axis=0) > 0, np.ptp(means, axis=0), 1.0)
    for series in document["series"]:
        panel.plot([], [], color=series["color"], label=series["name"])  # the legend's, whatever is faint
        for point in series["points"]:
            heights = (np.array([point["mean"][name] for name in objectives]) - low) / span
            panel.plot(
                range(len(objectives)),
                heights,
                color=series["color"],
                alpha=0.7 if point["on_front"] else 0.25,
                linewidth=1.4,
            )
    for place, (bottom, top) in enumerate(zip(low, low + span, strict=True)):
        panel.axvline(place, color=INK, linewidth=0.9, zorder=3)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            panel.annotate(
                f"{bottom + share * (top - bottom):.3f}",
                (place, share),
                (5, 0),
                textcoords="offset points",
                fontsize="small",
                va="center",
                zorder=4,
                bbox=_BEHIND_NUMBERS,
            )
    panel.set_xticks(range(len(objectives)), [f"{name}  (better ↑)" for name in objectives])
    panel.set_yticks([])
    panel.set_frame_on(False)
    panel.tick_params(length=0)
    panel.margins(x=0.12)


def portfolio_png(least_eps: Mapping[int, float], size: int, unit: str) -> bytes:
    """Size of a portfolio against the least relative loss that so many members reach; `size` is marked."""
    with matplotlib.rc_context(_style(font_size=10.5)):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        panel = figure.subplots()
        FigureCanvasAgg(figure)
        panel.set_axisbelow(True)
        panel.grid(color=INK, alpha=0.12, linewidth=0.7)
        panel.plot(list(least_eps), [100 * eps for eps in least_eps.values()], "o-", color=SERIES_COLORS[0])
        if size in least_eps:
            panel.plot(size, 100 * least_eps[size], "o", color=SERIES_COLORS[1], markersize=10, zorder=4)
        panel.set_xticks(list(least_eps))
        panel.set_ylim(bottom=0)
        panel.set_xlabel("members of the portfolio")
        panel.set_ylabel("largest relative loss (%)")
        panel.set_title(unit, fontsize="small", wrap=True)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor=SURFACE)
    return buffer.getvalue()
