"""Evaluate a reward model on held-out rows: read them, score them, and write `reward.json` and `reward.png`.

A unified model can be compared with dedicated ones on the same rows.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from mahalo_ray.data import storage
from mahalo_ray.data.pair_readers import ReadPairs, read_pairs
from mahalo_ray.data.records import (
    HELD_OUT_PAIRS,
    HELD_OUT_TRACES,
    PreferencePair,
    R,
    RecordTable,
    ScoredPair,
    ScoredTrace,
    StepTrace,
)
from mahalo_ray.data.row_files import QUARANTINE, FileError, data_files, read_rows
from mahalo_ray.data.rows import ReadReport, describe_account, quarantine
from mahalo_ray.data.step_readers import FORMATS, ReadTraces, read_traces
from mahalo_ray.decoding.cpu_matmul import OneDNNLinears
from mahalo_ray.evaluation.plots import INK, SURFACE
from mahalo_ray.evaluation.reward_metrics import (
    ObjectiveMetrics,
    choose_threshold,
    expected_best,
    objective_metrics,
)
from mahalo_ray.evaluation.statistics import Bootstrap, finite_or_none
from mahalo_ray.models.classifiers import SequenceClassifierScorer
from mahalo_ray.models.reward_heads import OutputKind
from mahalo_ray.models.scoring import StepScorer, TokenTrace, TraceScorer
from mahalo_ray.objectives import unknown_name
from mahalo_ray.training.pairs import cut_pair, split_key
from mahalo_ray.training.reward_data import token_trace

_ROWS_TOGETHER = 4096  # scored together: as objects, and as token ids
_ORDERING = ("auc", "correct_against_wrong", "best_against_worst", "pairwise_accuracy", "outcome_auc")
_COLORS = ("#2f7de1", "#e0562b", "#c98500", "#8b62d0", "#2a9d6f", "#7b7f86", "#d13f8a")


def reward_png(results: Mapping[str, ObjectiveMetrics]) -> bytes:
    """Left, per objective, the metrics that are 0.5 by chance, with intervals; right the calibration curves
    of probabilities (that panel only where there are any)."""
    curves = {name: result.calibration for name, result in results.items() if result.calibration}
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


def _rows(results: Mapping[str, ObjectiveMetrics]) -> int:
    return sum(name in result.metrics for result in results.values() for name in _ORDERING)


def _draw_ordering(axes: Axes, results: Mapping[str, ObjectiveMetrics]) -> None:
    labels: list[str] = []
    for color, (objective, result) in zip(_cycle(len(results)), results.items(), strict=True):
        for name in _ORDERING:
            if name not in result.metrics:
                continue
            estimate, line = result.metrics[name], len(labels)
            axes.plot([estimate.low, estimate.high], [line, line], color=color, linewidth=1.6)
            axes.plot([estimate.value], [line], "o", color=color, markersize=5)
            labels.append(f"{objective}: {name.replace('_', ' ')} (n = {estimate.n})")
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("share ordered rightly; 0.5 is chance", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)


def _draw_calibration(axes: Axes, results: Mapping[str, ObjectiveMetrics]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    for color, (objective, result) in zip(_cycle(len(results)), results.items(), strict=True):
        if not result.calibration:
            continue
        x, y = [p.predicted for p in result.calibration], [p.observed for p in result.calibration]
        axes.plot(x, y, "-", color=color, linewidth=1.2, label=objective)
        most = max(point.samples for point in result.calibration)
        sizes = [8 + 60 * point.samples / most for point in result.calibration]
        axes.scatter(x, y, s=sizes, color=color)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("predicted probability (larger dots: more steps)", fontsize=9)
    axes.set_ylabel("share of positives", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)


def _cycle(count: int) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(count)]


class Rows(NamedTuple):
    """What was read; `seen`: all rows and traces, the unusable ones in `report` included."""

    traces: RecordTable[StepTrace]
    pairs: RecordTable[PreferencePair]
    report: ReadReport
    seen: int


def read_held_out(
    paths: Sequence[str], objectives: Sequence[str], objective: str | None, row_format: str = "auto"
) -> Rows:
    """The rows of all files and folders. `objective` is that of rows that name none; pairs name theirs in the
    field `objective`. `row_format` is that of step traces. ValueError when there is nothing to read."""
    if row_format not in ("auto", *FORMATS):
        raise ValueError(unknown_name("format of steps", row_format, ("auto", *FORMATS)))
    rows = Rows(RecordTable(StepTrace), RecordTable(PreferencePair), ReadReport(), 0)
    pairs, traces = ReadPairs(take=rows.pairs.append), ReadTraces(take=rows.traces.append)
    for number, path in enumerate(paths):
        fields = _first_fields(path)
        if {"chosen", "rejected"} <= fields:
            named = "objective" if objective is None else None
            read_pairs(path, "auto", objectives, objective, named, str(number), pairs)
        else:
            read_traces(path, row_format, objectives, objective, None, str(number), traces)
    rows.report.add(pairs.report)
    rows.report.add(traces.report)
    return rows._replace(seen=pairs.rows + traces.seen)


def _first_fields(path: str) -> set[str]:
    """The fields of the first row that is one."""
    for file in data_files(path):
        with contextlib.suppress(FileError):  # which is named when all rows are read
            for _, row in read_rows(file):
                if isinstance(row, dict):
                    return set(row)
    raise ValueError(f"'{path}' holds no rows")


class Scored(NamedTuple):
    """`cut`: traces that lost steps, and pairs that lost tokens (see `cut_pair`), to the model's context."""

    traces: list[ScoredTrace]
    pairs: list[ScoredPair]
    cut: int


