"""The comparison table for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mahalo_ray.evaluation.claims import Claim, headline
from mahalo_ray.evaluation.families import FamilyFront
from mahalo_ray.evaluation.results import ComparisonTable
from mahalo_ray.evaluation.statistics import Estimate

_OBJECTIVES_PER_TABLE = 2  # what fits beside the other columns


def print_table(console: Console, table: ComparisonTable) -> None:
    """Every method with mean and interval per objective; several tables where there are many."""
    for start in range(0, len(table.objectives), _OBJECTIVES_PER_TABLE):
        chunk = table.objectives[start : start + _OBJECTIVES_PER_TABLE]
        console.print(_table(table, chunk))
    front = table.sweep_front()
    if front is not None:
        volume = front.hypervolume
        console.print(
            f"Hypervolume of the sweep {_interval(volume)}, of all methods {table.hypervolume_of_all():.3f}, "
            f"over ({', '.join(f'{value:g}' for value in table.reference_point)}). "
            f"{table.dialogues} students, {table.confidence:.0%} intervals.",
            highlight=False,
        )


def print_families(console: Console, fronts: Sequence[FamilyFront]) -> None:
    """What every family of methods covers, against MAH-DPO at the same weight vectors, and what it takes."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    drawn.add_column("family")
    for title in (
        "vectors",
        "hypervolume",
        "MAH-DPO minus it",
        "highest\nKL",
        "training\nruns",
        "models",
        "stored",
    ):
        drawn.add_column(title, justify="right", no_wrap=True)
    for front in fronts:
        drawn.add_row(
            front.name,
            str(len(front.weights)),
            _interval(front.hypervolume),
            "" if front.difference is None else _interval(front.difference, signed=True),
            "–" if front.kl_to_reference is None else f"{front.kl_to_reference[1]:.3f}",
            str(front.cost.training_runs),
            str(front.cost.models),
            f"{front.cost.parameter_bytes / 1e6:.1f} MB",
        )
    console.print(drawn)


def print_claims(console: Console, claims: Sequence[Claim]) -> None:
    """The headline, then every claim with its verdict and figure."""
    failing = any(claim.required and not claim.holds for claim in claims)
    console.print(Text(headline(claims), style="bold red" if failing else "bold green"))
    for claim in claims:
        text = Text(f"{'✓' if claim.holds else '✗'} {claim.words}", style="" if claim.holds else "red")
        console.print(Padding(text, (0, 0, 0, 2 if claim.required else 4)))


def _table(table: ComparisonTable, objectives: Sequence[str]) -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    drawn.add_column("method", max_width=25, overflow="fold")
    for objective in objectives:
        drawn.add_column(Text(objective), justify="right", no_wrap=True)
    drawn.add_column("KL", justify="right", no_wrap=True)
    drawn.add_column("mal-\nformed", justify="right", no_wrap=True)
    drawn.add_column("tokens", justify="right", no_wrap=True)
    drawn.add_column("front", justify="center", no_wrap=True)
    for row in table.rows:
        drawn.add_row(
            Text(row.name),
            *(_interval(row.means[objective]) for objective in objectives),
            "–" if row.kl_to_reference is None else f"{row.kl_to_reference:.3f}",
            f"{row.malformed_rate:.1%}",
            compact_count(row.tokens),
            "yes" if row.on_front else "",
        )
    return drawn


def _interval(estimate: Estimate, signed: bool = False) -> Text:
    form = "+.3f" if signed else ".3f"
    return Text(f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]")


def compact_count(count: int) -> str:
    """31400 -> `31k`, 2500000 -> `2.5M`."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"
