"""The interface of every scorer of steps: messages and steps in, calibrated scores per objective out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.models.reward_heads import OutputKind
from mahalo_ray.objectives import unknown_name

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

    def encode_answer(self, prompt: Messages, steps: Sequence[str], closed: bool) -> TokenTrace:
        """An answer in the making, of any number of steps. The last one is `closed` by the separator (or the
        end token) unless more of it is to come; where a step is a whole turn, earlier ones go on without an
        end. ValueError for no steps or an empty one.
        """
        check_steps(steps)
        ids = self.format.prompt_ids([Message.model_validate(message) for message in prompt])
        starts, ends = [], []
        for number, step in enumerate(steps):
            is_last = number == len(steps) - 1
            is_open = not closed if is_last else self.separator is None
            starts.append(len(ids))
            ids += self.format.encode_text(step) if is_open else self.step_ids(step)
            ends.append(len(ids) - 1)
        return TokenTrace(ids, starts, ends)

    def step_ids(self, step: str) -> list[int]:
        """Token ids of one step, separator (or end token) included."""
        if self.separator is None:
            return self.format.encode_reply(step)
        text = step if step.endswith(self.separator) else step + self.separator
        return self.format.encode_text(text)


def check_steps(steps: Sequence[str]) -> None:
    """ValueError for no steps or an empty one."""
    if isinstance(steps, str) or not steps or any(not step.strip() for step in steps):
        raise ValueError(f"steps {steps!r}: give a list of at least one step; none may be empty")


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


QUANTILES = 101

Spread = Literal["overall", "within_prompt"]


class ObjectiveCalibration(TypedDict):
    """Statistics of one objective's scores on held-out steps.

    `std` is over all steps; `within_prompt_std` is the root of the mean variance among the scores of one
    group (candidates of one prompt), None if groups were not given; `quantiles` are the 0 %, 1 %, ... 100 %
    points.
    """

    mean: float
    std: float
    within_prompt_std: float | None
    quantiles: list[float]
    count: int


def calibrate(scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> ObjectiveCalibration:
    """Statistics of the finite scores; NaN marks a step without one. ValueError if they do not vary."""
    values = np.asarray(scores, dtype=np.float64)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(values)} scores and {len(groups)} groups: give one group per score")
    present = np.isfinite(values)
    if present.sum() < 2 or values[present].std() == 0:
        raise ValueError(f"cannot calibrate on {present.sum()} scores that do not vary")
    within = None
    if groups is not None:
        within = _within_std(values[present], [g for g, p in zip(groups, present, strict=True) if p])
    values = values[present]
    return ObjectiveCalibration(
        mean=float(values.mean()),
        std=float(values.std()),
        within_prompt_std=within,
        quantiles=[float(q) for q in np.quantile(values, np.linspace(0, 1, QUANTILES))],
        count=len(values),
    )


def _within_std(values: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Root of the pooled variance inside groups of at least two, losing one degree of freedom each."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(float(value))
    squares, freedom = 0.0, 0
    for group_scores in members.values():
        squares += float(np.square(np.asarray(group_scores) - np.mean(group_scores)).sum())
        freedom += len(group_scores) - 1
    if freedom == 0 or squares == 0:
        raise ValueError("no group has two different scores: the within-prompt spread cannot be measured")
    return math.sqrt(squares / freedom)


def standardised(
    scores: Tensor,
    objectives: Sequence[str],
    calibration: Mapping[str, ObjectiveCalibration],
    spread: Spread = "overall",
) -> Tensor:
    """(score - mean) / spread, [..., H], for scores [..., H] in the order of `objectives`. ValueError for an
    objective that is not calibrated, or not for this spread.

    `within_prompt` divides by the spread among candidates of one prompt, which is what guidance compares.
    """
    means, spreads = [], []
    for name in objectives:
        if name not in calibration:
            raise ValueError(
                f"scores of '{name}' are not calibrated: call fit_calibration on held-out scores"
            )
        statistics = calibration[name]
        scale = statistics["std"] if spread == "overall" else statistics["within_prompt_std"]
        if scale is None:
            raise ValueError(f"'{name}' was calibrated without groups: its within-prompt spread is unknown")
        means.append(statistics["mean"])
        spreads.append(scale)
    return (scores - scores.new_tensor(means)) / scores.new_tensor(spreads)


class StepScorer(ABC):
    """Anything that gives steps a score per objective. Higher is better, whatever the objective."""

    objectives: tuple[str, ...]
    output_kinds: dict[str, OutputKind]
    calibration: dict[str, ObjectiveCalibration]

    @abstractmethod
    def score_batch(
        self, traces: Sequence[tuple[Messages, Sequence[str]]], batch_size: int = 16
    ) -> list[dict[str, list[float]]]:
        """`score` for many (prompt, steps), in their order."""

    def score(self, prompt: Messages, steps: Sequence[str]) -> dict[str, list[float]]:
        """{objective: one score per step}. `prompt`: messages with role and content. ValueError for steps
        that are missing or empty, and for a text that is longer than the model reads.
        """
        return self.score_batch([(prompt, steps)])[0]

    @abstractmethod
    def check_length(self, prompt: Messages, steps: Sequence[str]) -> None:
        """ValueError for a text that is longer than the model reads; nothing is computed."""

    def fit_calibration(
        self, scores: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[Hashable]] | None = None
    ) -> None:
        """Measure mean, spread and quantiles of held-out scores (as `score` gives them) per objective.

        `groups` names, per objective and score, the prompt it belongs to: then the within-prompt spread too.
        """
        for name, values in scores.items():
            if name not in self.objectives:
                raise ValueError(unknown_name("objective", name, self.objectives))
            self.calibration[name] = calibrate(values, None if groups is None else groups[name])

    def standardise(self, scores: Tensor, spread: Spread = "overall") -> Tensor:
        """Scores [..., H] in units of their spread; see `calibration.standardised`."""
        return standardised(scores, self.objectives, self.calibration, spread)


class AnswerScorer(StepScorer):
    """A scorer that reads an answer as one text: the score of a step is that of the answer up to it."""

    step_separator: str

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The longest text the model reads, in its tokens."""

    @abstractmethod
    def length(self, prompt: Sequence[Message], answer: str) -> int:
        """Tokens that it reads of this answer, its prompt included."""


