"""Fields of a row as what they must be; Refused says why a row cannot be used."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ValidationError

from mahalo_ray.data.records import Message
from mahalo_ray.data.row_files import Row

_ROLES: dict[str, Literal["user", "assistant"]] = {
    **dict.fromkeys(("student", "user", "human"), "user"),
    **dict.fromkeys(("assistant", "tutor", "teacher"), "assistant"),
}
_TURN = re.compile(rf"(?:\A|\n[ \t]*\n)\s*({'|'.join(_ROLES)}):[ \t]*", re.IGNORECASE)


class Refused(ValueError):
    """Why a row cannot be used."""


def required(row: Row, name: str) -> Any:
    """A field that must be there."""
    if row.get(name) is None:
        raise Refused(f"'{name}' is missing")
    return row[name]


def text_of(row: Row, name: str) -> str:
    """A field that must be text."""
    value = required(row, name)
    if not isinstance(value, str):
        raise Refused(f"'{name}' is {type(value).__name__}, not text")
    return value


def list_of(row: Row, name: str) -> list[Any]:
    """A field that must be a list."""
    value = required(row, name)
    if not isinstance(value, list):
        raise Refused(f"'{name}' is {type(value).__name__}, not a list")
    return value


def finite(value: Any, name: str) -> float:
    """A finite number that is no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"'{name}' is {value!r}, not a finite number")
    return float(value)


def messages_of(value: Any) -> list[Message]:
    """A list of chat messages."""
    if not isinstance(value, list):
        raise Refused(f"{str(value)[:40]!r} is neither text nor a list of messages")
    try:
        return [Message.model_validate(message) for message in value]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refused(f"not a list of messages: {where}: {first['msg']}") from error


def prompt_of(value: Any) -> list[Message]:
    """Text as one user message, or a list of messages; not without words."""
    found = [Message(role="user", content=value)] if isinstance(value, str) else messages_of(value)
    if not any(message.content.strip() for message in found):
        raise Refused("the prompt is empty")
    return found


def turns(question: str) -> list[Message]:
    """The messages of a text of turns, each opened by its speaker (Student, User, Human; Assistant, Tutor,
    Teacher) and a colon; a text that opens without a speaker is one user message. A last speaker without
    words only asks for the answer."""
    if not _TURN.match(question):
        return [Message(role="user", content=question.strip())]
    _, *parts = _TURN.split(question)
    spoken = zip(parts[::2], parts[1::2], strict=True)
    found = [Message(role=_ROLES[who.lower()], content=said.strip()) for who, said in spoken]
    if found[-1].role == "assistant" and not found[-1].content:
        found.pop()
    return found


def opening(conversation: Sequence[Message]) -> str:
    """The same for all rows cut from one conversation: what was said up to the user's first message."""
    first_user = next((n for n, m in enumerate(conversation) if m.role == "user"), len(conversation))
    return digest(conversation[: first_user + 1])


def digest(conversation: Sequence[Message]) -> str:
    """The same for equal conversations, and for no others."""
    said = [(message.role, message.content) for message in conversation]
    return hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()
