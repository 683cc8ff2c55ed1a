"""Preference pairs in the formats people have, as our records.

trl      `prompt`, `chosen`, `rejected` as TRL takes them: text, or lists of messages, whose completions may
         repeat the prompt; without `prompt`, it is what both conversations begin with
mahalo   `question`, `chosen`, `rejected` as in the MAHALO code: the question is a text of turns, each opened
         by `Student:`, `Assistant:` (or User, Human, Tutor, Teacher) at its beginning or after a blank line

Both may have `id`, `dialogue` (else pairs whose conversations open alike count as one dialogue, which a
held-out split keeps together), `weight` and `margin` of the loss, and scores: `chosen_score` or
`score_chosen`, `rejected_score` or `score_rejected`, in the row or its `metadata`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from mahalo_ray.data.quarantine import BadRow
from mahalo_ray.data.records import Message, PreferencePair
from mahalo_ray.data.row_files import Row, data_files, read_rows

_ROLES: dict[str, Literal["user", "assistant"]] = {
    **dict.fromkeys(("student", "user", "human"), "user"),
    **dict.fromkeys(("assistant", "tutor", "teacher"), "assistant"),
}
_TURN = re.compile(rf"(?:\A|\n[ \t]*\n)\s*({'|'.join(_ROLES)}):[ \t]*", re.IGNORECASE)


@dataclass
class ReadPairs:
    """What was read. `rows` counts all rows; `left_out`, by objective, those of objectives not asked for."""

    pairs: list[PreferencePair] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class _Refused(ValueError):
    """Why a row is no preference pair."""


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

    `row_format`: "trl", "mahalo" or "auto" (by the fields of each row). Exactly one of `objective` (that of
    all rows) and `objective_field` (which field of a row names it) is given; rows of objectives outside
    `objectives` are left out and counted. A pair without an `id` gets "name/file:line". ValueError when there
    is nothing to read.
    """
    assert (objective is None) != (objective_field is None)
    seen = {pair.id for pair in into.pairs}
    for file in data_files(path):
        for line, row in read_rows(file):
            into.rows += 1
            if isinstance(row, BadRow):
                into.bad.append(row)
                continue
            try:
                own = objective or _text(row, str(objective_field))
                if own not in objectives:
                    into.left_out[own] = into.left_out.get(own, 0) + 1
                    continue
                pair = _pair(row, row_format, own, f"{name}/{posixpath.basename(file)}:{line}", path)
                if pair.id in seen:
                    raise _Refused(f"another row has the id '{pair.id}' too")
            except _Refused as error:
                into.bad.append(BadRow.of(file, line, str(error), row))
                continue
            seen.add(pair.id)
            into.pairs.append(pair)


def _pair(row: Row, row_format: str, objective: str, default_id: str, source: str) -> PreferencePair:
    chosen_format = row_format if row_format != "auto" else "mahalo" if "question" in row else "trl"
    prompt, chosen, rejected = _FORMATS[chosen_format](row)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise _Refused(f"'{name}' is empty")
    if chosen == rejected:
        raise _Refused("'chosen' and 'rejected' are the same")
    if not prompt or not any(message.content.strip() for message in prompt):
        raise _Refused("the prompt is empty")
    metadata = row.get("metadata")
    places = [row, metadata] if isinstance(metadata, Mapping) else [row]
    own_dialogue = row.get("dialogue")
    extra = {name: row[name] for name in ("weight", "margin") if row.get(name) is not None}
    return _checked(
        extra,
        dialogue=_opening(prompt) if own_dialogue is None else str(own_dialogue),
        id=default_id if row.get("id") is None else str(row["id"]),
        objective=objective,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=_score(places, "chosen"),
        rejected_score=_score(places, "rejected"),
        source=source,
    )


def _checked(extra: Row, **fields: Any) -> PreferencePair:
    """The pair with the loss's own numbers, as the record accepts them."""
    try:
        return PreferencePair(**fields, **extra)
    except ValidationError as error:
        first = error.errors()[0]
        raise _Refused(f"'{first['loc'][0]}' is {first['input']!r}: {first['msg']}") from error


def _opening(prompt: Sequence[Message]) -> str:
    """The same for all pairs cut from one conversation: what was said up to the user's first message."""
    first_user = next((n for n, message in enumerate(prompt) if message.role == "user"), len(prompt))
    said = [(message.role, message.content) for message in prompt[: first_user + 1]]
    return hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()


def _trl(row: Row) -> tuple[list[Message], str, str]:
    answers = [_field(row, name) for name in ("chosen", "rejected")]
    if all(isinstance(answer, str) for answer in answers):
        prompt = _field(row, "prompt")
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else _messages(prompt)
        return messages, answers[0], answers[1]
    chosen, rejected = (_messages(answer) for answer in answers)
    prompt = row.get("prompt")
    if prompt is None:
        both = zip(chosen, rejected, strict=False)
        messages = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    else:
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else _messages(prompt)
    return messages, _reply(messages, chosen, "chosen"), _reply(messages, rejected, "rejected")


def _reply(prompt: list[Message], conversation: list[Message], name: str) -> str:
    """The one assistant message that follows the prompt, whether or not the conversation repeats it."""
    rest = conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
    if len(rest) != 1 or rest[0].role != "assistant":
        raise _Refused(f"'{name}' must end the prompt with exactly one assistant message")
    return rest[0].content


def _mahalo(row: Row) -> tuple[list[Message], str, str]:
    return turns(_text(row, "question")), _text(row, "chosen"), _text(row, "rejected")


def turns(question: str) -> list[Message]:
    """The messages of a text of turns; a text that opens without a speaker is one user message. A last
    speaker without words only asks for the answer."""
    if not _TURN.match(question):
        return [Message(role="user", content=question.strip())]
    _, *parts = _TURN.split(question)
    spoken = zip(parts[::2], parts[1::2], strict=True)
    messages = [Message(role=_ROLES[who.lower()], content=text.strip()) for who, text in spoken]
    if messages[-1].role == "assistant" and not messages[-1].content:
        messages.pop()
    return messages


_FORMATS: dict[str, Callable[[Row], tuple[list[Message], str, str]]] = {"trl": _trl, "mahalo": _mahalo}


def _field(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise _Refused(f"'{name}' is missing")
    return row[name]


def _text(row: Row, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise _Refused(f"'{name}' is {type(value).__name__}, not text")
    return value


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise _Refused(f"{str(value)[:40]!r} is neither text nor a list of messages")
    try:
        return [Message.model_validate(message) for message in value]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _Refused(f"not a list of messages: {where}: {first['msg']}") from error


def _score(places: Sequence[Mapping[str, Any]], answer: str) -> float | None:
    """`chosen_score` or `score_chosen`, of the row or its metadata."""
    for place in places:
        for name in (f"{answer}_score", f"score_{answer}"):
            value = place.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise _Refused(f"'{name}' is {value!r}, not a finite number")
            return float(value)
    return None
