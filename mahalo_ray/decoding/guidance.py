"""From scores of candidates to a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mahalo_ray.decoding.requests import GuidedRequest, StepCandidate
from mahalo_ray.decoding.sampling import draw_keys, uniforms
from mahalo_ray.models.calibration import ObjectiveCalibration, standardised
from mahalo_ray.models.scoring import StepScorer
from mahalo_ray.objectives import Weights

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
                    f"two reward models score '{name}': guidance weights go by objective, so give models of "
                    "other makers names of their own, and use one of our own models per objective"
                )
        calibration = {name: known for scorer in scorers for name, known in scorer.calibration.items()}
        return cls(tuple(names), calibration)

    @property
    def is_calibrated(self) -> bool:
        """Whether the within-prompt spread of every objective is known."""
        spreads = [self.calibration.get(name) for name in self.objectives]
        return all(known is not None and known["within_prompt_std"] is not None for known in spreads)


def totals(scores: Tensor, guidance: Weights, request: GuidedRequest, scale: ScoreScale) -> Tensor:
    """[K, H] -> [K]: sum over objectives of guidance weight times standardised score."""
    scores = scores.double()
    if request.standardisation == "calibrated":
        standard = standardised(scores, scale.objectives, scale.calibration, "within_prompt")
    else:
        standard = within_candidates(scores)
    return standard @ torch.tensor(guidance.over(scale.objectives), dtype=torch.float64)


def with_totals(
    candidates: Sequence[StepCandidate], scores: Tensor, request: GuidedRequest, scale: ScoreScale
) -> list[StepCandidate]:
    """The candidates with their scores [K, H] and the totals they are compared by."""
    total = totals(scores, request.guidance_over(scale.objectives), request, scale).tolist()
    return [
        replace(candidate, scores=dict(zip(scale.objectives, row, strict=True)), total=one)
        for candidate, row, one in zip(candidates, scores.tolist(), total, strict=True)
    ]


def within_candidates(scores: Tensor) -> Tensor:
    """[K, H] minus their mean, divided by their spread over the K candidates; 0 where there is no spread."""
    centred = scores - scores.mean(dim=0)
    spread = scores.std(dim=0, correction=0)
    flat = spread <= _NO_SPREAD * scores.abs().amax(dim=0).clamp(min=_NO_SPREAD)
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, spread))


def choose(total: Tensor, request: GuidedRequest, position: int) -> int:
    """The candidate to go on with. `sample` draws by the request's seed and the conversation's length."""
    if request.strategy != "sample":
        return int(total.argmax())
    shares = torch.softmax(total / request.score_temperature, dim=0).cumsum(dim=0)
    # One candidate number further than any candidate's own draws: the choice has randomness of its own.
    key = draw_keys([request.seed], len(total) + 1, torch.device("cpu"))[0, -1]
    uniform = uniforms(key, torch.tensor(position))
    return int(torch.searchsorted(shares, uniform * shares[-1], right=True).clamp(max=len(total) - 1))
