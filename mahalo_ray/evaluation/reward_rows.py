"""Held-out rows from the files people have: step traces and preference pairs, told apart by their fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mahalo_ray.data.quarantine import BadRow
from mahalo_ray.data.readers import ReadPairs, read_pairs
from mahalo_ray.data.records import PreferencePair, StepTrace
from mahalo_ray.data.row_files import data_files, read_rows
from mahalo_ray.data.step_readers import ReadTraces, read_traces


class Rows(NamedTuple):
    """What was read; `bad` rows of `seen` in all."""

    traces: list[StepTrace]
    pairs: list[PreferencePair]
    bad: list[BadRow]
    seen: int


def read_held_out(
    paths: Sequence[str], objectives: Sequence[str], objective: str | None, row_format: str = "auto"
) -> Rows:
    """The rows of all files and folders. `objective` is that of rows that name none; pairs name theirs in the
    field `objective`. `row_format` is that of step traces. ValueError when there is nothing to read."""
    pairs, traces = ReadPairs(), ReadTraces()
    for number, path in enumerate(paths):
        fields = _first_fields(path)
        if {"chosen", "rejected"} <= fields:
            named = "objective" if objective is None else None
            read_pairs(path, "auto", objectives, objective, named, str(number), pairs)
        else:
            read_traces(path, row_format, objectives, objective, None, str(number), traces)
    return Rows(traces.traces, pairs.pairs, pairs.bad + traces.bad, pairs.rows + traces.seen)


def _first_fields(path: str) -> set[str]:
    """The fields of the first row that is one."""
    for file in data_files(path):
        for _, row in read_rows(file):
            if not isinstance(row, BadRow):
                return set(row)
    raise ValueError(f"'{path}' holds no rows")
