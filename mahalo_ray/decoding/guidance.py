"""Guided decoding's requests and results, and the one formula by which candidates are compared and chosen.

Decoding, serving, rollouts and evaluation all choose by `Guidance`:

    total_k = sum over objectives o of  w_o * (s_ko - mean_o) / spread_o
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mahalo_ray.config import Aggregation, RequestConfig, Standardisation, Strategy
from mahalo_ray.data.records import Message
from mahalo_ray.decoding.aggregation import aggregated
from mahalo_ray.decoding.sampling import SamplingParams, draw_keys, uniforms
from mahalo_ray.decoding.stopping import StopReason
from mahalo_ray.models.scoring import ObjectiveCalibration, StepScorer, standardised
from mahalo_ray.objectives import Weights, unknown_name


@dataclass(frozen=True)
class GuidedRequest:
    """One prompt and how to answer it.

    weights: over the policy's heads (None for a single-head policy); strength: 0 is the head of the model
    that the policy was made from, 1 the policy's own at these weights, above 1 goes on beyond it; guidance:
    over the reward model's objectives (None: all alike).

    Strategies:

    - `argmax` takes each step's best of num_candidates (the paper's);
    - `sample` draws one by softmax(total / score_temperature);
    - `beam` keeps the num_candidates / beam_width best beams over all their beam_width continuations each,
      and `dvts` follows that many greedy searches of beam_width candidates apart from each other (both after
      Beeching, Tunstall and Rush, "Scaling test-time compute with open models", 2024); the best end is taken;
    - `best_of_n` chooses among whole responses;
    - `none` samples one response.

    Totals are sums over objectives of guidance weight times standardised score, or what `aggregation` makes
    of them: `within_candidates` divides by the spread among the candidates compared, `calibrated` by the
    within-prompt spread stored with the reward model. No end token is drawn among the answer's first
    `min_tokens`; `repetition_penalty` above 1 makes tokens that occurred less likely (`DrawLimits`).

    Equal seeds draw equal numbers, whatever is decoded beside the request. The logits that they draw from
    are rounded otherwise in a larger batch: with fp32 weights that hardly ever changes an answer, with
    bfloat16 weights often.

    >>> request = GuidedRequest([{"role": "user", "content": "What is 2 + 3?"}], num_candidates=4, seed=1)
    >>> request.strategy
    'argmax'
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
    strength: float = 1.0
    aggregation: Aggregation = field(default_factory=Aggregation)
    min_tokens: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength is {self.strength}: it must be a finite number of at least 0")
        for name in ("num_candidates", "max_new_tokens", "max_step_tokens", "max_steps"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.strategy not in get_args(Strategy):
            raise ValueError(unknown_name("strategy", self.strategy, get_args(Strategy)))
        if self.standardisation not in get_args(Standardisation):
            raise ValueError(unknown_name("standardisation", self.standardisation, get_args(Standardisation)))
        if not 0 < self.score_temperature < float("inf"):
            raise ValueError(f"score_temperature is {self.score_temperature}: it must be a number above 0")
        if self.aggregation.kind == "thresholds" and self.strategy == "sample":
            raise ValueError(
                "aggregation 'thresholds' gives an order only, and strategy 'sample' draws by totals: take "
                "another of the two"
            )
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
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}: 0 to max_new_tokens ({self.max_new_tokens})")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: it must be above 0")
        bound = self.min_tokens > 0 or self.repetition_penalty != 1
        if bound and self.strategy in ("beam", "dvts"):
            raise ValueError(f"strategy '{self.strategy}' has neither min_tokens nor repetition_penalty")
        if not self.messages:
            raise ValueError("messages are empty: give at least one message")

    @classmethod
    def of(
        cls, options: RequestConfig, messages: Sequence[Message | Mapping[str, str]], **own: Any
    ) -> GuidedRequest:
        """A request with the options of a configuration; `own`: fields it has instead, such as its weights.

        Options go by name: one that is added to `RequestConfig` and to this class needs no other line.
        """
        shared = {
            option.name: getattr(options, option.name)
            for option in fields(cls)
            if option.name in RequestConfig.model_fields
        }
        sampling = SamplingParams(**{name: getattr(options, name) for name in SamplingParams.model_fields})
        return cls(messages, **{**shared, "sampling": sampling, "stop": tuple(options.stop), **own})

    @property
    def candidates_per_step(self) -> int:
        return 1 if self.strategy == "none" else self.num_candidates

    def guidance_over(self, objectives: Sequence[str]) -> Weights:
        """The guidance weights; all of the reward model's objectives alike if none were given."""
        return self.guidance or Weights.balanced(objectives)

    def guidance_by(self, scale: ScoreScale) -> Guidance:
        """How this request's candidates are compared and chosen."""
        temperature = self.score_temperature if self.strategy == "sample" else None
        weights = self.guidance_over(scale.objectives)
        return Guidance(scale, weights, self.standardisation, temperature, self.aggregation)

    @property
    def is_guided(self) -> bool:
        """Whether there is anything to choose from."""
        return self.candidates_per_step > 1

    @property
    def takes_whole_answers(self) -> bool:
        """Whether a candidate is a whole answer, not a step of one."""
        return self.strategy == "best_of_n"


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


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer in the models' context."""


class TextOutgrown(ValueError):
    """An answer has become too long for a reward model to read: it ends there."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, as messages and as the policy's tokens."""

    messages: Sequence[Message]
    token_ids: list[int]


