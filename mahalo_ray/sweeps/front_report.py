"""`mahalo front`: fronts of finished runs in one table and one set of pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.spatial import Delaunay, QhullError

from mahalo_ray.config import Aggregation
from mahalo_ray.data import storage
from mahalo_ray.decoding.aggregation import best_point
from mahalo_ray.evaluation import plots
from mahalo_ray.evaluation.report import render_page
from mahalo_ray.evaluation.results import FAMILY_NAMES, MethodResult
from mahalo_ray.evaluation.statistics import (
    align,
    finite_or_none,
    hypervolume,
    non_dominated,
    percentile_interval,
)
from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps.front_metrics import (
    FrontBand,
    bootstrap_values,
    coefficient_of_variation,
    front_band,
    igd_plus,
    knee,
    max_min_ratio,
    probability_non_dominated,
    rank_agreement,
    segment_lengths,
    spread,
)
from mahalo_ray.sweeps.sweep_table import SWEEP, TRAINING_SWEEP, SweepTable

FORMAT = 1  # of front.json
OTHER_METHODS = "other methods"


@dataclass(frozen=True)
class FrontMember:
    """A policy of a front: what it reached with every student, and dialogues to read."""

    result: MethodResult
    samples: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class FrontLine:
    """Policies that belong together: a line of the picture."""

    name: str
    run: str
    members: tuple[FrontMember, ...] = field(repr=False)
    is_line: bool = True  # False: methods that were played beside the sweep, each for itself


def fronts_of_run(run: str, named: bool) -> list[FrontLine]:
    """The fronts of a finished run: its sweep's, one for each sampler and setting, and the methods and
    baselines that were played beside it.

    Args:
        run: the output folder of a run (a path or URL).
        named: whether the fronts' names begin with the run's, as they must where there are several runs.

    ValueError where the run has no finished sweep.
    """
    folder = storage.absolute(run)
    documents = [found for stage in (SWEEP, TRAINING_SWEEP) for found in _sweep_documents(folder, stage)]
    if not documents:
        raise ValueError(
            f"the run at '{run}' has no finished sweep ('{storage.join(folder, SWEEP)}'): run `mahalo sweep`"
        )
    prefix = f"{_run_name(folder)}: " if named else ""
    groups: dict[str, list[FrontMember]] = {}
    for name, document in documents:
        groups.setdefault(name, []).append(_member(document))
    for stage in ("evaluate", "compare/play"):
        url = storage.join(folder, stage, "methods.json")
        for document in storage.read_json(url) if storage.exists(url) else ():
            member = _member(document)
            family = member.result.family
            beside = FAMILY_NAMES[family] if family not in (None, "mah_dpo") else OTHER_METHODS
            groups.setdefault(beside, []).append(member)
    return [
        FrontLine(prefix + name, folder, tuple(members), is_line=name != OTHER_METHODS)
        for name, members in groups.items()
    ]


def _sweep_documents(folder: str, stage: str) -> list[tuple[str, dict[str, Any]]]:
    """(name of the front, what was kept of a point) of every point of the stage's sweep; of a sampler the
    last round. None without a sweep."""
    points = storage.join(folder, stage, "points.json")
    if not storage.exists(points):  # a sweep of an earlier version: the fixed list alone
        rows = storage.join(folder, stage, "methods.json")
        return [("fixed weights", d) for d in storage.read_json(rows)] if storage.exists(rows) else []
    documents = {document["result"]["name"]: document for document in storage.read_json(points)}
    found = []
    for point in SweepTable.of_run(folder, stage).played:
        setting = "" if point.guidance is None else f", K {point.num_candidates}"
        if point.guidance is not None and point.kind == "decoding":
            setting = f", guided {' / '.join(f'{w:.3g}' for w in point.guidance.values())}{setting}"
        if point.strength != 1:
            setting += f", strength {point.strength:g}"
        if point.temperature is not None:
            setting += f", temperature {point.temperature:g}"
        what = "weights" if point.kind == "decoding" else f"{point.kind} weights"
        if point.round == 0:
            found.append((f"fixed {what}{setting}", documents[point.method]))
        if point.last_round:
            found.append((f"{point.sampler} {what}{setting}", documents[point.method]))
    return found


def _run_name(folder: str) -> str:
    """The last part of the folder's name: runs of one configuration differ in it."""
    return folder.rstrip("/").rpartition("/")[2]