class TraceEncoder(Protocol):
    """Turns messages and steps into token ids with step positions."""

    def encode(self, prompt: Messages, steps: Sequence[str]) -> TokenTrace: ...


class TraceReader(StepScorer):
    """A scorer of token traces, wherever it computes them."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The longest trace the model reads, in tokens."""

    @property
    @abstractmethod
    def encoder(self) -> TraceEncoder:
        """How prompts and steps become token ids."""

    @abstractmethod
    def score_traces(self, traces: Sequence[TokenTrace], batch_size: int = 16) -> list[Tensor]:
        """Scores [S, H] of every token trace, on the CPU, in their order.

        ValueError for a trace longer than the model reads.
        """

    def score_batch(
        self, traces: Sequence[tuple[Messages, Sequence[str]]], batch_size: int = 16
    ) -> list[dict[str, list[float]]]:
        encoded = [self.encoder.encode(prompt, steps) for prompt, steps in traces]
        return [
            {name: scores[:, h].tolist() for h, name in enumerate(self.objectives)}
            for scores in self.score_traces(encoded, batch_size)
        ]

    def check_length(self, prompt: Messages, steps: Sequence[str]) -> None:
        self.check_trace(0, self.encoder.encode(prompt, steps))

    def check_trace(self, number: int, trace: TokenTrace) -> None:
        """ValueError for a trace longer than the model reads."""
        if len(trace.input_ids) > self.max_length:
            raise ValueError(
                f"trace {number} has {len(trace.input_ids)} tokens, the model reads {self.max_length}: "
                "cut it at a step boundary"
            )


class TraceScorer(TraceReader):
    """A torch module that scores all steps of a token trace in one forward; batches are made by length."""

    @abstractmethod
    def final_scores(self, input_ids: Tensor, attention_mask: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Activated scores [B, S, H] of right-padded traces (probabilities, not logits), one forward.

        input_ids, attention_mask [B, T]; starts, ends [B, S]: first and last token of every step, ends -1
        where there is none (its scores mean nothing).
        """

    @torch.no_grad()
    def score_traces(self, traces: Sequence[TokenTrace], batch_size: int = 16) -> list[Tensor]:
        for number, trace in enumerate(traces):
            self.check_trace(number, trace)
        module = cast(nn.Module, self)
        training, device = module.training, next(module.parameters()).device
        module.eval()
        results: dict[int, Tensor] = {}
        order = sorted(range(len(traces)), key=lambda number: len(traces[number].input_ids))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            # Padding stands on the right and is masked, so no step's score depends on it. Id 0 exists in
            # every embedding; the tokenizer's padding id may be missing or lie above it.
            scores = self.final_scores(*pad_traces([traces[number] for number in chosen], 0, device)).cpu()
            for row, number in enumerate(chosen):
                results[number] = scores[row, : len(traces[number].ends)]
        module.train(training)
        return [results[number] for number in range(len(traces))]
