"""The features of a step that a process reward model reads from its backbones, and the heads that score them.

Shapes: B traces of T tokens and S steps, D hidden size, F features, H objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mahalo_ray.config import HeadInput, Supervision
from mahalo_ray.models.heads import check_objectives, head_seed
from mahalo_ray.models.sharding import sharded_creation
from mahalo_ray.objectives import unknown_name

OutputKind = Literal["value", "probability", "preference"]

HEAD_INPUTS: tuple[HeadInput, ...] = get_args(HeadInput)
OUTPUT_KINDS: tuple[OutputKind, ...] = get_args(OutputKind)
# What the head of an objective gives, by how the objective is supervised.
OUTPUT_KIND_OF: dict[Supervision, OutputKind] = {
    "rollout_value": "value",
    "judged_rollouts": "probability",
    "judged_prefix": "probability",
    "pairwise": "preference",
}
LOGP_FEATURES = 3  # mean, minimum and sum over the step's tokens


def check_inputs(inputs: Sequence[str]) -> tuple[HeadInput, ...]:
    """The chosen inputs in their fixed order; ValueError for none, an unknown one or a repeated one."""
    for name in inputs:
        if name not in HEAD_INPUTS:
            raise ValueError(unknown_name("head input", name, HEAD_INPUTS))
    if not inputs or len(set(inputs)) < len(inputs):
        raise ValueError(f"head inputs {list(inputs)}: name each of {', '.join(HEAD_INPUTS)} at most once")
    return tuple(name for name in HEAD_INPUTS if name in inputs)


def feature_size(inputs: Sequence[HeadInput], hidden_size: int) -> int:
    """Length F of the feature vector of one step."""
    return sum(LOGP_FEATURES if name == "reference_logps" else hidden_size for name in inputs)


def step_tokens(starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """Which tokens belong to which step: boolean [B, S, T]; all false where ends is -1 (no step)."""
    positions = torch.arange(length, device=ends.device)
    return (positions >= starts[..., None]) & (positions <= ends[..., None])


def step_features(
    inputs: Sequence[HeadInput],
    hidden: Tensor,
    token_logps: Tensor | None,
    starts: Tensor,
    ends: Tensor,
) -> Tensor:
    """Features [B, S, F] of steps whose tokens are starts..ends (inclusive, [B, S]; ends -1 = no step).

    hidden [B, T, D] are the backbone's states; token_logps [B, T] the reference's log-prob of token t itself.
    A step's features depend on its own tokens' states alone, so an incremental decoder passes only the new
    tokens: hidden [K, L, D], starts 0, ends L-1, and gets what a full pass would give.
    """
    inside = step_tokens(starts, ends, hidden.shape[1])
    last = pooled = logps = None
    if "last" in inputs:
        # `gather` needs an index that exists: where there is no step (-1) token 0 is read and zeroed below.
        last_token = ends.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        last = hidden.gather(1, last_token)
    if "pooled" in inputs:
        # The means of all steps as one product [B, S, T] @ [B, T, D]: selecting the states of every step
        # would need them [B, S, T, D].
        shares = inside.to(hidden.dtype) / inside.sum(-1, keepdim=True).clamp(min=1)
        pooled = shares @ hidden
    if "reference_logps" in inputs:
        if token_logps is None:
            raise ValueError("this model's heads read reference log-probs: pass token_logps [B, T]")
        logps = _logp_statistics(token_logps, inside)
    return span_features(last, pooled, logps) * (ends >= 0)[..., None]


def span_features(last: Tensor | None, pooled: Tensor | None, logps: Tensor | None) -> Tensor:
    """Features [..., F] of spans of tokens from what the heads read of them: the last token's state and the
    mean state [..., D], and the log-probs' mean, minimum and sum [..., 3]; None where they do not read it.
    """
    parts = [_normalised(states) for states in (last, pooled) if states is not None]
    if logps is not None:
        # Sums of log-probs reach into the hundreds, and would drown the normalised states beside them.
        squashed = -torch.log1p(-logps.clamp(max=0))
        parts.append(squashed.to(parts[0].dtype) if parts else squashed)
    return torch.cat(parts, dim=-1)


def _normalised(states: Tensor) -> Tensor:
    """Zero mean, unit variance per state [..., D]: backbones differ by orders of magnitude in their states'
    scale.
    """
    return F.layer_norm(states, states.shape[-1:])


def _logp_statistics(token_logps: Tensor, inside: Tensor) -> Tensor:
    """Mean, minimum and sum [B, S, 3] of the log-probs of each span's tokens."""
    # 0 is neutral in the sum and never the minimum, since log-probs are at most 0.
    values = token_logps[:, None, :].masked_fill(~inside, 0.0)
    total = values.sum(-1)
    mean = total / inside.sum(-1).clamp(min=1)
    return torch.stack([mean, values.amin(-1), total], dim=-1)


class ScoreHead(nn.Module):
    """Features [..., F] -> one raw score [...]: linear, or one hidden layer with GELU."""

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden_size or 1)
        self.second = nn.Linear(hidden_size, 1) if hidden_size else None

    def forward(self, features: Tensor) -> Tensor:
        # Heads may be kept in another precision than the backbone.
        scores = self.first(features.to(self.first.weight.dtype))
        if self.second is not None:
            scores = self.second(F.gelu(scores))
        return scores.squeeze(-1)


class ScoreHeads(nn.ModuleDict):
    """One `ScoreHead` per objective, seeded by its name; all are called for every batch, in order."""

    def __init__(self, objectives: Mapping[str, str], features: int, hidden_size: int, seed: int) -> None:
        check_objectives(list(objectives))
        for kind in objectives.values():
            if kind not in OUTPUT_KINDS:
                raise ValueError(unknown_name("output kind", kind, OUTPUT_KINDS))
        super().__init__()
        self.kinds = dict(objectives)
        for name in objectives:
            with torch.random.fork_rng(devices=[]), sharded_creation():
                torch.manual_seed(head_seed(seed, name))
                self[name] = ScoreHead(features, hidden_size)

    @property
    def reads_answers(self) -> bool:
        """Whether an objective is a preference between whole answers: it is scored from their beginnings."""
        return "preference" in self.kinds.values()

    def forward(self, features: Tensor, answers: Tensor | None = None) -> Tensor:
        """Features [..., F] of the steps -> raw scores [..., H], fp32, in the order of the objectives.

        `answers` [..., F]: features of the answers up to and with each step, which `preference` objectives
        read, since they learned from whole answers (None: the steps are whole answers). Every head is called
        once, whatever the batch holds: under ZeRO-3 a call is a collective.
        """
        raw = [
            cast(ScoreHead, head)(answers if answers is not None and kind == "preference" else features)
            for head, kind in zip(self.values(), self.kinds.values(), strict=True)
        ]
        return torch.stack([scores.float() for scores in raw], dim=-1)
