"""The door every scorer of steps has: messages and steps in, calibrated scores per objective out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from mahalo_ray.models.calibration import ObjectiveCalibration, Spread, calibrate, standardised
from mahalo_ray.models.reward_heads import OutputKind
from mahalo_ray.models.traces import Messages, TokenTrace, pad_traces
from mahalo_ray.objectives import unknown_name


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
        """One score per step and objective. `prompt`: messages with role and content."""
        return self.score_batch([(prompt, steps)])[0]

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


class TraceEncoder(Protocol):
    """Turns messages and steps into token ids with step positions."""

    def encode(self, prompt: Messages, steps: Sequence[str]) -> TokenTrace: ...


class TraceScorer(StepScorer):
    """A torch module that scores all steps of a token trace in one forward; batches are made by length."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The longest trace the model reads, in tokens."""

    @property
    @abstractmethod
    def encoder(self) -> TraceEncoder:
        """How prompts and steps become token ids."""

    @abstractmethod
    def final_scores(self, input_ids: Tensor, attention_mask: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Scores people read [B, S, H] of right-padded traces, one forward."""

    def score_batch(
        self, traces: Sequence[tuple[Messages, Sequence[str]]], batch_size: int = 16
    ) -> list[dict[str, list[float]]]:
        encoded = [self.encoder.encode(prompt, steps) for prompt, steps in traces]
        return [
            {name: scores[:, h].tolist() for h, name in enumerate(self.objectives)}
            for scores in self.score_traces(encoded, batch_size)
        ]

    @torch.no_grad()
    def score_traces(self, traces: Sequence[TokenTrace], batch_size: int = 16) -> list[Tensor]:
        """Scores [S, H] of every token trace, on the CPU, in their order.

        ValueError for a trace longer than the model reads.
        """
        for number, trace in enumerate(traces):
            if len(trace.input_ids) > self.max_length:
                raise ValueError(
                    f"trace {number} has {len(trace.input_ids)} tokens, the model reads {self.max_length}: "
                    "cut it at a step boundary"
                )
        module = cast(nn.Module, self)
        training, device = module.training, next(module.parameters()).device
        module.eval()
        results: dict[int, Tensor] = {}
        order = sorted(range(len(traces)), key=lambda number: len(traces[number].input_ids))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            scores = self.final_scores(*pad_traces([traces[number] for number in chosen], 0, device)).cpu()
            for row, number in enumerate(chosen):
                results[number] = scores[row, : len(traces[number].ends)]
        module.train(training)
        return [results[number] for number in range(len(traces))]