@dataclass(frozen=True)
class Choice:
    """The candidates of one answer's next step, which are compared.

    `row`: the answer, in the scorer's numbers. ends[k]: the answer ends with candidate k. `is_whole`: every
    candidate is a whole answer, of which the last step is scored.
    """

    row: int
    candidates: Sequence[StepCandidate]
    ends: Sequence[bool]
    is_whole: bool = False

    def is_closed(self, k: int) -> bool:
        """Whether candidate k is read with a separator (or end of turn) behind it: the answer ends with it.
        A complete step has its boundary in its text."""
        return self.ends[k] and self.candidates[k].reason is not StopReason.STEP


@dataclass(frozen=True)
class ChoiceScores:
    """scores [K, O] of a choice's candidates, or why this choice cannot be scored (a `TextOutgrown` ends the
    answer, any other error belongs to the request), and the tokens that were encoded for it."""

    scores: Tensor | ValueError
    tokens: int = 0


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


_NO_SPREAD = 1e-6  # relative to the scores' size: rounding between equal candidates is not a difference


@dataclass(frozen=True)
class ScoreScale:
    """The objectives of all reward models side by side, and what is known of the spread of their scores."""

    objectives: tuple[str, ...]
    calibration: Mapping[str, ObjectiveCalibration]

    @classmethod
    def of(cls, scorers: Sequence[StepScorer]) -> ScoreScale:
        """ValueError if two reward models score the same objective: a weight could not tell them apart."""
        names = [name for scorer in scorers for name in scorer.objectives]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two reward models score '{name}': guidance weights go by objective, so give "
                    "third-party models names of their own, and use one of our own models per objective"
                )
        calibration = {name: known for scorer in scorers for name, known in scorer.calibration.items()}
        return cls(tuple(names), calibration)

    @property
    def is_calibrated(self) -> bool:
        """Whether the within-prompt spread of every objective is known."""
        spreads = [self.calibration.get(name) for name in self.objectives]
        return all(known is not None and known["within_prompt_std"] is not None for known in spreads)


@dataclass(frozen=True)
class Guidance:
    """How the K candidates of one choice are compared, and which of them is taken.

    `weights` over the objectives of `scale`. `standardisation`: `within_candidates` divides each
    objective by its spread among the K candidates, `calibrated` by the within-prompt spread stored with
    the reward model. `aggregation`: how a candidate's standardised scores become its total. `temperature`
    None takes the best; otherwise candidates are drawn by softmax(total / temperature).
    """

    scale: ScoreScale
    weights: Weights
    standardisation: Standardisation = "within_candidates"
    temperature: float | None = None
    aggregation: Aggregation = field(default_factory=Aggregation)

    def totals(self, scores: Tensor) -> Tensor:
        """Scores [K, O] in the order of the scale's objectives -> totals [K], in double precision. Thresholds
        are in calibrated units, whatever the standardisation of the rest."""
        scores, objectives = scores.double(), self.scale.objectives
        calibrated = standard = scores
        if self.standardisation == "calibrated" or self.aggregation.kind == "thresholds":
            calibrated = standard = standardised(scores, objectives, self.scale.calibration, "within_prompt")
        if self.standardisation == "within_candidates":
            standard = within_candidates(scores)
        return aggregated(standard, self.weights, objectives, self.aggregation, calibrated)

    def order(self, totals: Tensor, silent: Sequence[bool], uniform: Tensor | None = None) -> list[int]:
        """The candidates [K], the one to take first, then those that would follow it.

        silent[k]: nothing would have been said at all with candidate k. Such a candidate comes after all that
        say something, whatever its total: a reward model has not learned to score silence. `uniform` [K]:
        numbers in [0, 1) for drawing without replacement (Gumbel-max), so that the first is distributed as
        softmax(totals / temperature). Equal totals keep their order.
        """
        if self.temperature is not None:
            assert uniform is not None, "drawing candidates needs random numbers"
            # The best gets 0: no temperature, however small, makes an infinity of it.
            totals = (totals - totals.max()) / self.temperature - torch.log(
                -torch.log(uniform.clamp(min=1e-300))
            )
        best_first: list[int] = torch.argsort(totals, descending=True, stable=True).tolist()
        return sorted(best_first, key=lambda k: silent[k])


def with_scores(
    candidates: Sequence[StepCandidate], scores: Tensor, totals: Tensor, objectives: Sequence[str]
) -> list[StepCandidate]:
    """The candidates with their scores [K, O] and the totals [K] they are compared by."""
    return [
        replace(candidate, scores=dict(zip(objectives, row, strict=True)), total=total)
        for candidate, row, total in zip(candidates, scores.tolist(), totals.tolist(), strict=True)
    ]


def within_candidates(scores: Tensor) -> Tensor:
    """[K, O] minus their mean, divided by their spread over the K candidates; 0 where there is no spread."""
    centred = scores - scores.mean(dim=0)
    spread = scores.std(dim=0, correction=0)
    flat = spread <= _NO_SPREAD * scores.abs().amax(dim=0).clamp(min=_NO_SPREAD)
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, spread))


def choice_uniforms(seed: int, position: int, count: int) -> Tensor:
    """Random numbers [count] for a choice among `count` candidates of the conversation of this length.

    Keyed behind the candidates' own numbers: the choice has randomness of its own.
    """
    keys = draw_keys([seed], 2 * count, torch.device("cpu"))[0, count:]
    return uniforms(keys, torch.tensor(position))
