"""Labels beside the points of a plot, each where it covers the least."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from mahalo_ray.evaluation.statistics import Estimate, FloatArray


class Labelled(NamedTuple):
    """A point with its intervals, and the text to put beside it ("": none)."""

    text: str
    across: Estimate
    up: Estimate


def place_labels(panel: Axes, points: Sequence[Labelled], lines: Sequence[FloatArray] = ()) -> None:
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
    panel: Axes, point: Labelled, own: FloatArray, centers: FloatArray, taken: list[tuple[Bbox, float]]
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


def _obstacles(panel: Axes, point: Labelled) -> Iterator[tuple[Bbox, float]]:
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
