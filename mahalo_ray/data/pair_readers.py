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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mahalo_ray.data.records import Message, PreferencePair
from mahalo_ray.data.row_fields import (
    Row,
    RowError,
    as_name,
    get_id,
    get_text,
    make_record,
    opening,
    parse_messages,
    parse_prompt,
    require,
    show,
    split_turns,
    to_finite,
)
from mahalo_ray.data.rows import BadRow, Place, ReadReport, RowLeftOut, UniqueIds, use_rows


@dataclass
class ReadPairs:
    """Pairs of one or several sources, and what became of every row in `report`.

    `left_out`: rows of objectives that were not asked for, by objective. `take`: what is done with a pair,
    instead of keeping it in `pairs`; a RowError that it raises puts the row into the quarantine.
    """

    pairs: list[PreferencePair] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)
    left_out: dict[str, int] = field(default_factory=dict)
    take: Callable[[PreferencePair], None] | None = None
    ids: UniqueIds = field(default_factory=UniqueIds)

    @property
    def bad(self) -> list[BadRow]:
        """The rows that cannot be used."""
        return self.report.bad

    @property
    def rows(self) -> int:
        """All rows that are there."""
        return self.report.rows

    def add(self, pair: PreferencePair, place: Place, source: str) -> None:
        """One pair more; its id is made unique (see `UniqueIds`)."""
        unique = self.ids.claim(pair.id, place, source)
        pair = pair if unique == pair.id else pair.model_copy(update={"id": unique})
        (self.take or self.pairs.append)(pair)


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

    def use(row: Row, place: Place) -> None:
        of_row = objective or get_text(row, str(objective_field))
        if of_row not in objectives:
            into.left_out[of_row] = into.left_out.get(of_row, 0) + 1
            raise RowLeftOut(f"objective {show(of_row)}")
        into.add(_pair(row, row_format, of_row, f"{name}/{place}", path), place, name)

    use_rows(path, use, into.report)


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
    extra = {name: row[name] for name in ("weight", "margin") if row.get(name) is not None}
    return make_record(
        PreferencePair,
        dialogue=opening(prompt) if row.get("dialogue") is None else as_name(row["dialogue"], "dialogue"),
        id=get_id(row, default_id),
        objective=objective,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=_score(places, "chosen"),
        rejected_score=_score(places, "rejected"),
        source=source,
        **extra,
    )


def _record(row: Row, objective: str) -> PreferencePair:
    """A row of `PreferencePair`'s own schema; Arrow's maps come as lists of (key, value)."""
    maps = {name: _as_dict(row[name]) for name in ("chosen_scores", "rejected_scores") if row.get(name)}
    return make_record(PreferencePair, **{**row, **maps, "objective": objective})


def _as_dict(value: Any) -> Any:
    pairs = isinstance(value, list) and all(isinstance(item, tuple) and len(item) == 2 for item in value)
    return dict(value) if pairs else value


def _trl(row: Row) -> tuple[list[Message], str, str]:
    answers = [require(row, name) for name in ("chosen", "rejected")]
    if all(isinstance(answer, str) for answer in answers):
        return parse_prompt(require(row, "prompt")), answers[0], answers[1]
    chosen, rejected = (parse_messages(answer) for answer in answers)
    prompt = row.get("prompt")
    if prompt is None:
        both = zip(chosen, rejected, strict=False)
        messages = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    else:
        messages = parse_prompt(prompt)
    return messages, _reply(messages, chosen, "chosen"), _reply(messages, rejected, "rejected")


def _reply(prompt: list[Message], conversation: list[Message], name: str) -> str:
    """The one assistant message that follows the prompt, whether or not the conversation repeats it."""
    rest = conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
    if len(rest) != 1 or rest[0].role != "assistant":
        raise RowError(f"'{name}' must end the prompt with exactly one assistant message")
    return rest[0].content


def _mahalo(row: Row) -> tuple[list[Message], str, str]:
    return split_turns(get_text(row, "question")), get_text(row, "chosen"), get_text(row, "rejected")


_FORMATS: dict[str, Callable[[Row], tuple[list[Message], str, str]]] = {"trl": _trl, "mahalo": _mahalo}


def _score(places: Sequence[Mapping[str, Any]], answer: str) -> float | None:
    """`chosen_score` or `score_chosen`, of the row or its metadata."""
    for place in places:
        for name in (f"{answer}_score", f"score_{answer}"):
            value = place.get(name)
            if value is not None:
                return to_finite(value, name)
    return None
