"""Fields that rows of all formats share: text, numbers, names, chat messages, prompts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from mahalo_ray.data.records import Message, Record

Row = dict[str, Any]


class RowError(ValueError):
    """Why a row cannot be used: it goes to the quarantine."""


_ROLES: dict[str, Literal["user", "assistant"]] = {
    **dict.fromkeys(("student", "user", "human"), "user"),
    **dict.fromkeys(("assistant", "tutor", "teacher"), "assistant"),
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_SPEAKER = re.compile(rf"(?:\A|\n[ \t]*\n)\s*({'|'.join(_ROLES)}):[ \t]*", re.IGNORECASE)


def require(row: Row, name: str) -> Any:
    """A field that must be there."""
    if row.get(name) is None:
        raise RowError(f"'{name}' is missing")
    return row[name]


def get_text(row: Row, name: str) -> str:
    """A field that must be text."""
    value = require(row, name)
    if not isinstance(value, str):
        raise RowError(f"'{name}' is {type(value).__name__}, not text")
    return value


def get_list(row: Row, name: str) -> list[Any]:
    """A field that must be a list."""
    value = require(row, name)
    if not isinstance(value, list):
        raise RowError(f"'{name}' is {type(value).__name__}, not a list")
    return value


def get_id(row: Row, default: str) -> str:
    """The row's `id` (text or a number) as text, or the default; also for `group` and `dialogue`."""
    return default if row.get("id") is None else as_name(row["id"], "id")


R = TypeVar("R", bound=Record)


def make_record(kind: type[R], **fields: Any) -> R:
    """A record of these fields; RowError naming the first that it does not take."""
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RowError(f"'{name}' is {show(first['input'])}: {first['msg']}") from error


def as_name(value: Any, name: str) -> str:
    """Text or a number that names something, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"'{name}' is {type(value).__name__}, neither text nor a number")
    return show(value) if not isinstance(value, str) else value


def show(value: Any, characters: int = 80) -> str:
    """A value for a message: short, and without fail."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= characters else f"{text[:characters]}..."


def is_finite(value: Any) -> bool:
    """Whether a value is a number (no bool) that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def to_finite(value: Any, name: str) -> float:
    """A finite number that is no bool."""
    if not is_finite(value):
        raise RowError(f"'{name}' is {show(value)}, not a finite number")
    return float(value)


def parse_messages(value: Any) -> list[Message]:
    """A list of chat messages, as the OpenAI API and data sets write them, ShareGPT's `from` and `value` too.

    `content` is text or a list of text parts. Other keys are taken where they say nothing (null, empty), and
    `name` is left out; anything else in them (tool calls, audio) is a RowError that names it.
    """
    if not isinstance(value, list):
        raise RowError(f"{show(value, 40)} is neither text nor a list of messages")
    return [_parse_message(message, number) for number, message in enumerate(value, start=1)]


def _parse_message(value: Any, number: int) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"not a list of messages: message {number} is {type(value).__name__}")
    if "from" in value and "role" not in value:
        speaker = value["from"]
        role = _SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        rest = {key: content for key, content in value.items() if key not in ("from", "value")}
        value = {"role": role, "content": value.get("value"), **rest}
    for key, content in value.items():
        if key not in ("role", "content", "name") and content not in (None, "", [], {}, False):
            raise RowError(f"message {number} has '{key}', which cannot be used here")
    role, content = value.get("role"), value.get("content")
    role = "system" if role == "developer" else role  # OpenAI's newer word
    if isinstance(content, list):
        content = "".join(_parse_part(part, number) for part in content)
    try:
        return Message.model_validate({"role": role, "content": content})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RowError(f"not a list of messages: {where}: {first['msg']} (message {number})") from error


def _parse_part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise RowError(f"message {number} has a part of type {show(kind, 40)}: only text can be used")
    return str(part["text"])


def parse_prompt(value: Any) -> list[Message]:
    """Text as one user message, or a list of messages; not without words."""
    prompt = [Message(role="user", content=value)] if isinstance(value, str) else parse_messages(value)
    if not any(message.content.strip() for message in prompt):
        raise RowError("the prompt is empty")
    return prompt


def split_turns(question: str) -> list[Message]:
    """The messages of a text of turns, each opened by its speaker (Student, User, Human; Assistant, Tutor,
    Teacher) and a colon; a text that opens without a speaker is one user message. A last speaker without
    words only asks for the answer."""
    if not _SPEAKER.match(question):
        return [Message(role="user", content=question.strip())]
    _, *parts = _SPEAKER.split(question)
    spoken = zip(parts[::2], parts[1::2], strict=True)
    turns = [Message(role=_ROLES[speaker.lower()], content=words.strip()) for speaker, words in spoken]
    if turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()
    return turns


def opening(conversation: Sequence[Message]) -> str:
    """A key that all rows cut from one conversation share: what was said up to the user's first message."""
    first_user = next((n for n, m in enumerate(conversation) if m.role == "user"), len(conversation))
    return digest(conversation[: first_user + 1])


def digest(conversation: Sequence[Message]) -> str:
    """The same for equal conversations, and for no others."""
    said = [(message.role, message.content) for message in conversation]
    return hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()
