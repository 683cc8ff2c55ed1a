"""From scores of candidates to a choice."""

from __future__ import annotations

import torch
from torch import Tensor

from mahalo_ray.decoding.requests import GuidedRequest
from mahalo_ray.decoding.sampling import draw_keys, uniforms
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.objectives import Weights

_NO_SPREAD = 1e-6  # relative to the scores' size: rounding between equal candidates is not a difference


def totals(scores: Tensor, guidance: Weights, request: GuidedRequest, model: ProcessRewardModel) -> Tensor:
    """[K, H] -> [K]: sum over objectives of guidance weight times standardised score."""
    scores = scores.double()
    if request.standardisation == "calibrated":
        standard = model.standardise(scores, "within_prompt")
    else:
        standard = within_candidates(scores)
    return standard @ torch.tensor(guidance.over(model.objectives), dtype=torch.float64)


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
