"""A reward model that runs in a Ray Serve deployment of its own, as decoding sees it.

The policy's replica keeps the tokenizer, makes the token traces of all candidates and sends them in parts, so
that several replicas of the reward model share the work. Nothing is kept between steps there: any replica can
score any trace, and a trace whose replica dies is scored by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mahalo_ray.decoding.cpu_matmul import OneDNNRewardModel
from mahalo_ray.decoding.policy import DeviceConfig, load_step_scorer
from mahalo_ray.models import ProcessRewardModel, StepEncoder, TokenTrace, TraceReader
from mahalo_ray.models.reward_heads import OutputKind
from mahalo_ray.models.scoring import ObjectiveCalibration

Answer = TypeVar("Answer")

TRACES_AT_ONCE = 16  # of one call, which one replica scores in one forward
_GIVE_UP_S = 240.0  # a lost replica is replaced; less than what counts as stalled (model_thread.py)
_PAUSE_S = 0.2


@dataclass(frozen=True)
class ScorerCard:
    """All of a reward model but its weights: what a policy's replica needs to make traces for it."""

    objectives: tuple[str, ...]
    output_kinds: dict[str, OutputKind]
    calibration: dict[str, ObjectiveCalibration]
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    step_separator: str | None


class TraceWorker:
    """The model inside a replica of the reward model's deployment."""

    def __init__(self, url: str, placement: DeviceConfig) -> None:
        scorer = load_step_scorer(url, placement)
        if not isinstance(scorer, ProcessRewardModel) or scorer.tokenizer is None:
            raise ValueError(
                f"'{url}' is a {type(scorer).__name__}, and only process reward models with a tokenizer can "
                "be deployed apart from the policy: leave serve.reward_deployment out"
            )
        self._card = ScorerCard(
            scorer.objectives,
            scorer.output_kinds,
            scorer.calibration,
            scorer.max_length,
            scorer.tokenizer,
            scorer.step_separator,
        )
        self._scorer, self._faster = scorer, OneDNNRewardModel(scorer)

    def card(self) -> ScorerCard:
        """What describes the model."""
        return self._card

    def score(self, traces: Sequence[TokenTrace]) -> list[Tensor]:
        """Scores [S, H] of every trace."""
        with self._faster():
            return self._scorer.score_traces(traces)


class RemoteScorer(TraceReader):
    """Asks the deployment behind `handle`. Not for use inside an event loop."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        card: ScorerCard = _wait([handle.card.remote], _GIVE_UP_S)[0]
        self.objectives, self.output_kinds = card.objectives, card.output_kinds
        self.calibration = card.calibration
        self._max_length, self._encoder = card.max_length, StepEncoder(card.tokenizer, card.step_separator)

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def encoder(self) -> StepEncoder:
        return self._encoder

    def score_traces(self, traces: Sequence[TokenTrace], batch_size: int = TRACES_AT_ONCE) -> list[Tensor]:
        for number, trace in enumerate(traces):
            self.check_trace(number, trace)
        # Of similar length together, since a batch is padded to its longest.
        order = sorted(range(len(traces)), key=lambda number: len(traces[number].input_ids))
        parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

        def call(part: Sequence[int]) -> Callable[[], DeploymentResponse[list[Tensor]]]:
            return lambda: self._handle.score.remote([traces[number] for number in part])

        scored: list[list[Tensor]] = _wait([call(part) for part in parts], _GIVE_UP_S)
        found = {
            n: s for part, own in zip(parts, scored, strict=True) for n, s in zip(part, own, strict=True)
        }
        return [found[number] for number in range(len(traces))]


def _wait(calls: Sequence[Callable[[], DeploymentResponse[Answer]]], limit_s: float) -> list[Answer]:
    """The answers of all calls, made at once; those whose replica dies are made again. RuntimeError when the
    time is over; what a call itself raises is raised here."""
    deadline = time.monotonic() + limit_s
    answers: dict[int, Answer] = {}
    while True:
        running = {n: call() for n, call in enumerate(calls) if n not in answers}
        for number, response in running.items():
            try:
                answers[number] = response.result(timeout_s=max(0.0, deadline - time.monotonic()))
            except (RayActorError, DeploymentUnavailableError):
                continue
            except TimeoutError:
                break
        if len(answers) == len(calls):
            return [answers[number] for number in range(len(calls))]
        if time.monotonic() > deadline:
            raise RuntimeError(f"the reward model's deployment has not answered for {limit_s:g} s")
        time.sleep(_PAUSE_S)