def _member(document: Mapping[str, Any]) -> FrontMember:
    samples = tuple(
        {
            "topic": sample["topic"],
            "outcome": sample["outcome"],
            "turns": [{"speaker": t["speaker"], "content": t["content"]} for t in sample["turns"]],
        }
        for sample in document["samples"]
    )
    return FrontMember(MethodResult.model_validate(document["result"]), samples)


class Measure(NamedTuple):
    """How fronts are measured: over which reference point, in which units, with which resamples."""

    reference: tuple[float, ...]  # in the objectives' own units
    scale: tuple[float, ...]  # every objective is divided by its own before distances and volumes
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 17


METRIC_TITLES = {
    "hypervolume": "hypervolume",
    "igd_plus": "IGD+",
    "spread": "spread",
    "cv": "CV of gaps",
    "max_min": "max/min gap",
    "tau": "tau",
}
EXPLAINED = {
    "hypervolume": "area (volume) between the reference point and the front; larger is better",
    "IGD+": "mean distance by which the front falls short of the best points of all fronts; 0 is best",
    "spread": "evenness and reach together (Zhou et al. 2006); 0 is best",
    "CV of gaps": "standard deviation over mean of the gaps between neighbouring points, noise taken out of "
    "the gaps; 0 is even",
    "max/min gap": "largest over smallest of these gaps; 1 is even, none where two points coincide",
    "tau": "rank agreement of asked weights and reached values (Kendall's tau, mean over objectives); 1: "
    "more weight always brought more",
    "knee": "the point farthest out between the ends",
}


def measure_fronts(
    fronts: Sequence[FrontLine],
    reference: Mapping[str, float] | None = None,
    scale: str = "none",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 17,
) -> dict[str, Any]:
    """The document of `front.json`: every front's points, figures and band, with bootstrap intervals over
    students (the same draw for all fronts that met the same students).

    Args:
        reference: of hypervolumes, by objective; None: 0 for all.
        scale: "none": the objectives' own units; "range": every objective is divided by its range over all
            points.

    ValueError where the fronts have different objectives.
    """
    objectives = _common_objectives(fronts)
    values = [_values(front, objectives) for front in fronts]
    means = [array.mean(axis=0) for array in values]
    given = dict.fromkeys(objectives, 0.0) if reference is None else reference
    if set(given) != set(objectives):
        raise ValueError(
            f"the reference point names {', '.join(given)}: it needs every objective "
            f"({', '.join(objectives)}) once"
        )
    origin = tuple(given[name] for name in objectives)
    spread = np.ptp(np.concatenate(means), axis=0)
    divisor = np.where(spread > 0, spread, 1.0) if scale == "range" else np.ones(len(objectives))
    measure = Measure(origin, tuple(divisor.tolist()), confidence, resamples, seed)
    every = np.concatenate(means) / measure.scale
    best = every[non_dominated(every)]
    series = [
        _series(front, color, objectives, array, best, measure)
        for front, color, array in zip(fronts, itertools.cycle(plots.SERIES_COLORS), values, strict=False)
    ]
    runs = dict.fromkeys(_run_name(front.run) for front in fronts)
    students = sorted({len(array) for array in values})
    shown = " or ".join(map(str, students))
    point = ", ".join(f"{name} {value:g}" for name, value in zip(objectives, origin, strict=True))
    units = "objectives in their own units"
    if scale == "range":
        shown_scale = ", ".join(f"{n} by {d:.4g}" for n, d in zip(objectives, divisor, strict=True))
        units = f"objectives divided by their range over all points ({shown_scale})"
    document = {
        "format": FORMAT,
        "title": f"{_listed(objectives)}: {' and '.join(runs)}",
        "measured": f"Means over {shown} problems with {confidence:.0%} bootstrap intervals "
        f"({resamples} resamples of problems, seed {seed}).",
        "units": f"Reference point: {point}. Normalisation: {units}.",
        "objectives": list(objectives),
        "reference_point": list(origin),
        "scale": divisor.tolist(),
        "bootstrap": {"confidence": confidence, "resamples": resamples, "seed": seed},
        "metric_titles": METRIC_TITLES,
        "explained": EXPLAINED,
        "series": series,
    }
    cleaned: dict[str, Any] = finite_or_none(document)
    return cleaned


def _listed(objectives: Sequence[str]) -> str:
    if len(objectives) == 2:
        return " against ".join(objectives)
    return f"{', '.join(objectives[:-1])} and {objectives[-1]}"


