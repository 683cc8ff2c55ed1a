"""The picture of a reward model's figures: how well it orders, and how well its probabilities are meant."""

from __future__ import annotations

import io
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mahalo_ray.evaluation.plots import INK, SURFACE
from mahalo_ray.evaluation.reward_figures import ObjectiveFigures

_ORDERING = ("auc", "correct_against_wrong", "best_against_worst", "pairwise_accuracy", "outcome_auc")
_COLORS = ("#2f7de1", "#e0562b", "#c98500", "#8b62d0", "#2a9d6f", "#7b7f86", "#d13f8a")


def reward_png(results: Mapping[str, ObjectiveFigures]) -> bytes:
    """Left, per objective, the figures that are 0.5 by chance, with intervals; right the calibration curves
    of probabilities (that panel only where there are any)."""
    curves = {name: own.calibration for name, own in results.items() if own.calibration}
    figure = Figure(figsize=(10.5 if curves else 5.8, 0.5 + 0.32 * _rows(results) + 0.7), facecolor=SURFACE)
    figure.set_figheight(max(figure.get_figheight(), 4.4 if curves else 1.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    _draw_ordering(axes[0], results)
    if curves:
        _draw_calibration(axes[1], results)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _rows(results: Mapping[str, ObjectiveFigures]) -> int:
    return sum(name in own.figures for own in results.values() for name in _ORDERING)


def _draw_ordering(axes: Axes, results: Mapping[str, ObjectiveFigures]) -> None:
    labels: list[str] = []
    for color, (objective, own) in zip(_cycle(len(results)), results.items(), strict=True):
        for name in _ORDERING:
            if name not in own.figures:
                continue
            figure, at = own.figures[name], len(labels)
            axes.plot([figure.low, figure.high], [at, at], color=color, linewidth=1.6)
            axes.plot([figure.value], [at], "o", color=color, markersize=5)
            labels.append(f"{objective}: {name.replace('_', ' ')} (n = {figure.n})")
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("share ordered rightly; 0.5 is chance", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)


def _draw_calibration(axes: Axes, results: Mapping[str, ObjectiveFigures]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    for color, (objective, own) in zip(_cycle(len(results)), results.items(), strict=True):
        if not own.calibration:
            continue
        x, y = [p.predicted for p in own.calibration], [p.observed for p in own.calibration]
        axes.plot(x, y, "-", color=color, linewidth=1.2, label=objective)
        most = max(point.samples for point in own.calibration)
        sizes = [8 + 60 * point.samples / most for point in own.calibration]
        axes.scatter(x, y, s=sizes, color=color)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("predicted probability (larger dots: more steps)", fontsize=9)
    axes.set_ylabel("share of positives", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)


def _cycle(count: int) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(count)]
