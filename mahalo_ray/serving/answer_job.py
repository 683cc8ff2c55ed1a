"""What the models are asked for and what they give back: between the service and the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Step


@dataclass(frozen=True)
class RawPrompt:
    """A prompt that is taken as it is, without the chat template: a text, or the policy's token ids."""

    value: str | tuple[int, ...]


@dataclass(frozen=True)
class AnswersWanted:
    """The answers that one request of a client wants.

    `prompts`: in place of the messages of the same number, None: these. `top_logprobs`: log-probabilities of
    every token and of so many of the likeliest at its place; None: none. `echo`: the prompt is part of the
    answer. `generates` False: nothing is added to the prompt.
    """

    requests: tuple[GuidedRequest, ...]
    prompts: tuple[RawPrompt | None, ...]
    top_logprobs: int | None = None
    echo: bool = False
    generates: bool = True


@dataclass(frozen=True)
class TokenReport:
    """A token: its text (a name of its own where it is only a part of a character), its bytes, its
    log-probability in nats (None for the first of a prompt), and the likeliest tokens at its place."""

    text: str
    raw: bytes
    is_text: bool
    logp: float | None
    top: Sequence[TokenReport] = ()


@dataclass(frozen=True)
class Answer:
    """A finished answer, its text cut at the first stop string. `tokens`: with log-probabilities, where they
    were asked for, those of an echoed prompt first."""

    result: GuidedResult
    echoed: str = ""
    tokens: list[TokenReport] | None = None


@dataclass(frozen=True)
class ModelLoad:
    """What the models are at: candidates that are decoded, and bytes of the policy's keys and values."""

    rows: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True)
class AnswerPart:
    """A part of an answer that is still growing: the text it adds and the step it comes from. Parts with
    equal text of the same answer are equal."""

    index: int
    text: str
    step: Step = field(compare=False)
    prompt_tokens: int = field(compare=False)
    answer_tokens: int = field(compare=False)
