"""Does a running endpoint work? Asked the way users ask: through the official OpenAI client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from mahalo_ray.errors import StageError
from mahalo_ray.objectives import Weights

SEED = 7


class SmokeError(StageError):
    """The endpoint answered, but not as it should, or did not answer."""


def smoke(
    url: str,
    model: str,
    messages: Sequence[dict[str, str]],
    weightings: Sequence[Weights],
    api_key: str | None = None,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Ask once per weighting (`extra_body={"objectives": ...}`), then stream the first one once.

    Returns {"model", "answers": [{"objectives", "text", "latency_s", "completion_tokens", "candidates"}],
    "streamed": {"text", "chunks", "latency_s"}}. Raises SmokeError with the reason if anything is off; the
    same seed must give the same text streamed and whole.
    """
    # The client insists on a key; a server without one ignores it.
    client = OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", timeout=timeout_s, max_retries=0)
    try:
        names = [known.id for known in client.models.list()]
        if model not in names:
            raise SmokeError(f"{url} serves {', '.join(names)}, not '{model}'")
        answers = [_ask(client, model, messages, weights) for weights in weightings]
        streamed = _ask_streaming(client, model, messages, weightings[0])
    except OpenAIError as error:
        raise SmokeError(f"{url} did not answer as it should: {error}") from error
    finally:
        client.close()
    if streamed["text"] != answers[0]["text"]:
        raise SmokeError(
            f"with one seed the streamed answer is {streamed['text']!r}, the whole one {answers[0]['text']!r}"
        )
    return {"model": model, "answers": answers, "streamed": streamed}


def _typed(messages: Sequence[dict[str, str]]) -> list[ChatCompletionMessageParam]:
    return [cast(ChatCompletionMessageParam, message) for message in messages]


def _ask(client: OpenAI, model: str, messages: Sequence[dict[str, str]], weights: Weights) -> dict[str, Any]:
    started = time.monotonic()
    completion = client.chat.completions.create(
        model=model,
        messages=_typed(messages),
        seed=SEED,
        extra_body={"objectives": dict(weights)},
    )
    latency = time.monotonic() - started
    text = completion.choices[0].message.content
    details = (completion.model_extra or {}).get("mahalo")
    if not text or not text.strip():
        raise SmokeError(f"the answer with {weights.label()} is empty")
    if completion.usage is None or completion.usage.completion_tokens < 1:
        raise SmokeError(f"the answer with {weights.label()} has no token counts")
    if details is None or Weights(details["objectives"]) != weights:
        raise SmokeError(f"the answer does not say that it was decoded with {weights.label()}: {details}")
    for number, step in enumerate(details["steps"]):
        if not 0 <= step["chosen"] < len(step["candidates"]):
            raise SmokeError(f"step {number} chose candidate {step['chosen']} of {len(step['candidates'])}")
    return {
        "objectives": dict(weights),
        "text": text,
        "latency_s": latency,
        "completion_tokens": completion.usage.completion_tokens,
        "candidates": sum(len(step["candidates"]) for step in details["steps"]),
    }


def _ask_streaming(
    client: OpenAI, model: str, messages: Sequence[dict[str, str]], weights: Weights
) -> dict[str, Any]:
    started = time.monotonic()
    text, chunks, ended = "", 0, None
    stream = client.chat.completions.create(
        model=model,
        messages=_typed(messages),
        seed=SEED,
        stream=True,
        extra_body={"objectives": dict(weights)},
    )
    for chunk in stream:
        assert isinstance(chunk, ChatCompletionChunk)
        chunks += 1
        for choice in chunk.choices:
            text += choice.delta.content or ""
            ended = choice.finish_reason or ended
    if ended is None:
        raise SmokeError("the stream ended without a finish_reason")
    return {"text": text, "chunks": chunks, "latency_s": time.monotonic() - started}
