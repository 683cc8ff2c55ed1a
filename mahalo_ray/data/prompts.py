"""Prompts to be answered: rows of JSON, JSON Lines or Parquet.

A row has `prompt` (text: one user message) or `messages` (a list of {role, content}), and may have `id`,
`weights` and `guidance` (objective -> number) and `seed` of its own. Other fields are left alone, but one
that looks like a misspelt option is refused.
"""

from __future__ import annotations

import difflib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mahalo_ray.data.records import Message
from mahalo_ray.data.rows import BadRow, Row, use_rows
from mahalo_ray.objectives import Weights

_OPTIONS = ("id", "prompt", "messages", "weights", "guidance", "seed")
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class PromptRow:
    """One prompt and where it stands, for the quarantine. None: as the job says."""

    id: str
    messages: tuple[Message, ...]
    weights: Weights | None
    guidance: Weights | None
    seed: int | None
    file: str
    line: int

    def bad(self, reason: str) -> BadRow:
        """The row as one that cannot be answered."""
        return BadRow.of(self.file, self.line, reason, json.dumps([m.model_dump() for m in self.messages]))


def read_prompts(path: str) -> tuple[list[PromptRow], list[BadRow]]:
    """The prompts of a file or folder, and the rows that are none. A prompt without an id gets "file:line".

    ValueError when there is nothing to read.
    """
    prompts: list[PromptRow] = []
    bad: list[BadRow] = []
    seen: set[str] = set()

    def use(row: Row, file: str, line: int) -> None:
        prompt = _prompt(row, file, line)
        if prompt.id in seen:
            raise ValueError(f"another row has the id '{prompt.id}' too")
        seen.add(prompt.id)
        prompts.append(prompt)

    use_rows(path, use, bad)
    if not prompts:
        first = f"; the first row: {bad[0].reason}" if bad else ""
        raise ValueError(f"'{path}' holds no prompts ({len(bad)} rows cannot be used{first})")
    return prompts, bad


def _prompt(row: Row, file: str, line: int) -> PromptRow:
    for name in row:
        if name not in _OPTIONS and (close := difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.85)):
            raise ValueError(f"unknown field '{name}'. Did you mean '{close[0]}'?")
    return PromptRow(
        id=f"{posixpath.basename(file)}:{line}" if row.get("id") is None else str(row["id"]),
        messages=_messages(row),
        weights=_weights(row, "weights"),
        guidance=_weights(row, "guidance"),
        seed=_seed(row),
        file=file,
        line=line,
    )


def _messages(row: Row) -> tuple[Message, ...]:
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError("give either 'prompt' or 'messages'")
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        messages = prompt
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' (or 'prompt') is neither text nor a list of messages")
    try:
        read = tuple(Message.model_validate(message) for message in messages)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"not a list of messages: {where}: {first['msg']}") from error
    if read[-1].role == "assistant":
        raise ValueError("the last message is the assistant's: there is nothing to answer")
    if not any(message.content.strip() for message in read):
        raise ValueError("the prompt is empty")
    return read


def _weights(row: Row, name: str) -> Weights | None:
    value: Any = row.get(name)
    if value is None:
        return None
    if isinstance(value, list):  # a map column of Parquet
        value = dict(value)
    if not isinstance(value, Mapping) or any(
        isinstance(number, bool) or not isinstance(number, int | float | None) for number in value.values()
    ):
        raise ValueError(f"'{name}' is {value!r}: give a number per objective")
    # A struct column of Parquet has every row's objectives, with nothing in them.
    return Weights({objective: number for objective, number in value.items() if number is not None})


def _seed(row: Row) -> int | None:
    seed = row.get("seed")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"'seed' is {seed!r}: it must be a whole number from 0 to {_MAX_SEED}")
    return seed
