"""How the cost of guided decoding grows with candidates, requests at once and prompt length, as a picture.

    python benchmarks/decoding_growth.py --output growth.json --picture growth.png

One thing grows at a time, the others stay at K = 5, one request, 100 tokens of prompt. The reward model has
the policy's shape; the answers are always as long as asked for.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decoding_task import Models, Task
from decoding_variants import ours_at_once
from guided_decoding import CLOCKS, SIZES, clocked
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import machine, mib, table, write_results

GROWTH: dict[str, tuple[int, ...]] = {
    "candidates": (1, 2, 4, 8, 16, 32),
    "requests": (1, 2, 4, 8, 16, 32, 64),
    "prompt": (100, 250, 500, 1000, 2000, 4000),
}
USUAL = {"candidates": 5, "requests": 1, "prompt": 100}
_PHASES = {
    "prefill": "policy reads the prompt",
    "decode": "candidates",
    "score_first": "reward model reads prompt and first step",
    "score": "other steps scored",
    "fork_accept": "fork and accept",
}
_COLORS = ("#7b7f86", "#2f7de1", "#c98500", "#e0562b", "#8b62d0")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), default="1m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=40)
    parser.add_argument("--largest", type=int, default=4000, help="leave larger values out")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own choice")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine in use")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    parser.add_argument("--picture", type=Path, default=None, help="PNG")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.clock == "cpu" and options.threads != 1:
        raise SystemExit("--clock cpu adds up the time of all threads: use it with --threads 1")
    shape = replace(SIZES[options.model].shape, context=8192)
    models = Models.build(shape, torch.device("cpu"), torch.float32)
    models.clock = CLOCKS[options.clock]
    sizes = {name: getattr(options, name) for name in ("model", "steps", "step_tokens", "clock")}
    results: dict[str, Any] = {
        "benchmark": "decoding_growth",
        "machine": machine(),
        "sizes": sizes,
        "cells": [],
    }
    ours_at_once(models, [Task(8, 2, 2, 2, 1.0)])  # what happens once per process
    for grows, values in GROWTH.items():
        for value in values:
            if value <= options.largest:
                results["cells"].append({"grows": grows, **cell(models, USUAL | {grows: value}, options)})
                write_results(options.output, results)
                print(
                    f"{grows} {value}: {results['cells'][-1]['seconds']:.2f} s", file=sys.stderr, flush=True
                )
    print(report(results))
    if options.picture is not None:
        options.picture.write_bytes(draw(results))


def cell(models: Models, size: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    tasks = [
        Task(size["prompt"], size["candidates"], options.steps, options.step_tokens, 1.0, seed=number)
        for number in range(size["requests"])
    ]
    found = clocked(models, lambda: ours_at_once(models, tasks))
    output = size["requests"] * options.steps * options.step_tokens
    return {
        **size,
        "seconds": found.seconds,
        "output_tokens_per_second": output / found.seconds,
        "phases": found.phases,
        "policy_cache_bytes": found.policy_cache_bytes,
        "reward_cache_bytes": found.reward_cache_bytes,
    }


def report(results: dict[str, Any]) -> str:
    header = ["what grows", "s", "answer tokens/s", "policy cache", "PRM cache"]
    rows = [
        [
            f"{cell['grows']} {cell[cell['grows']]}",
            f"{cell['seconds']:.2f}",
            f"{cell['output_tokens_per_second']:.0f}",
            mib(cell["policy_cache_bytes"]),
            mib(cell["reward_cache_bytes"]),
        ]
        for cell in results["cells"]
    ]
    return table(header, rows)


def draw(results: dict[str, Any]) -> bytes:
    """A PNG: time by phase against each of the three; requests as time per request."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, grows in zip(figure.subplots(1, 3), GROWTH, strict=True):
        cells = [cell for cell in results["cells"] if cell["grows"] == grows]
        _stacked(axes, [cell[grows] for cell in cells], cells)
        axes.set_ylabel("s per answer")
    for axes, label in zip(
        figure.axes, ("candidates per step, K", "requests at once", "prompt, tokens"), strict=True
    ):
        axes.set_xlabel(label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=len(labels))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _stacked(axes: Axes, values: list[int], cells: list[dict[str, Any]]) -> None:
    bottom = [0.0] * len(cells)
    for (phase, label), color in zip(_PHASES.items(), _COLORS, strict=True):
        heights = [cell["phases"][phase] / cell["requests"] for cell in cells]
        axes.bar(range(len(cells)), heights, bottom=bottom, label=label, color=color, width=0.75)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(cells)), [str(value) for value in values])
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
