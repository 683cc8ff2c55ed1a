"""What `mahalo generate` writes: one row per prompt, with every candidate that was offered and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from mahalo_ray.data.prompts import PromptRow
from mahalo_ray.data.records import Message, Record
from mahalo_ray.decoding.requests import GuidedRequest, GuidedResult, Step

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_NUMBERS = pa.map_(pa.string(), pa.float64())
_CANDIDATE = pa.struct(
    [
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("reason", pa.string()),
        ("scores", _NUMBERS),
        ("total", pa.float64()),
    ]
)
_STEP = pa.struct([("chosen", pa.int32()), ("candidates", pa.list_(_CANDIDATE))])


class GenerationCandidate(BaseModel):
    """A candidate of a step. `scores` per objective and the `total` that was compared, both None where there
    was nothing to choose from; `reason`: why it ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    tokens: int
    reason: str
    scores: dict[str, float] | None
    total: float | None


class GenerationStep(BaseModel):
    """A step of the response: the candidates and which one went on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chosen: int
    candidates: list[GenerationCandidate]


class Generation(Record):
    """A prompt's answer. `text` ends before a stop string; the steps hold all that was sampled.

    `weights` and `guidance` are what was used: None for a policy without heads, or no guidance.
    `policy_tokens` and `reward_tokens` went through the models; `cache_bytes` is the peak of the whole chunk.
    """

    id: str
    prompt: list[Message]
    text: str
    stop_reason: str
    steps: list[GenerationStep]
    weights: dict[str, float] | None
    guidance: dict[str, float] | None
    strategy: str
    seed: int
    prompt_tokens: int
    response_tokens: int
    policy_tokens: int
    reward_tokens: int
    cache_bytes: int

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("prompt", _MESSAGES),
            ("text", pa.string()),
            ("stop_reason", pa.string()),
            ("steps", pa.list_(_STEP)),
            ("weights", _NUMBERS),
            ("guidance", _NUMBERS),
            ("strategy", pa.string()),
            ("seed", pa.int64()),
            ("prompt_tokens", pa.int64()),
            ("response_tokens", pa.int64()),
            ("policy_tokens", pa.int64()),
            ("reward_tokens", pa.int64()),
            ("cache_bytes", pa.int64()),
        ]
    )

    @classmethod
    def of(
        cls, row: PromptRow, request: GuidedRequest, result: GuidedResult, objectives: Sequence[str]
    ) -> Generation:
        """The record of an answered prompt; `objectives` are the reward models'."""
        return cls(
            id=row.id,
            prompt=list(row.messages),
            text=before_stop(result.text, request.stop),
            stop_reason=result.stop_reason,
            steps=[_step(step) for step in result.steps],
            weights=None if request.weights is None else dict(request.weights),
            guidance=dict(request.guidance_over(objectives)) if request.is_guided else None,
            strategy=request.strategy,
            seed=request.seed,
            prompt_tokens=result.prompt_tokens,
            response_tokens=len(result.token_ids),
            policy_tokens=result.policy_tokens,
            reward_tokens=result.reward_tokens,
            cache_bytes=result.cache_bytes,
        )


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(found)] if found else text


def _step(step: Step) -> GenerationStep:
    return GenerationStep(
        chosen=step.chosen,
        candidates=[
            GenerationCandidate(
                text=c.text,
                tokens=len(c.token_ids),
                reason=c.reason,
                scores=c.scores or None,
                total=c.total,
            )
            for c in step.candidates
        ],
    )
