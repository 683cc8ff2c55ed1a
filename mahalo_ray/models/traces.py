"""Step traces as token ids: where every step starts and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat

Messages = Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True)
class TokenTrace:
    """Token ids and, for every step, the positions of its first and last token (inclusive)."""

    input_ids: Sequence[int]
    starts: Sequence[int]
    ends: Sequence[int]


class StepEncoder:
    """Prompts and steps to token ids, the same way in training, scoring and decoding.

    Every step, the last one too, is tokenised together with `separator` after it (unless its text ends with
    it already), as a policy writes it; so the tokens of a prefix of steps are a prefix of the tokens. With
    separator None a step is the whole assistant turn and closes with the end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str | None) -> None:
        self.format = ChatFormat(tokenizer)
        self.separator = separator

    def encode(self, prompt: Messages, steps: Sequence[str]) -> TokenTrace:
        """Token ids of prompt and steps. ValueError for no steps or an empty one."""
        check_steps(steps)
        if self.separator is None and len(steps) > 1:
            raise ValueError("a step is a whole turn here: put all turns but the last into the prompt")
        ids = self.format.prompt_ids([Message.model_validate(message) for message in prompt])
        starts, ends = [], []
        for step in steps:
            starts.append(len(ids))
            ids += self.step_ids(step)
            ends.append(len(ids) - 1)
        return TokenTrace(ids, starts, ends)

    def step_ids(self, step: str) -> list[int]:
        """Token ids of one step, separator (or end token) included."""
        if self.separator is None:
            return self.format.encode_reply(step)
        text = step if step.endswith(self.separator) else step + self.separator
        return self.format.encode_reply(text)[:-1]


def check_steps(steps: Sequence[str]) -> None:
    """ValueError for no steps or an empty one."""
    if isinstance(steps, str) or not steps or any(not step.strip() for step in steps):
        raise ValueError(f"steps {steps!r}: a list of at least one step is wanted, and none may be empty")


def pad_traces(
    traces: Sequence[TokenTrace], pad_id: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Right-padded (input_ids [B, T], attention_mask [B, T], starts [B, S], ends [B, S]); none: 0, -1."""
    length = max(len(trace.input_ids) for trace in traces)
    steps = max(len(trace.ends) for trace in traces)
    input_ids = torch.full((len(traces), length), pad_id)
    attention_mask = torch.zeros(len(traces), length, dtype=torch.long)
    starts = torch.zeros(len(traces), steps, dtype=torch.long)
    ends = torch.full((len(traces), steps), -1)
    for row, trace in enumerate(traces):
        input_ids[row, : len(trace.input_ids)] = torch.tensor(trace.input_ids)
        attention_mask[row, : len(trace.input_ids)] = 1
        starts[row, : len(trace.starts)] = torch.tensor(trace.starts)
        ends[row, : len(trace.ends)] = torch.tensor(trace.ends)
    moved = [tensor.to(device) for tensor in (input_ids, attention_mask, starts, ends)]
    return moved[0], moved[1], moved[2], moved[3]
