"""The table of a sweep: one row per policy that was played, as one Parquet file in the finished run.

Serving, the pictures of fronts and portfolios read it; nothing of it needs a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mahalo_ray.data import storage
from mahalo_ray.evaluation.results import compact_count
from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights

FILE = "front.parquet"  # in the folder of the stage
SWEEP, TRAINING_SWEEP = "sweep", "training_sweep"  # the stages of a run that may stand side by side
FORMAT = "1"
# Field of a point -> prefix of its columns, one per objective: `weight_accuracy`, `mean_accuracy`.
_BY_OBJECTIVE = {
    "weights": "weight_",
    "guidance": "guidance_",
    "mean": "mean_",
    "standard_error": "standard_error_",
    "low": "low_",
    "high": "high_",
}


class SweepPoint(BaseModel):
    """One policy of a sweep and what it reached. A point whose trial failed has no figures (None, n = 0)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    """Name of the policy, unique in the table."""

    kind: str
    """What its weights weigh: `decoding` (the policy's heads), `guidance` or `training`."""

    weights: dict[str, float]
    """Decoding weights of the heads; for `training` those it was trained and is decoded with."""

    guidance: dict[str, float] | None = None
    """Weights over the reward model's objectives; None: not guided."""

    num_candidates: Annotated[int, Field(ge=1)] = 1
    """Candidates per step."""

    strength: float = 1.0
    """Decoding strength: 0 is the SFT model, 1 the policy."""

    temperature: float | None = None
    """Temperature of sampling; None: that of the evaluation."""

    sampler: str | None = None
    """What asked for it; None: the fixed list alone."""

    round: int = 0
    """The sampler's round that asked for it first; 0: the fixed list."""

    last_round: bool = False
    """Whether it is one of the points that are to lie evenly: those of the sampler's last round, with
    `surface` those of all its rounds."""

    mean: dict[str, float] | None = None
    """Mean over students of every objective."""

    standard_error: dict[str, float] | None = None
    """Standard error of these means."""

    low: dict[str, float] | None = None
    """Lower ends of the bootstrap intervals."""

    high: dict[str, float] | None = None
    """Upper ends of the bootstrap intervals."""

    n: int
    """Dialogues (students)."""

    seed: int
    """The run's seed, which the students are made from."""

    tokens: int
    """Through the policy: prompts, replies and all candidates."""

    seconds: float
    """Wall time of playing it, on one actor."""

    training_seconds: float | None = None
    """Wall time of its own training; None: it was not trained for these weights."""

    training_steps: int | None = None
    """Optimizer steps of its own training."""

    steps_from_sft: int | None = None
    """Optimizer steps from the SFT model to it, those of the policies that it went on from included."""

    started_from: str | None = None
    """Name of the policy that its training went on from."""

    model: str | None = None
    """Folder of the policy that was trained, as a path in the sweep's folder."""

    kl_to_reference: float | None = None
    """Nats per token to the SFT model."""

    malformed_rate: float | None = None
    """Share of its turns that are malformed."""


