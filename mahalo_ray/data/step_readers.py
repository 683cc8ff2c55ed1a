"""Step traces in the formats people have, as our records.

trl                `prompt`, `completions`, `labels` as TRL's PRM trainer takes them
mahalo             `question` (a text of turns), `response_steps`, `step_value` as in the MAHALO code
processbench       `problem`, `steps`, `label`: the first wrong step, -1 for none (steps after it: unknown)
big_bench_mistake  `input`, `steps`, `mistake_index`: the same, null for none
model_solutions    `question` and several fields with a `solution` and whether it `is_correct`
mathdial           MathDial: every teacher turn with what was said before, and whether the student solved it
conversation       steps as user messages, each answered by + or -
rated              a dialogue (`messages`, a `question` of turns, or prompt and `response`) and its `rating`
steps              our own records; or prompt (`question`, `problem`) and `steps`, with `labels` or without

All may have `id`, `group` (what is compared within; else equal prompts are one group) and `dialogue`.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mahalo_ray.data.quarantine import BadRow
from mahalo_ray.data.records import StepTrace
from mahalo_ray.data.row_fields import Refused, digest, opening, text_of
from mahalo_ray.data.row_files import Row, use_rows
from mahalo_ray.data.step_formats import FORMATS, Parsed, asked, format_of, reference_answer
from mahalo_ray.objectives import unknown_name

OutcomeLabels = Literal["last", "all"]


@dataclass
class ReadTraces:
    """What was read. `rows` counts lines, one may hold several traces; `places`: file and line by id."""

    traces: list[StepTrace] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    rows: int = 0
    places: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Traces and refused ones together: what a share of bad rows is a share of."""
        return len(self.traces) + len(self.bad)


@dataclass(frozen=True)
class _Mapping:
    """How labels of a source become labels of objectives."""

    objectives: Sequence[str]
    objective: str | None
    objective_field: str | None
    label_range: tuple[float, float]
    outcome_labels: OutcomeLabels
    gamma: float
    with_labels: bool


def read_traces(
    path: str,
    row_format: str,
    objectives: Sequence[str],
    objective: str | None,
    objective_field: str | None,
    name: str,
    into: ReadTraces,
    *,
    label_range: tuple[float, float] = (0.0, 1.0),
    outcome_labels: OutcomeLabels = "last",
    gamma: float = 1.0,
    with_labels: bool = True,
) -> None:
    """Add the traces of a file, folder or hub data set to `into`; rows that are none become its `bad` rows.

    `row_format`: "auto" (by the fields of each row) or a name above. Labels that name no objective of their
    own are of `objective`, or of the one that the row's `objective_field` names; one that is not among
    `objectives` is a bad row. Numbers must lie in `label_range`, which is mapped to 0..1. Where a format
    knows the outcome only, it becomes the label of the last step, or with `outcome_labels` "all" that of
    every step t of n, as gamma^(n-t) * outcome (one rollout of the step's value). `with_labels` False reads
    neither. A trace without an `id` gets "name/file:line". ValueError when there is nothing to read.
    """
    assert objective is None or objective_field is None
    if row_format != "auto" and row_format not in FORMATS:
        raise ValueError(unknown_name("format of steps", row_format, ("auto", *FORMATS)))
    mapping = _Mapping(
        objectives, objective, objective_field, label_range, outcome_labels, gamma, with_labels
    )

    def traces_of(row: Row, default_id: str) -> Iterator[StepTrace | Refused]:
        for one in FORMATS[format_of(row) if row_format == "auto" else row_format](row):
            try:
                yield _trace(row, one, mapping, default_id, path)
            except Refused as error:
                yield Refused(f"{one.part}: {error}") if one.part else error

    _collect(path, name, into, traces_of)


def read_prompts(path: str, name: str, into: ReadTraces) -> None:
    """Add the prompts of a file, folder or hub data set to `into`, as traces without steps: `prompt`,
    `question`, `problem` or `input`, and perhaps the reference `answer`, `ground_truth`, `target` or
    `solution`."""

    def trace_of(row: Row, default_id: str) -> Iterator[StepTrace]:
        prompt = asked(row)
        yield StepTrace(
            id=default_id if row.get("id") is None else str(row["id"]),
            group=digest(prompt),
            prompt=prompt,
            steps=[],
            labels={},
            source=path,
            answer=reference_answer(row),
        )

    _collect(path, name, into, trace_of)


