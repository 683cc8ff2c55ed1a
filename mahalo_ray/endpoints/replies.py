"""What a server sent, as a reply or as a kind of trouble. The client library does not validate it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from mahalo_ray.endpoints.messages import Reply

TextOf = Callable[[Any], str | None]  # of a choice


class Garbage(Exception):
    """A reply with status 200 that is not what the API promises."""


# The client lets the errors of a body that is not JSON through as they are.
TROUBLE = (TimeoutError, openai.OpenAIError, Garbage, json.JSONDecodeError, UnicodeDecodeError)


def chat_text(choice: Any) -> str | None:
    """Of a choice of /chat/completions."""
    return choice.message.content or ""  # None: the model said nothing (refused, filtered)


def completion_text(choice: Any) -> str | None:
    """Of a choice of /completions."""
    return choice.text


def reply_of(answer: Any, text_of: TextOf) -> Reply:
    """A server's answer; Garbage where it is none: a page of HTML comes as a string, for example."""
    try:
        texts = [text_of(choice) for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
        choices = [choice.model_dump() for choice in answer.choices]
        usage = answer.usage
        tokens = (0, 0) if usage is None else (int(usage.prompt_tokens), int(usage.completion_tokens or 0))
    except (AttributeError, TypeError, ValueError) as error:
        raise Garbage(f"not a completion: {answer!r}") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Garbage(f"a completion without text: {answer!r}")
    return Reply([str(text) for text in texts], reasons, *tokens, choices)


def kind_of(error: Exception) -> tuple[str, bool]:
    """What went wrong, and whether another try may mend it."""
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return "timeout", True
    if isinstance(error, openai.APIStatusError):
        return f"http_{error.status_code}", error.status_code in (408, 429) or error.status_code >= 500
    if isinstance(error, openai.APIConnectionError):
        return "connection", True
    return "garbage", True


def retry_after(error: Exception) -> float | None:
    """Seconds the server asked to wait, given as a number or as a date (RFC 9110, 10.2.3)."""
    if not isinstance(error, openai.APIStatusError):
        return None
    header = error.response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    return None
