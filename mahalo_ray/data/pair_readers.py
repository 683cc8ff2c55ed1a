"""Preference pairs in the formats people have, as our records.

trl      `prompt`, `chosen`, `rejected` as TRL takes them: text, or lists of messages, whose completions may
         repeat the prompt; without `prompt`, it is what both conversations begin with
mahalo   `question`, `chosen`, `rejected` as in the MAHALO code: the question is a text of turns, each opened
         by `Student:`, `Assistant:` (or User, Human, Tutor, Teacher) at its beginning or after a blank line
records  pairs that this project wrote (Parquet of `PreferencePair`): taken as they are, token ids and all

The first two may have `id`, `dialogue` (else pairs whose conversations open alike count as one dialogue,
which a held-out split keeps together), `weight` and `margin` of the loss, and scores: `chosen_score` or
`score_chosen`, `rejected_score` or `score_rejected`, in the row or its `metadata`.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from mahalo_ray.data.records import Message, PreferencePair
from mahalo_ray.data.rows import (
    BadRow,
    Row,
    RowError,
    finite,
    messages_of,
    opening,
    prompt_of,
    required,
    text_of,
    turns,
    use_rows,
)


@dataclass
class ReadPairs:
    """What was read. `rows` counts all rows; `left_out`, by objective, those of objectives not asked for.

    `take`: what becomes of a pair, instead of being kept in `pairs`. A RowError that it raises makes the row
    a bad one.
    """

    pairs: list[PreferencePair] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    take: Callable[[PreferencePair], None] | None = None
    ids: set[str] = field(default_factory=set)

    def add(self, pair: PreferencePair) -> None:
        """One pair more; RowError if its id is not unique."""
        if pair.id in self.ids:
            raise RowError(f"another row has the id '{pair.id}' too")
        (self.take or self.pairs.append)(pair)
        self.ids.add(pair.id)


def read_pairs(
    path: str,
    row_format: str,
    objectives: Sequence[str],
    objective: str | None,
    objective_field: str | None,
    name: str,
    into: ReadPairs,
) -> None:
    """Add the pairs of a file or folder to `into`; rows that are none become its `bad` rows.

    `row_format`: "trl", "mahalo", "records" or "auto" (by the fields of each row). One of `objective` (of
    all rows) and `objective_field` (which field of a row names it) is given; rows of objectives outside
    `objectives` are left out and counted. A pair without an `id` gets "name/file:line". ValueError when there
    is nothing to read.
    """
    assert (objective is None) != (objective_field is None)

    def use(row: Row, file: str, line: int) -> None:
        own = objective or text_of(row, str(objective_field))
        if own not in objectives:
            into.left_out[own] = into.left_out.get(own, 0) + 1
            return
        pair = _pair(row, row_format, own, f"{name}/{posixpath.basename(file)}:{line}", path)
        into.add(pair)

    into.rows += use_rows(path, use, into.bad, RowError)


def _pair(row: Row, row_format: str, objective: str, default_id: str, source: str) -> PreferencePair:
    if row_format == "records" or (row_format == "auto" and "chosen_ids" in row):
        return _record(row, objective)
    chosen_format = row_format if row_format != "auto" else "mahalo" if "question" in row else "trl"
    prompt, chosen, rejected = _FORMATS[chosen_format](row)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise RowError(f"'{name}' is empty")
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are the same")
    if not prompt or not any(message.content.strip() for message in prompt):
        raise RowError("the prompt is empty")
    metadata = row.get("metadata")
    places = [row, metadata] if isinstance(metadata, Mapping) else [row]
    own_dialogue = row.get("dialogue")
    extra = {name: row[name] for name in ("weight", "margin") if row.get(name) is not None}
    return _checked(
        extra,
        dialogue=opening(prompt) if own_dialogue is None else str(own_dialogue),
        id=default_id if row.get("id") is None else str(row["id"]),
        objective=objective,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=_score(places, "chosen"),
        rejected_score=_score(places, "rejected"),
        source=source,
    )


def _record(row: Row, objective: str) -> PreferencePair:
    """A row of `PreferencePair`'s own schema; Arrow's maps come as lists of (key, value)."""
    scores = ("chosen_scores", "rejected_scores")
    maps = {name: dict(row[name]) for name in scores if row.get(name) is not None}
    try:
        return PreferencePair.model_validate({**row, **maps, "objective": objective})
    except ValidationError as error:
        first = error.errors()[0]
        raise RowError(f"not a pair that this project wrote: '{first['loc'][0]}': {first['msg']}") from error


def _checked(extra: Row, **fields: Any) -> PreferencePair:
    """The pair with the loss's own numbers, as the record accepts them."""
    try:
        return PreferencePair(**fields, **extra)
    except ValidationError as error:
        first = error.errors()[0]
        raise RowError(f"'{first['loc'][0]}' is {first['input']!r}: {first['msg']}") from error


def _trl(row: Row) -> tuple[list[Message], str, str]:
    answers = [required(row, name) for name in ("chosen", "rejected")]
    if all(isinstance(answer, str) for answer in answers):
        return prompt_of(required(row, "prompt")), answers[0], answers[1]
    chosen, rejected = (messages_of(answer) for answer in answers)
    prompt = row.get("prompt")
    if prompt is None:
        both = zip(chosen, rejected, strict=False)
        messages = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    else:
        messages = prompt_of(prompt)
    return messages, _reply(messages, chosen, "chosen"), _reply(messages, rejected, "rejected")


def _reply(prompt: list[Message], conversation: list[Message], name: str) -> str:
    """The one assistant message that follows the prompt, whether or not the conversation repeats it."""
    rest = conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
    if len(rest) != 1 or rest[0].role != "assistant":
        raise RowError(f"'{name}' must end the prompt with exactly one assistant message")
    return rest[0].content


def _mahalo(row: Row) -> tuple[list[Message], str, str]:
    return turns(text_of(row, "question")), text_of(row, "chosen"), text_of(row, "rejected")


_FORMATS: dict[str, Callable[[Row], tuple[list[Message], str, str]]] = {"trl": _trl, "mahalo": _mahalo}


def _score(places: Sequence[Mapping[str, Any]], answer: str) -> float | None:
    """`chosen_score` or `score_chosen`, of the row or its metadata."""
    for place in places:
        for name in (f"{answer}_score", f"score_{answer}"):
            value = place.get(name)
            if value is not None:
                return finite(value, name)
    return None