class SweepTable:
    """All points of a sweep, in the order they were asked for.

    Example, for a finished run:
        >>> table = SweepTable.of_run("runs/quickstart")  # doctest: +SKIP
        >>> table.nearest(Weights.parse("accuracy=0.6,engagement=0.4")).method  # doctest: +SKIP
        'weights 0.5 / 0.5'
    """

    def __init__(self, objectives: Sequence[str], points: Sequence[SweepPoint]) -> None:
        self.objectives, self.points = tuple(objectives), tuple(points)

    @property
    def played(self) -> list[SweepPoint]:
        """The points that have figures."""
        return [point for point in self.points if point.mean is not None]

    @property
    def failed(self) -> list[str]:
        """Names of the points whose trials failed."""
        return [point.method for point in self.points if point.mean is None]

    def means(self) -> FloatArray:
        """[points, objectives]; NaN in the rows of failed points."""
        missing = dict.fromkeys(self.objectives, math.nan)
        rows = [[(point.mean or missing)[name] for name in self.objectives] for point in self.points]
        return np.array(rows, dtype=np.float64)

    def nearest(self, weights: Weights) -> SweepPoint:
        """The played point whose weights are nearest, by the sum of differences. ValueError where none was
        played."""
        asked = np.array(weights.over(self.objectives))
        if not self.played:
            raise ValueError("the sweep has no point with a result")
        vectors = np.array([Weights(point.weights).over(self.objectives) for point in self.played])
        return self.played[int(np.abs(vectors - asked).sum(axis=1).argmin())]

    def save(self, url: str) -> None:
        """Write one Parquet file, a column per figure and objective."""
        columns: dict[str, list[Any]] = {}
        for name in SweepPoint.model_fields:
            values = [getattr(point, name) for point in self.points]
            if name in _BY_OBJECTIVE:
                for objective in self.objectives:
                    columns[_BY_OBJECTIVE[name] + objective] = [
                        None if value is None else float(value.get(objective, 0.0)) for value in values
                    ]
            else:
                columns[name] = values
        metadata = {"format": FORMAT, "objectives": json.dumps(self.objectives)}
        table = pa.table({name: pa.array(values, _type_of(name)) for name, values in columns.items()})
        storage.write_table(url, table.replace_schema_metadata(metadata))

    @classmethod
    def load(cls, url: str) -> SweepTable:
        """Read what `save` wrote. ValueError naming the file if it is something else."""
        table = storage.read_file(url)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"'{url}' is no table of a sweep of format {FORMAT} (it says {metadata.get('format')})"
            )
        objectives = json.loads(metadata["objectives"])
        points = []
        for row in table.to_pylist():
            values = {name: row[name] for name in SweepPoint.model_fields if name in row}
            for name, prefix in _BY_OBJECTIVE.items():
                figures = {objective: row[prefix + objective] for objective in objectives}
                values[name] = None if None in figures.values() else figures
            points.append(SweepPoint.model_validate(values))
        return cls(objectives, points)

    @classmethod
    def of_run(cls, run: str, stage: str = SWEEP) -> SweepTable:
        """The table of the finished run in the folder `run` (a path or URL); of `training_sweep`, that of the
        policies trained for each vector. ValueError where the run has none."""
        url = storage.join(storage.absolute(run), stage, FILE)
        if not storage.exists(url):
            raise ValueError(
                f"the run at '{run}' has no finished sweep ('{url}' is missing): run `mahalo sweep`"
            )
        return cls.load(url)


def _type_of(column: str) -> pa.DataType:
    types = {
        **dict.fromkeys(("method", "kind", "sampler", "started_from", "model"), pa.string()),
        **dict.fromkeys(
            ("num_candidates", "round", "n", "seed", "tokens", "training_steps", "steps_from_sft"), pa.int64()
        ),
        "last_round": pa.bool_(),
    }
    return types.get(column, pa.float64())


def print_sweep(console: Console, table: SweepTable) -> None:
    """Every point with mean and interval per objective, and what it cost."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    drawn.add_column("method", min_width=18, max_width=40, overflow="fold")
    trains = any(point.training_steps is not None for point in table.points)
    trained = ("trained from", "steps (from SFT)", "training s") if trains else ()
    for title in (*table.objectives, "n", "tokens", "seconds", "round", *trained):
        drawn.add_column(Text(title), justify="right", no_wrap=title != "trained from")
    for point in table.points:
        figures = [_figure(point, objective) for objective in table.objectives]
        cost = [str(point.n), compact_count(point.tokens), f"{point.seconds:.1f}"]
        drawn.add_row(
            Text(point.method),
            *map(Text, figures),
            *cost,
            f"{point.round}{'*' if point.last_round else ''}",
            *(map(Text, _training_of(point)) if trains else ()),
        )
    console.print(drawn)
    if any(point.last_round for point in table.points):
        console.print("* the sampler's last round", highlight=False)
    if table.failed:
        console.print(f"left out, as their trials failed: {', '.join(table.failed)}", markup=False)


def _training_of(point: SweepPoint) -> tuple[str, str, str]:
    if point.training_steps is None:
        return "–", "–", "–"
    steps = f"{point.training_steps} ({point.steps_from_sft})"
    return point.started_from or "–", steps, f"{point.training_seconds or 0:.0f}"


def _figure(point: SweepPoint, objective: str) -> str:
    if point.mean is None or point.low is None or point.high is None:
        return "–"
    return f"{point.mean[objective]:.3f} [{point.low[objective]:.3f}, {point.high[objective]:.3f}]"