def score_rows(
    scorer: StepScorer,
    traces: Iterable[StepTrace],
    pairs: Iterable[PreferencePair],
    batch_size: int = 16,
) -> Scored:
    """Scores of all steps, and of both responses of pairs of the scorer's objectives.

    Traces longer than a model's context are cut at a step boundary; what has no step left is left out. A
    sequence classifier refuses what it cannot read (ValueError).
    """
    scored = Scored([], [], 0)
    asked = (pair for pair in pairs if pair.objective in scorer.objectives)
    blocks = itertools.zip_longest(_by_block(traces), _by_block(asked))
    for some_traces, some_pairs in blocks:
        block = _score_block(scorer, some_traces or [], some_pairs or [], batch_size)
        scored.traces.extend(block.traces)
        scored.pairs.extend(block.pairs)
        scored = scored._replace(cut=scored.cut + block.cut)
    return scored


def _by_block(records: Iterable[R]) -> Iterator[list[R]]:
    """Some records at a time: batches are made by length within them."""
    rest = iter(records)
    while block := list(itertools.islice(rest, _ROWS_TOGETHER)):
        yield block


def _score_block(
    scorer: StepScorer, traces: Sequence[StepTrace], pairs: Sequence[PreferencePair], batch_size: int
) -> Scored:
    if isinstance(scorer, TraceScorer):
        return _by_tokens(scorer, traces, pairs, batch_size)
    assert isinstance(scorer, SequenceClassifierScorer)
    asked = [(trace.prompt, trace.steps) for trace in traces]
    asked += [(pair.prompt, [text]) for pair in pairs for text in (pair.chosen, pair.rejected)]
    scores = scorer.score_batch(asked, batch_size)
    count = [[len(scorer.tokenizer(step)["input_ids"]) for step in trace.steps] for trace in traces]
    scored = [
        _scored_trace(trace, tokens, trace_scores)
        for trace, tokens, trace_scores in zip(traces, count, scores[: len(traces)], strict=True)
    ]
    return Scored(scored, _scored_pairs(pairs, scores[len(traces) :]), 0)


def _by_tokens(
    scorer: TraceScorer, traces: Sequence[StepTrace], pairs: Sequence[PreferencePair], batch_size: int
) -> Scored:
    limit, cut = scorer.max_length, 0
    read: list[tuple[StepTrace, TokenTrace]] = []
    for trace in traces:
        tokens = token_trace(trace, scorer.encoder)
        steps = sum(end < limit for end in tokens.ends)
        cut += steps < len(tokens.ends)
        if steps:
            read.append(
                (trace, TokenTrace(tokens.input_ids[:limit], tokens.starts[:steps], tokens.ends[:steps]))
            )
    answers = []
    for pair in pairs:
        (prompt, chosen), (_, rejected) = (
            _prompt_and_answer(pair, name, scorer) for name in ("chosen", "rejected")
        )
        kept = cut_pair(prompt, chosen, rejected, limit)
        cut += kept != (prompt, chosen, rejected)
        start = len(kept[0])
        answers += [TokenTrace(kept[0] + ids, [start], [start + len(ids) - 1]) for ids in kept[1:]]
    with OneDNNLinears(cast(nn.Module, scorer))():
        values = scorer.score_traces([tokens for _, tokens in read] + answers, batch_size)
    scores = [
        {name: steps[:, column].tolist() for column, name in enumerate(scorer.objectives)} for steps in values
    ]
    scored = []
    for (trace, tokens), trace_scores in zip(read, scores[: len(read)], strict=True):
        lengths = [end - start + 1 for start, end in zip(tokens.starts, tokens.ends, strict=True)]
        scored.append(_scored_trace(trace, lengths, trace_scores))
    return Scored(scored, _scored_pairs(pairs, scores[len(read) :]), cut)


