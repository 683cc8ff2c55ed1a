"""Policies unguided and under every guide, as one table (MAHALO, arXiv 2510.01167, its main tables), and the
results of several seeds pooled into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mahalo_ray.evaluation.results import ComparisonTable, MethodResult
from mahalo_ray.evaluation.statistics import Estimate

UNGUIDED, SUM = "unguided", "sum"


class PlayedPolicy(NamedTuple):
    """A policy and the names of its methods: `by_guide` maps `unguided`, objectives and `sum` to them."""

    name: str
    by_guide: dict[str, str]


class Cell(BaseModel):
    """A policy under one guide. `relative`: the change from the unguided SFT model, as a share of its mean
    (0.1 is 10 % more); None where that mean is 0. `by_seed`: each seed's means, in the order of the seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    means: dict[str, Estimate]
    relative: dict[str, Estimate | None]
    by_seed: list[dict[str, float]]
    kl_to_reference: float | None
    malformed_rate: float
    tokens: int


class GuidedRow(BaseModel):
    """One policy, by guide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str
    cells: dict[str, Cell]


def guided_rows(
    table: ComparisonTable, policies: Sequence[PlayedPolicy], seeds: Sequence[ComparisonTable] = ()
) -> list[GuidedRow]:
    """A row per policy. `table` has all students; `seeds`: the tables of single seeds, where it pools them.

    Raises ValueError for a method that the table does not have.
    """
    sft = table.only("sft")
    if sft is None:
        raise ValueError("the table has no row of the SFT model, which the others are compared with")
    rows = {row.name: row for row in table.rows}
    return [
        GuidedRow(
            policy=policy.name,
            cells={
                guide: Cell(
                    method=name,
                    means=rows[name].means,
                    relative={o: table.relative_change(table.method(name), sft, o) for o in table.objectives},
                    by_seed=[one.method(name).means for one in seeds or [table]],
                    kl_to_reference=rows[name].kl_to_reference,
                    malformed_rate=rows[name].malformed_rate,
                    tokens=rows[name].tokens,
                )
                for guide, name in policy.by_guide.items()
            },
        )
        for policy in policies
    ]


def pooled(results_by_seed: Sequence[Sequence[MethodResult]]) -> list[MethodResult]:
    """The methods that every seed has played, each over the students of all seeds, in the first seed's order.

    KL and the share of malformed turns are means over seeds, tokens their sum. Intervals of a table of these
    resample students, not trainings: how far trainings differ shows seed by seed alone.
    """
    by_name = [{result.name: result for result in results} for results in results_by_seed]
    shared = [name for name in by_name[0] if all(name in results for results in by_name)]
    return [_pool([results[name] for results in by_name]) for name in shared]


def _pool(results: Sequence[MethodResult]) -> MethodResult:
    first = results[0]
    ids = [f"{seed}:{student}" for seed, result in enumerate(results) for student in result.student_ids]
    values = {name: [v for result in results for v in result.values[name]] for name in first.values}
    divergences = [r.kl_to_reference for r in results if r.kl_to_reference is not None]
    complete = len(divergences) == len(results)
    return MethodResult.model_validate(
        {
            **first.model_dump(),
            "student_ids": ids,
            "values": values,
            "kl_to_reference": sum(divergences) / len(results) if complete else None,
            "malformed_rate": sum(result.malformed_rate for result in results) / len(results),
            "tokens": sum(result.tokens for result in results),
        }
    )


def print_guided_rows(console: Console, rows: Sequence[GuidedRow], objectives: Sequence[str]) -> None:
    """A line per policy and guide: mean, interval and relative change of each objective."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("policy", "guided by"):
        drawn.add_column(name)
    for objective in objectives:
        drawn.add_column(Text(f"{objective}\n(change from SFT)"), justify="right", no_wrap=True)
    drawn.add_column("KL", justify="right")
    for row in rows:
        for number, (guide, cell) in enumerate(row.cells.items()):
            drawn.add_row(Text("" if number else row.policy), guide, *_figures(cell, objectives), _kl(cell))
    console.print(drawn)


def markdown_of(rows: Sequence[GuidedRow], objectives: Sequence[str]) -> str:
    """The same as a Markdown table, with each seed's means where there are several."""
    seeds = max(len(cell.by_seed) for row in rows for cell in row.cells.values())
    head = ["policy", "guided by", *(f"{o} (change from SFT)" for o in objectives), "KL"]
    head += [f"{o} by seed" for o in objectives] if seeds > 1 else []
    lines = [head, ["---"] * len(head)]
    for row in rows:
        for guide, cell in row.cells.items():
            line = [row.policy, guide, *_figures(cell, objectives), _kl(cell)]
            if seeds > 1:
                line += [", ".join(f"{means[o]:.3f}" for means in cell.by_seed) for o in objectives]
            lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(cell: Cell, objectives: Sequence[str]) -> Iterator[str]:
    for objective in objectives:
        mean, change = cell.means[objective], cell.relative[objective]
        share = "–" if change is None else f"{change.value:+.0%}"
        yield f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] ({share})"


def _kl(cell: Cell) -> str:
    return "–" if cell.kl_to_reference is None else f"{cell.kl_to_reference:.3f}"
