"""A reward model's figures as files and as a table; a unified model beside dedicated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mahalo_ray.data import storage
from mahalo_ray.data.quarantine import QUARANTINE, quarantine
from mahalo_ray.data.scored import HELD_OUT_PAIRS, HELD_OUT_TRACES, ScoredPair, ScoredTrace
from mahalo_ray.evaluation.resampling import Resampling
from mahalo_ray.evaluation.reward_figures import (
    ObjectiveFigures,
    OutputKind,
    choose_threshold,
    objective_figures,
)
from mahalo_ray.evaluation.reward_plot import reward_png
from mahalo_ray.evaluation.reward_rows import read_held_out
from mahalo_ray.evaluation.reward_scoring import Scored, score_rows
from mahalo_ray.evaluation.statistics import finite_or_none
from mahalo_ray.models.scoring import StepScorer
from mahalo_ray.objectives import unknown_name

RESULTS, PICTURE = "reward.json", "reward.png"

# What a figure says, for tables; in the order they are shown.
MEANINGS = {
    "auc": "AUC of steps",
    "accuracy": "accuracy at 0.5",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "correlation": "correlation with the label",
    "mean_squared_error": "mean squared error",
    "correct_against_wrong": "correct above wrong, same prompt",
    "rank_correlation": "rank correlation, same prompt and step",
    "best_against_worst": "best above worst, same prompt and step",
    "length_correlation_score": "correlation of score and length",
    "length_correlation_truth": "correlation of truth and length",
    "outcome_auc": "AUC of outcomes (last step)",
    "outcome_correlation": "correlation with the outcome",
    "best_of_n_lift": "lift of best of n over random",
    "first_error_f1": "first-error F1",
    "first_error_f1_random": "first-error F1 of guessing",
    "pairwise_accuracy": "pairwise accuracy",
}


def held_out_report(model_url: str, kinds: Mapping[str, OutputKind]) -> dict[str, ObjectiveFigures]:
    """Figures on the rows that were held out when the model was trained; no model is loaded."""
    traces = ScoredTrace.from_table(storage.read_file(storage.join(model_url, HELD_OUT_TRACES)))
    pairs = ScoredPair.from_table(storage.read_file(storage.join(model_url, HELD_OUT_PAIRS)))
    return {name: objective_figures(traces, pairs, name, kind, Resampling()) for name, kind in kinds.items()}


def evaluate_scorer(
    scorer: StepScorer,
    data: Sequence[str],
    objective: str | None,
    row_format: str,
    threshold_from: Sequence[str],
    folder: str,
    batch_size: int = 16,
    max_bad_fraction: float = 0.01,
) -> dict[str, ObjectiveFigures]:
    """Score the rows of `data` and write the report to `folder`; bad rows go to its quarantine.parquet.

    `objective`: of rows that name none; with it, only this one is looked at. The first error is found where
    `threshold_from` gives other data to choose its threshold on.
    """
    if objective is not None and objective not in scorer.objectives:
        raise ValueError(unknown_name("objective", objective, scorer.objectives))
    names = scorer.objectives if objective is None else (objective,)
    scored = _scored(scorer, data, names, objective, row_format, folder, batch_size, max_bad_fraction)
    thresholds = {}
    if threshold_from:
        other = _scored(
            scorer,
            threshold_from,
            names,
            objective,
            row_format,
            storage.join(folder, "threshold"),
            batch_size,
            max_bad_fraction,
        )
        thresholds = {
            name: choose_threshold(other.traces, name)
            for name in names
            if any(name in trace.labels for trace in other.traces)
        }
    results = {
        name: objective_figures(
            scored.traces, scored.pairs, name, scorer.output_kinds[name], Resampling(), thresholds.get(name)
        )
        for name in names
    }
    if not any(own.figures for own in results.values()):
        raise ValueError(f"the data hold no labels, outcomes or pairs of {', '.join(names)}")
    notes = {"data": list(data), "traces": len(scored.traces), "pairs": len(scored.pairs)}
    notes |= {"cut": scored.cut, "thresholds": thresholds, "threshold_from": list(threshold_from)}
    write_report(folder, {name: own for name, own in results.items() if own.figures}, {}, notes)
    return results


def _scored(
    scorer: StepScorer,
    paths: Sequence[str],
    names: Sequence[str],
    objective: str | None,
    row_format: str,
    folder: str,
    batch_size: int,
    max_bad_fraction: float,
) -> Scored:
    rows = read_held_out(paths, names, objective, row_format)
    quarantine(rows.bad, rows.seen, max_bad_fraction, storage.join(folder, QUARANTINE))
    return score_rows(scorer, rows.traces, rows.pairs, batch_size)


def write_report(
    folder: str,
    results: Mapping[str, ObjectiveFigures],
    dedicated: Mapping[str, ObjectiveFigures],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """`reward.json` and `reward.png` in `folder`; `dedicated`, by objective, are figures of other models on
    the same rows, `notes` go into the JSON as they are."""
    document: dict[str, Any] = {
        "notes": dict(notes or {}),
        "objectives": {name: own.as_json() for name, own in results.items()},
        "dedicated": {name: compared(results[name], own) for name, own in dedicated.items()},
    }
    storage.write_json(storage.join(folder, RESULTS), finite_or_none(document))
    storage.write_bytes(storage.join(folder, PICTURE), reward_png(results))


def compared(unified: ObjectiveFigures, dedicated: ObjectiveFigures) -> dict[str, Any]:
    """Both models' figures of one objective and their paired difference (unified - dedicated)."""
    found = {}
    for name, figure in unified.figures.items():
        other = dedicated.figures.get(name)
        if other is not None and other.n == figure.n:
            difference = figure.minus(other, Resampling().confidence)
            found[name] = {"dedicated": other.as_json(), "difference": difference.as_json()}
    return found


def print_report(console: Console, folder: str) -> None:
    """The tables of a written report."""
    document = storage.read_json(storage.join(folder, RESULTS))
    for objective, own in document["objectives"].items():
        compared_with = document["dedicated"].get(objective, {})
        console.print(_table(objective, own["figures"], compared_with))
        if own["auc_by_step"]:
            steps = [f"{step}: {cell(figure)}" for step, figure in own["auc_by_step"].items()]
            console.print("AUC by step or turn: " + "; ".join(steps), highlight=False)


def _table(objective: str, figures: Mapping[str, Any], compared_with: Mapping[str, Any]) -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=objective, title_justify="left")
    heads: Sequence[str] = ("figure", "value [95 %]", "n")
    if compared_with:
        heads = (*heads, "dedicated", "difference")
    for head in heads:
        drawn.add_column(head, justify="left" if head == "figure" else "right", no_wrap=True)
    for name, meaning in MEANINGS.items():
        if name not in figures:
            continue
        row = [meaning, cell(figures[name]), str(figures[name]["n"])]
        if name in compared_with:
            row += [cell(compared_with[name]["dedicated"]), cell(compared_with[name]["difference"])]
        drawn.add_row(*row)
    return drawn


def cell(figure: Mapping[str, Any]) -> str:
    """`0.712 [0.690, 0.733]`."""
    bounds = [figure["low"], figure["high"]]
    if any(bound is None or math.isnan(bound) for bound in bounds):
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
