"""The picture of the front: every method with its error bars. Drawn with matplotlib, without a display."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from mahalo_ray.evaluation.results import FAMILY_OF, ComparisonTable, MethodKind, Row
from mahalo_ray.evaluation.statistics import Estimate
from mahalo_ray.metrics import FloatArray


class LabelledPoint(NamedTuple):
    """A point with its intervals, and the text to put beside it ("": none)."""

    text: str
    across: Estimate
    up: Estimate


def place_labels(panel: Axes, points: Sequence[LabelledPoint], lines: Sequence[FloatArray] = ()) -> None:
    """Annotate every point, in order; labels avoid points, error bars, `lines` [n, 2] and earlier labels.

    The figure must have been drawn and its layout fixed: places are compared in pixels.
    """
    to_pixels = panel.transData.transform
    taken = [obstacle for point in points for obstacle in _obstacles(panel, point)]
    for line in lines:
        for start, end in itertools.pairwise(to_pixels(line)):
            taken += [(Bbox([p - 1, p + 1]), 0.1) for p in np.linspace(start, end, 60)]
    centers = to_pixels([(point.across.value, point.up.value) for point in points])
    for point, own in zip(points, centers, strict=True):
        if not point.text:
            continue
        taken.append((_place(panel, point, own, centers, taken), 4.0))


def _place(
    panel: Axes, point: LabelledPoint, own: FloatArray, centers: FloatArray, taken: list[tuple[Bbox, float]]
) -> Bbox:
    """Put one label at its cheapest place; returns the pixels it covers."""
    renderer = panel.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = panel.get_window_extent(renderer).padded(-2)
    best: tuple[float, Annotation, Bbox] | None = None
    for order, place in enumerate(_places()):
        position = (point.across.value, point.up.value)
        text = panel.annotate(point.text, position, textcoords="offset points", fontsize="small", **place)
        box = text.get_window_extent(renderer).padded(3)
        inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
        cost = 0.02 * order + (0.0 if inside else 5.0) + 1.5 * _nearer_to_another(box, centers, own)
        cost += sum(weight for other, weight in taken if box.overlaps(other))
        if best is not None and cost >= best[0]:
            text.remove()
            continue
        if best is not None:
            best[1].remove()
        best = (cost, text, box)
    assert best is not None
    return best[2]


def _nearer_to_another(box: Bbox, centers: FloatArray, own: FloatArray) -> bool:
    """Whether a label would seem to belong to another point than its own (all in pixels)."""

    def distance(points: FloatArray) -> FloatArray:
        nearest = np.clip(points, [box.x0, box.y0], [box.x1, box.y1])
        return np.asarray(np.linalg.norm(points - nearest, axis=-1))

    return bool((distance(centers) < distance(own) - 1).any())


def _obstacles(panel: Axes, point: LabelledPoint) -> Iterator[tuple[Bbox, float]]:
    """What a label should not cover, in pixels, with its weight: the mark (most), then the error bars."""
    x, y = panel.transData.transform((point.across.value, point.up.value))
    left, bottom = panel.transData.transform((point.across.low, point.up.low))
    right, top = panel.transData.transform((point.across.high, point.up.high))
    reach = 0.05 * panel.figure.dpi
    yield Bbox.from_extents(x - reach, y - reach, x + reach, y + reach), 3.0
    yield Bbox.from_extents(left, y - 1, right, y + 1), 1.0
    yield Bbox.from_extents(x - 1, bottom, x + 1, top), 1.0


def _places() -> Iterator[dict[str, Any]]:
    """Places for a label around its point, the preferred ones first."""
    for distance in (6, 15, 28):
        for dx, dy, ha, va in (
            (1, 1, "left", "bottom"),
            (-1, -1, "right", "top"),
            (1, -1, "left", "top"),
            (-1, 1, "right", "bottom"),
            (1.4, 0, "left", "center"),
            (-1.4, 0, "right", "center"),
            (0, 1.4, "center", "bottom"),
            (0, -1.4, "center", "top"),
        ):
            yield {"xytext": (dx * distance, dy * distance), "ha": ha, "va": va}


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


BASELINES = tuple(kind for kind, family in FAMILY_OF.items() if family != "mah_dpo")


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
        own = [row for row in table.rows if (row.in_sweep if kind == "weights" else row.kind == kind)]
        front = sorted([row.means[o].value for o in table.objectives] for row in own if row.on_front)
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
