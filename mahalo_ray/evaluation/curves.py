"""Training curves as small inline SVG plots: plain polylines in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 240, 72  # of the plotting area, in SVG units
_MAX_POINTS = 400

History = Mapping[str, Sequence[Mapping[str, float | int | None]]]  # stage -> [{"step": 10, "loss": 2.3}, …]


class Curve(NamedTuple):
    """One metric of one stage, ready to draw."""

    metric: str
    polyline: str  # "x,y x,y …" within WIDTH x HEIGHT, y downwards
    first: float
    last: float
    low: float
    high: float
    steps: tuple[float, float]
    skipped: int  # values that are not finite: left out of the line, and said so


def curves(history: History) -> dict[str, list[Curve]]:
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
        f"{WIDTH * _share(step, min(steps), max(steps)):.1f},{HEIGHT * (1 - _share(value, low, high)):.1f}"
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
