"""What guided decoding is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from mahalo_ray.data.records import Message
from mahalo_ray.decoding.candidates import StopReason
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.objectives import Weights, unknown_name

Strategy = Literal["argmax", "sample", "beam", "dvts", "best_of_n", "none"]
Standardisation = Literal["within_candidates", "calibrated"]


@dataclass(frozen=True)
class GuidedRequest:
    """One prompt and how to answer it.

    weights: over the policy's heads (None for a single-head policy); guidance: over the reward model's
    objectives (None: all alike). Strategies: - `argmax` takes each step's best of num_candidates (the
    paper's); - `sample` draws one by softmax(total / score_temperature); - `beam` keeps the num_candidates /
    beam_width best beams over all their beam_width continuations each, and `dvts` follows that many greedy
    searches of beam_width candidates apart from each other (both after Beeching, Tunstall and Rush, "Scaling
    test-time compute with open models", 2024); the best end is taken; - `best_of_n` chooses among whole
    responses; - `none` samples one response. Totals are sums over objectives of guidance weight times
    standardised score: `within_candidates` divides by the spread among the candidates compared, `calibrated`
    by the within-prompt spread stored with the reward model.
    """

    messages: Sequence[Message | Mapping[str, str]]
    weights: Weights | None = None
    guidance: Weights | None = None
    num_candidates: int = 5
    seed: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 512
    max_step_tokens: int = 256
    max_steps: int = 256
    stop: tuple[str, ...] = ()
    strategy: Strategy = "argmax"
    beam_width: int = 4
    score_temperature: float = 1.0
    standardisation: Standardisation = "within_candidates"

    def __post_init__(self) -> None:
        for name in ("num_candidates", "max_new_tokens", "max_step_tokens", "max_steps"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.strategy not in get_args(Strategy):
            raise ValueError(unknown_name("strategy", self.strategy, get_args(Strategy)))
        if self.standardisation not in get_args(Standardisation):
            raise ValueError(unknown_name("standardisation", self.standardisation, get_args(Standardisation)))
        if self.score_temperature <= 0:
            raise ValueError(f"score_temperature is {self.score_temperature}: it must be above 0")
        if isinstance(self.stop, str):
            raise ValueError(f"stop is the string {self.stop!r}: give a tuple of strings")
        if not all(self.stop):
            raise ValueError("a stop string is empty: leave it out instead")
        if self.strategy in ("beam", "dvts") and (
            self.beam_width < 2 or self.num_candidates % self.beam_width
        ):
            raise ValueError(
                f"num_candidates is {self.num_candidates} and beam_width {self.beam_width}: "
                f"'{self.strategy}' needs a beam_width of at least 2 that divides num_candidates"
            )
        if not self.messages:
            raise ValueError("messages are empty: give at least one message")

    @property
    def candidates_per_step(self) -> int:
        return 1 if self.strategy == "none" else self.num_candidates

    def guidance_over(self, objectives: Sequence[str]) -> Weights:
        """The guidance weights; all of the reward model's objectives alike if none were given."""
        return self.guidance or Weights.balanced(objectives)

    @property
    def is_guided(self) -> bool:
        """Whether there is anything to choose from."""
        return self.candidates_per_step > 1


@dataclass(frozen=True)
class StepCandidate:
    """One candidate of a step. scores: per objective, as the reward model gives them; total: what was
    compared (both empty when there was nothing to choose from).
    """

    text: str
    token_ids: list[int]
    reason: StopReason
    scores: dict[str, float]
    total: float | None


@dataclass(frozen=True)
class Step:
    """An accepted step and the candidates it was chosen from."""

    candidates: list[StepCandidate]
    chosen: int

    @property
    def accepted(self) -> StepCandidate:
        return self.candidates[self.chosen]

    @property
    def text(self) -> str:
        return self.accepted.text


@dataclass
class GuidedResult:
    """A finished response. `token_ids` are exactly the sampled ones, stop token included; `text` leaves
    special tokens out. Tokens spent count what went through each model; cache bytes are the peak of the whole
    batch.
    """

    text: str
    token_ids: list[int]
    steps: list[Step]
    stop_reason: StopReason
    prompt_tokens: int
    policy_tokens: int
    reward_tokens: int
    cache_bytes: int