def _prompt_and_answer(pair: PreferencePair, name: str, scorer: TraceScorer) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer called `name`."""
    ids = {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids}[name]
    if ids is not None and pair.prompt_ids is not None:
        return pair.prompt_ids, ids
    text = {"chosen": pair.chosen, "rejected": pair.rejected}[name]
    tokens = scorer.encoder.encode(pair.prompt, [text])
    return list(tokens.input_ids[: tokens.starts[0]]), list(tokens.input_ids[tokens.starts[0] :])


def _scored_trace(trace: StepTrace, tokens: Sequence[int], scores: dict[str, list[float]]) -> ScoredTrace:
    steps = len(tokens)
    labels = {name: values[:steps] for name, values in trace.labels.items()}
    # A trace that was cut has not reached its outcome.
    outcome = trace.outcome if steps == len(trace.steps) else None
    return ScoredTrace(
        id=trace.id,
        group=trace.group,
        dialogue=trace.dialogue or trace.group,
        turns_before=sum(message.role == "assistant" for message in trace.prompt),
        tokens=list(tokens),
        scores=scores,
        labels=labels,
        outcome=outcome,
    )


def _scored_pairs(
    pairs: Sequence[PreferencePair], scores: Sequence[dict[str, list[float]]]
) -> list[ScoredPair]:
    """Scores come in the order chosen, rejected, chosen ..."""
    return [
        ScoredPair(
            id=pair.id,
            dialogue=split_key(pair),
            objective=pair.objective,
            chosen=chosen[pair.objective][0],
            rejected=rejected[pair.objective][0],
        )
        for pair, chosen, rejected in zip(pairs, scores[0::2], scores[1::2], strict=True)
    ]


RESULTS, PICTURE = "reward.json", "reward.png"

CANDIDATES = (2, 3, 5, 9, 17)  # each doubles what K adds to the one candidate of an unguided answer

# The name of every metric in tables, in the order they are shown.
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
    "choice_gain": "label gained per std of score, same prompt and step",
    "length_correlation_score": "correlation of score and length",
    "length_correlation_truth": "correlation of truth and length",
    "outcome_auc": "AUC of outcomes (last step)",
    "outcome_correlation": "correlation with the outcome",
    "best_of_n_lift": "lift of best of n over random",
    "first_error_f1": "first-error F1",
    "first_error_f1_random": "first-error F1 of guessing",
    "pairwise_accuracy": "pairwise accuracy",
}


def held_out_report(model_url: str, kinds: Mapping[str, OutputKind]) -> dict[str, ObjectiveMetrics]:
    """Metrics on the rows that were held out when the model was trained; no model is loaded."""
    traces = ScoredTrace.from_table(storage.read_file(storage.join(model_url, HELD_OUT_TRACES)))
    pairs = ScoredPair.from_table(storage.read_file(storage.join(model_url, HELD_OUT_PAIRS)))
    return {name: objective_metrics(traces, pairs, name, kind, Bootstrap()) for name, kind in kinds.items()}


def evaluate_scorer(
    scorer: StepScorer,
    data: Sequence[str],
    objective: str | None,
    row_format: str,
    threshold_from: Sequence[str],
    folder: str,
    batch_size: int = 16,
    max_bad_fraction: float = 0.01,
) -> dict[str, ObjectiveMetrics]:
    """Score the rows of `data` and write the report to `folder`; bad rows go to its quarantine.parquet.

    `objective`: of rows that name none; with it, only this one is looked at. The first error is found where
    `threshold_from` gives other data to choose its threshold on.
    """
    if objective is not None and objective not in scorer.objectives:
        raise ValueError(unknown_name("objective", objective, scorer.objectives))
    names = scorer.objectives if objective is None else (objective,)
    scored, account = _scored(
        scorer, data, names, objective, row_format, folder, batch_size, max_bad_fraction
    )
    thresholds = {}
    if threshold_from:
        other, _ = _scored(
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
        name: objective_metrics(
            scored.traces, scored.pairs, name, scorer.output_kinds[name], Bootstrap(), thresholds.get(name)
        )
        for name in names
    }
    if not any(result.metrics for result in results.values()):
        raise ValueError(f"the data hold no labels, outcomes or pairs of {', '.join(names)}")
    notes = {"data": list(data), "traces": len(scored.traces), "pairs": len(scored.pairs)}
    notes |= {"cut": scored.cut, "thresholds": thresholds, "threshold_from": list(threshold_from)}
    notes["rows"] = account
    write_report(folder, {name: result for name, result in results.items() if result.metrics}, {}, notes)
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
) -> tuple[Scored, dict[str, Any]]:
    rows = read_held_out(paths, names, objective, row_format)
    url = storage.join(folder, QUARANTINE)
    quarantine(rows.report.bad, rows.seen, max_bad_fraction, url, "--max-bad-fraction", "traces and pairs")
    return score_rows(scorer, rows.traces, rows.pairs, batch_size), rows.report.as_json()


def write_report(
    folder: str,
    results: Mapping[str, ObjectiveMetrics],
    dedicated: Mapping[str, ObjectiveMetrics],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """`reward.json` and `reward.png` in `folder`; `dedicated`, by objective, are metrics of other models on
    the same rows, `notes` go into the JSON as they are."""
    document: dict[str, Any] = {
        "notes": dict(notes or {}),
        "objectives": {name: result.as_json() for name, result in results.items()},
        "dedicated": {name: compared(results[name], result) for name, result in dedicated.items()},
    }
    storage.write_json(storage.join(folder, RESULTS), finite_or_none(document))
    storage.write_bytes(storage.join(folder, PICTURE), reward_png(results))


def compared(unified: ObjectiveMetrics, dedicated: ObjectiveMetrics) -> dict[str, Any]:
    """Both models' metrics of one objective and their paired difference (unified - dedicated)."""
    both = {}
    for name, estimate in unified.metrics.items():
        other = dedicated.metrics.get(name)
        if other is not None and other.n == estimate.n:
            difference = estimate.minus(other, Bootstrap().confidence)
            both[name] = {"dedicated": other.as_json(), "difference": difference.as_json()}
    return both