def _mesh(weights: Sequence[Weights | None], objectives: Sequence[str]) -> list[list[int]] | None:
    """Triangles of points whose weights over three objectives are neighbours; None where they make none."""
    known = [index for index, vector in enumerate(weights) if vector is not None]
    if len(objectives) != 3 or len(known) < 3:
        return None
    corners = np.array([Weights(weights[index] or {}).over(objectives) for index in known])
    try:
        triangles = Delaunay(corners[:, :2]).simplices
    except QhullError:  # all on a line
        return None
    return [[known[corner] for corner in triangle] for triangle in triangles.tolist()]


def _common_objectives(fronts: Sequence[FrontLine]) -> tuple[str, ...]:
    objectives = tuple(fronts[0].members[0].result.values)
    for front in fronts:
        for member in front.members:
            if set(member.result.values) != set(objectives):
                raise ValueError(
                    f"'{front.name}' has the objectives {', '.join(member.result.values)}, and "
                    f"'{fronts[0].name}' {', '.join(objectives)}: only fronts of the same objectives can be "
                    "compared"
                )
    if len(objectives) < 2:
        raise ValueError(f"a front needs at least 2 objectives, and there is only {objectives[0]}")
    return objectives


def _values(front: FrontLine, objectives: Sequence[str]) -> FloatArray:
    """[students, points, objectives], in one order of students for all points."""
    order = front.members[0].result.student_ids
    return np.stack(
        [
            np.stack([align(m.result.student_ids, m.result.values[o], order) for o in objectives], axis=1)
            for m in front.members
        ],
        axis=1,
    )


def _series(
    front: FrontLine,
    color: str,
    objectives: Sequence[str],
    values: FloatArray,
    best: FloatArray,
    measure: Measure,
) -> dict[str, Any]:
    """One front as JSON, of values [students, points, objectives]. `best` are the non-dominated points of all
    fronts, in the measure's units."""
    means = values.mean(axis=0)
    errors = values.std(axis=0, ddof=1) / len(values) ** 0.5
    # The same seed draws the same students for every front that met as many of them.
    samples = bootstrap_values(values.swapaxes(0, 1), measure.resamples, measure.seed)
    weights = [_share(member, objectives) for member in front.members]
    figures = front_figures(means, errors, weights, objectives, best, measure)
    if not front.is_line:  # methods that make no front together
        figures = dict.fromkeys(figures, math.nan)
    resampled = [
        front_figures(sample, errors, weights, objectives, best, measure)
        for sample in (samples if front.is_line else ())
    ]
    survives = probability_non_dominated(samples)
    on_front = non_dominated(means)
    band = front_band(samples, measure.confidence) if front.is_line and len(objectives) == 2 else None
    points = []
    for index, member in enumerate(front.members):
        result = member.result
        ends = [percentile_interval(samples[:, index, k], measure.confidence) for k in range(len(objectives))]
        points.append(
            {
                "method": result.name,
                "weights": dict(weights[index] or {}) or None,
                "guidance": result.guidance,
                "num_candidates": result.num_candidates,
                "strength": result.strength,
                "temperature": result.temperature,
                "mean": dict(zip(objectives, means[index].tolist(), strict=True)),
                "low": {name: end[0] for name, end in zip(objectives, ends, strict=True)},
                "high": {name: end[1] for name, end in zip(objectives, ends, strict=True)},
                "n": len(result.student_ids),
                "on_front": bool(on_front[index]),
                "probability_non_dominated": float(survives[index]),
                "kl_to_reference": result.kl_to_reference,
                "malformed_rate": result.malformed_rate,
                "tokens": result.tokens,
                "samples": list(member.samples),
            }
        )
    return {
        "name": front.name,
        "run": front.run,
        "color": color,
        "is_line": front.is_line,
        "points": points,
        "metrics": {
            name: _with_interval(value, [one[name] for one in resampled], measure.confidence)
            for name, value in figures.items()
        },
        "knee": front.members[knee(means)].result.name if front.is_line and len(means) > 2 else None,
        "band": None if band is None else _rows_of(band),
        "mesh": _mesh(weights, objectives) if front.is_line else None,
    }