def _collect(
    path: str, name: str, into: ReadTraces, traces_of: Callable[[Row, str], Iterable[StepTrace | Refused]]
) -> None:
    """Add what `traces_of` makes of every row (and its default id); what it refuses becomes bad rows."""
    seen = {trace.id for trace in into.traces}

    def use(row: Row, file: str, line: int) -> None:
        for found in traces_of(row, f"{name}/{posixpath.basename(file)}:{line}"):
            if isinstance(found, Refused):
                into.bad.append(BadRow.of(file, line, str(found), row))
            elif found.id in seen:
                into.bad.append(BadRow.of(file, line, f"another row has the id '{found.id}' too", row))
            else:
                seen.add(found.id)
                into.traces.append(found)
                into.places[found.id] = (file, line)

    into.rows += use_rows(path, use, into.bad, Refused)


def _trace(row: Row, parsed: Parsed, mapping: _Mapping, default_id: str, source: str) -> StepTrace:
    _check_steps(parsed.steps)
    if not mapping.with_labels:
        parsed = replace(parsed, labels={}, outcome={})
    outcome = {
        _objective(row, name, mapping): _label(value, "the outcome", mapping.label_range)
        for name, value in parsed.outcome.items()
        if value is not None
    }
    labels = {
        _objective(row, name, mapping): _labels(values, len(parsed.steps), mapping.label_range)
        for name, values in parsed.labels.items()
        if values is not None
    } or _labels_from_outcome(outcome, len(parsed.steps), mapping)
    own_id = default_id if row.get("id") is None else str(row["id"])
    dialogue = parsed.dialogue if row.get("dialogue") is None else row["dialogue"]
    if dialogue is None and len(parsed.prompt) > 1:
        dialogue = opening(parsed.prompt)
    return StepTrace(
        id=f"{own_id}/{parsed.part}" if parsed.part else own_id,
        group=str(row.get("group") or parsed.group or digest(parsed.prompt)),
        prompt=parsed.prompt,
        steps=parsed.steps,
        labels=labels,
        outcome=outcome or None,
        source=source,
        dialogue=None if dialogue is None else str(dialogue),
        answer=parsed.answer,
        **_tokens(parsed),
    )


def _check_steps(steps: Sequence[Any]) -> None:
    if not steps:
        raise Refused("there are no steps")
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise Refused(f"step {number} is {type(step).__name__}, not text")
        if not step.strip():
            raise Refused(f"step {number} is empty")


def _labels_from_outcome(
    outcome: Mapping[str, float], steps: int, mapping: _Mapping
) -> dict[str, list[float | None]]:
    unknown: list[float | None] = [None] * (steps - 1)
    if mapping.outcome_labels == "last":
        return {name: [*unknown, z] for name, z in outcome.items()}
    discounts = [mapping.gamma ** (steps - t) for t in range(1, steps + 1)]
    return {name: [discount * z for discount in discounts] for name, z in outcome.items()}


def _objective(row: Row, name: str | None, mapping: _Mapping) -> str:
    if name is None:
        name = mapping.objective
        if mapping.objective_field is not None:
            name = text_of(row, mapping.objective_field)
        if name is None:
            raise Refused("its labels name no objective: say which ('objective' or 'objective_field')")
    if name not in mapping.objectives:
        raise Refused(unknown_name("objective", name, mapping.objectives))
    return name


def _labels(values: Any, steps: int, label_range: tuple[float, float]) -> list[float | None]:
    if not isinstance(values, list):
        raise Refused(f"its labels are {type(values).__name__}, not a list")
    if len(values) != steps:
        raise Refused(f"{steps} steps, but {len(values)} labels")
    return [
        None if value is None else _label(value, f"the label of step {number}", label_range)
        for number, value in enumerate(values, start=1)
    ]


def _label(value: Any, what: str, label_range: tuple[float, float]) -> float:
    """In 0..1: a boolean as it is, a number from its place in the range."""
    if isinstance(value, bool):
        return float(value)
    low, high = label_range
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise Refused(f"{what} is {value!r}: it must be a number from {low:g} to {high:g}")
    return (value - low) / (high - low)


def _tokens(parsed: Parsed) -> Mapping[str, Any]:
    """Token positions of our own records: all three fields or none."""
    if not parsed.tokens:
        return {}
    positions = [parsed.tokens.get(name) for name in ("step_starts", "step_ends")]
    if "token_ids" not in parsed.tokens or any(p is None or len(p) != len(parsed.steps) for p in positions):
        raise Refused(
            "'token_ids', 'step_starts' and 'step_ends' belong together, one position of each per step"
        )
    return parsed.tokens