def print_report(console: Console, folder: str) -> None:
    """The tables of a written report."""
    document = storage.read_json(storage.join(folder, RESULTS))
    if "rows" in document["notes"]:
        for line in describe_account(document["notes"]["rows"]):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for objective, result in document["objectives"].items():
        compared_with = document["dedicated"].get(objective, {})
        console.print(_metric_table(objective, result["figures"], compared_with))
        if result["auc_by_step"]:
            steps = [f"{step}: {cell(estimate)}" for step, estimate in result["auc_by_step"].items()]
            console.print("AUC by step or turn: " + "; ".join(steps), highlight=False)
        if "choice_gain" in result["figures"]:
            gained = result["figures"]["choice_gain"]["value"]
            gains = [f"{count}: {gained * expected_best(count):+.3f}" for count in CANDIDATES]
            console.print("Expected gain of the best-scored of K: " + "; ".join(gains), highlight=False)


def _metric_table(objective: str, metrics: Mapping[str, Any], compared_with: Mapping[str, Any]) -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=objective, title_justify="left")
    heads: Sequence[str] = ("metric", "value [95 %]", "n")
    if compared_with:
        heads = (*heads, "dedicated", "difference")
    for head in heads:
        drawn.add_column(head, justify="left" if head == "metric" else "right", no_wrap=True)
    for name, meaning in MEANINGS.items():
        if name not in metrics:
            continue
        row = [meaning, cell(metrics[name]), str(metrics[name]["n"])]
        if name in compared_with:
            row += [cell(compared_with[name]["dedicated"]), cell(compared_with[name]["difference"])]
        drawn.add_row(*row)
    return drawn


def cell(estimate: Mapping[str, Any]) -> str:
    """`0.712 [0.690, 0.733]`."""
    bounds = [estimate["low"], estimate["high"]]
    if any(bound is None or math.isnan(bound) for bound in bounds):
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
