"""The picture of `guidance_by_k.py`: one panel per objective, one line per strategy, intervals as bars."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mahalo_ray.evaluation.statistics import mean_interval

_LINES = {
    ("turn", "argmax"): ("whole turns, argmax", "#2f7de1", "o", "-"),
    ("turn", "sample"): ("whole turns, sample", "#8b62d0", "s", "-"),
    ("sentence", "argmax"): ("sentences, argmax", "#e0562b", "^", "--"),
    ("sentence", "beam"): ("sentences, beam", "#c98500", "D", "--"),
    ("sentence", "dvts"): ("sentences, dvts", "#7b7f86", "v", "--"),
}
_SHIFT = 0.03  # lines side by side on the logarithmic axis, so that their bars can be told apart

OBJECTIVES = ("accuracy", "engagement")


def draw(results: dict[str, Any]) -> bytes:
    """A PNG."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(OBJECTIVES)), OBJECTIVES, strict=True):
        for number, ((steps, strategy), (label, color, shape, line)) in enumerate(_LINES.items()):
            cells = [c for c in results["cells"] if (c["steps"], c["strategy"]) == (steps, strategy)]
            if not cells:
                continue
            estimates = [mean_interval(cell["values"][name]) for cell in cells]
            axes.errorbar(
                [cell["candidates"] * (1 + _SHIFT * (number - 2)) for cell in cells],
                [e.value for e in estimates],
                yerr=[[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]],
                label=label,
                color=color,
                marker=shape,
                linestyle=line,
                markersize=5,
                linewidth=1.4,
                elinewidth=0.9,
            )
        known = sorted({cell["candidates"] for cell in results["cells"]})
        axes.set_xscale("log")
        axes.set_xticks(known, [str(k) for k in known])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("candidates per step, K")
        axes.set_title(name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