def front_figures(
    points: FloatArray,
    errors: FloatArray,
    weights: Sequence[Weights | None],
    objectives: Sequence[str],
    best: FloatArray,
    measure: Measure,
) -> dict[str, float]:
    """The figures (`METRIC_TITLES`) of a front's points [n, objectives] and their standard errors; NaN where
    one is not defined."""
    scale = np.array(measure.scale)
    scaled = points / scale
    lengths = segment_lengths(scaled, errors / scale)
    asked = [vector for vector in weights if vector is not None]
    agreement = rank_agreement(asked, points, objectives) if len(asked) == len(points) else {}
    defined = [value for value in agreement.values() if not math.isnan(value)]
    return {
        "hypervolume": hypervolume(scaled, np.array(measure.reference) / scale),
        "igd_plus": igd_plus(scaled, best),
        "spread": spread(scaled),
        "cv": coefficient_of_variation(lengths),
        "max_min": max_min_ratio(lengths),
        "tau": float(np.mean(defined)) if defined else math.nan,
    }


def _rows_of(band: FrontBand) -> list[list[float]]:
    """(first objective, low, high) wherever the front reaches."""
    reached = np.isfinite(band.low) & np.isfinite(band.high)
    return np.stack([band.at, band.low, band.high], axis=1)[reached].tolist()


def _with_interval(value: float, samples: Sequence[float], confidence: float) -> dict[str, float | None]:
    defined = [sample for sample in samples if math.isfinite(sample)]
    low, high = percentile_interval(defined, confidence) if defined else (None, None)
    return {"value": value, "low": low, "high": high}


def _share(member: FrontMember, objectives: Sequence[str]) -> Weights | None:
    """The weights that a policy was asked at: of the heads, else of the guidance."""
    vector = member.result.weights or member.result.guidance
    if vector is None:
        return None
    return Weights(dict(zip(objectives, Weights(vector).over(objectives), strict=True)))


class FrontFiles(NamedTuple):
    """Where the pictures and figures lie."""

    figures: str
    page: str
    picture: str


def write_fronts(folder: str, document: dict[str, Any]) -> FrontFiles:
    """Write `front.json`, `front.html` (one file, which asks no host for anything) and `front.png`."""
    files = FrontFiles(*(storage.join(folder, name) for name in ("front.json", "front.html", "front.png")))
    storage.write_json(files.figures, document)
    storage.write_bytes(files.page, render_page("front_page.html", document=document).encode())
    storage.write_bytes(files.picture, plots.fronts_png(document))
    return files


def print_fronts(console: Console, document: dict[str, Any]) -> None:
    """Every front's figures, and how they were measured."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    drawn.add_column("front", min_width=20, overflow="fold")
    drawn.add_column("points", justify="right")
    for title in document["metric_titles"].values():
        drawn.add_column(title, justify="right", no_wrap=True)
    lines = [front for front in document["series"] if front["is_line"]]
    for front in lines:
        figures = [_shown(front["metrics"][name]) for name in document["metric_titles"]]
        drawn.add_row(Text(front["name"]), str(len(front["points"])), *figures)
    console.print(drawn)
    for front in lines:
        if front["knee"]:
            console.print(f"Knee of {front['name']}: {front['knee']}", markup=False, highlight=False)
    console.print(document["measured"], document["units"], highlight=False)


def choose_point(document: Mapping[str, Any], weights: Weights | None, aggregation: Aggregation) -> str:
    """The best of all fronts' points at these weights (None: all alike), as a line of text; thresholds are in
    the objectives' own units. ValueError for an objective that the fronts do not have."""
    names = document["objectives"]
    points = [(front["name"], point) for front in document["series"] for point in front["points"]]
    values = [[point["mean"][name] for name in names] for _, point in points]
    front_name, point = points[best_point(values, names, weights, aggregation)]
    reached = ", ".join(
        f"{name} {point['mean'][name]:.3f} [{point['low'][name]:.3f}, {point['high'][name]:.3f}]"
        for name in names
    )
    missed = [
        f"{threshold.objective} {threshold.at_least:g}"
        for threshold in aggregation.thresholds
        if point["mean"][threshold.objective] < threshold.at_least
    ]
    unmet = f" (no point reaches {', '.join(missed)} as well: this comes nearest)" if missed else ""
    return f"Chosen: {point['method']} of {front_name}: {reached}{unmet}"


def _shown(figure: Mapping[str, float | None]) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return "–"
    interval = "" if low is None or high is None or low == high else f"\n[{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{interval}"
