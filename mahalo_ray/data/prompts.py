"""Prompts to be answered: rows of JSON, JSON Lines or Parquet.

A row has `prompt` (text: one user message) or `messages` (a list of {role, content}); `question` (a text
that may hold turns), `problem` and `input` are read as well. It may have `id`, `weights` and `guidance`
(objective -> number) and `seed` of its own, and a reference answer (`answer`, `ground_truth`, `target` or
`solution`). Other fields are left alone, but one that looks like a misspelt option is refused.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from mahalo_ray.config.section import WeightVector
from mahalo_ray.data.records import MESSAGES, SCORES, Message, Record
from mahalo_ray.data.row_fields import (
    Row,
    RowError,
    as_name,
    get_id,
    is_finite,
    parse_messages,
    parse_prompt,
    show,
    split_turns,
)
from mahalo_ray.data.rows import BadRow, Place, ReadRecords, use_rows
from mahalo_ray.objectives import Weights

_PROMPT_FIELDS = ("prompt", "messages", "question", "problem", "input")
_ANSWER_FIELDS = ("answer", "ground_truth", "target", "solution")
_OPTIONS = ("id", "prompt", "messages", "weights", "guidance", "seed")
_MAX_SEED = 2**63 - 1


class PromptRow(Record):
    """One prompt and where it stands, for the quarantine. None: as the job says."""

    id: str
    messages: tuple[Message, ...]
    weights: WeightVector | None
    guidance: WeightVector | None
    seed: int | None
    answer: str | None
    file: str
    line: int

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("messages", MESSAGES),
            ("weights", SCORES),
            ("guidance", SCORES),
            ("seed", pa.int64()),
            ("answer", pa.string()),
            ("file", pa.string()),
            ("line", pa.int64()),
        ]
    )

    def bad(self, reason: str) -> BadRow:
        """The row as one that cannot be answered."""
        return BadRow.of(self.file, self.line, reason, json.dumps([m.model_dump() for m in self.messages]))


@dataclass
class ReadPrompts(ReadRecords[PromptRow]):
    """Prompts of one or several sources."""

    @property
    def prompts(self) -> list[PromptRow]:
        """The prompts that were kept."""
        return self.kept


def read_prompts(
    path: str, name: str = "", into: ReadPrompts | None = None, *, with_answers: bool = False
) -> ReadPrompts:
    """Add the prompts of a file or folder to `into`. A prompt without an id gets "name/file:line".

    `with_answers`: read the reference answers too. ValueError when there is nothing to read, or no row is a
    prompt.
    """
    read = ReadPrompts() if into is None else into
    before, bad_before = read.taken, len(read.bad)

    def use(row: Row, place: Place) -> None:
        default_id = f"{name}/{place}" if name else str(place)
        prompt = parse_prompt_row(row, default_id, place, with_answers)
        (read.take or read.prompts.append)(
            prompt.model_copy(update={"id": read.ids.claim(prompt.id, place, name)})
        )
        read.taken += 1

    use_rows(path, use, read.report)
    if read.taken == before:
        bad = read.bad[bad_before:]
        first = f"; the first row: {bad[0].reason}" if bad else ""
        raise ValueError(f"'{path}' holds no prompts ({len(bad)} rows cannot be used{first})")
    return read


def parse_prompt_row(row: Row, default_id: str, place: Place, with_answers: bool) -> PromptRow:
    """The prompt of one row; RowError if it is none."""
    for name in row:
        if name not in _OPTIONS and (close := difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.85)):
            raise RowError(f"unknown field '{name}'. Did you mean '{close[0]}'?")
    return PromptRow(
        id=get_id(row, default_id),
        messages=_parse_prompt_of(row),
        weights=_weights(row, "weights"),
        guidance=_weights(row, "guidance"),
        seed=_seed(row),
        answer=reference_answer(row) if with_answers else None,
        file=place.file,
        line=place.line,
    )


def _parse_prompt_of(row: Row) -> tuple[Message, ...]:
    given = [name for name in _PROMPT_FIELDS if row.get(name) is not None]
    if not given or {"prompt", "messages"} <= set(given):
        raise RowError("give either 'prompt' or 'messages'")
    name = given[0]
    value = row[name]
    if name == "messages" or isinstance(value, list):
        if not value:
            raise RowError(f"'{name}' is neither text nor a list of messages")
        messages = parse_messages(value)
    else:
        messages = (
            split_turns(value) if name == "question" and isinstance(value, str) else parse_prompt(value)
        )
    if not any(message.content.strip() for message in messages):
        raise RowError("the prompt is empty")
    if messages[-1].role == "assistant":
        raise RowError("the last message is the assistant's: there is nothing to answer")
    return tuple(messages)


def reference_answer(row: Row) -> str | None:
    """The reference answer as text, under any of its usual names."""
    name = next((name for name in _ANSWER_FIELDS if row.get(name) is not None), None)
    if name is None:
        return None
    return str(row[name]) if isinstance(row[name], bool) else as_name(row[name], name)


def _weights(row: Row, name: str) -> Weights | None:
    value: Any = row.get(name)
    if value is None:
        return None
    # A struct column of Parquet has every row's objectives, with nothing in them.
    given = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else None
    if given is None or not all(is_finite(number) for number in given.values()):
        raise RowError(f"'{name}' is {show(value)}: give a number per objective")
    try:
        return Weights(given)
    except ValueError as error:
        raise RowError(f"'{name}': {error}") from error


def _seed(row: Row) -> int | None:
    seed = row.get("seed")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MAX_SEED:
        raise RowError(f"'seed' is {show(seed)}: it must be a whole number from 0 to {_MAX_SEED}")
    return seed
