"""What is decoded, with which models, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from shapes import ASSISTANT, Shape, words
from torch import Tensor
from transformers import PreTrainedModel

from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.policy import CausalPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.step_graph import Recorder
from mahalo_ray.decoding.stopping import TurnBoundary
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.models.reward_heads import OutputKind

_POLICY_SEED, _REWARD_SEED, _PROMPT_SEED = 1, 2, 3
_OBJECTIVES: dict[str, OutputKind] = {"accuracy": "value", "engagement": "probability"}


class EndlessPolicy(CausalPolicy):
    """A policy that never ends its turn: every step then has the length asked for."""

    def __init__(self, model: PreTrainedModel, end_id: int, recorder: Recorder | None = None) -> None:
        super().__init__(model, recorder)
        self._end_id = end_id

    def logits(self, hidden: Tensor) -> Tensor:
        return without(super().logits(hidden), self._end_id)


def without(logits: Tensor, token: int) -> Tensor:
    """The logits, changed in place so that `token` is never drawn."""
    logits[..., token] = float("-inf")
    return logits


@dataclass
class Models:
    """A policy and a reward model of one shape, with random weights."""

    shape: Shape
    policy: PreTrainedModel
    reward: ProcessRewardModel
    decoder: GuidedDecoder
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def build(
        cls, shape: Shape, device: torch.device, dtype: torch.dtype, recorder: Recorder | None = None
    ) -> Models:
        """`recorder`: how the decoder's forwards are recorded."""
        policy = shape.build(_POLICY_SEED, dtype, device)
        tokenizer = shape.tokenizer()
        reward = ProcessRewardModel.from_base(
            shape.build(_REWARD_SEED, dtype, device),
            _OBJECTIVES,
            tuning="frozen",
            tokenizer=tokenizer,
            step_separator=None,
        ).eval()
        decoder = GuidedDecoder(EndlessPolicy(policy, shape.end_id, recorder), reward, TurnBoundary())
        return cls(shape, policy, reward, decoder)

    def cache_bytes_per_token(self) -> int:
        """Of one model."""
        shape, size = self.shape, torch.finfo(self.policy.dtype).bits // 8
        return 2 * shape.layers * shape.kv_heads * (shape.hidden_size // shape.heads) * size


@dataclass(frozen=True)
class Task:
    """One request: `steps` steps of `step_tokens` tokens each, every time the best of `candidates`."""

    prompt_tokens: int
    candidates: int
    steps: int
    step_tokens: int
    temperature: float
    seed: int = 0

    def request(self, shape: Shape, max_steps: int | None = None) -> GuidedRequest:
        """`max_steps`: more of them, where a boundary ends steps early."""
        # The template adds the two speakers and the end of the user's turn.
        generator = torch.Generator().manual_seed(_PROMPT_SEED + self.seed)
        drawn = torch.randint(shape.end_id, (self.prompt_tokens - 3,), generator=generator).tolist()
        return GuidedRequest(
            [{"role": "user", "content": words(drawn)}],
            num_candidates=self.candidates,
            seed=self.seed,
            sampling=SamplingParams(temperature=self.temperature),
            max_new_tokens=self.steps * self.step_tokens,
            max_step_tokens=self.step_tokens,
            max_steps=self.steps if max_steps is None else max_steps,
        )

    def prompt(self, models: Models) -> list[int]:
        """The prompt as the guided decoder encodes it, ASSISTANT last."""
        content = self.request(models.shape).messages[0]
        assert isinstance(content, dict)
        tokenizer = models.shape.tokenizer() if models.reward.tokenizer is None else models.reward.tokenizer
        text = tokenizer.apply_chat_template([content], tokenize=False, add_generation_prompt=True)
        assert text.endswith(ASSISTANT)
        return tokenizer.encode(text, add_special_tokens=False)


@dataclass
class Outcome:
    """What was answered and what it cost. scores[step][candidate][objective]; tokens went through a model.

    Cache bytes are the peak; those copied are of both models.
    """

    seconds: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    scores: list[list[list[float]]] = field(default_factory=list)
    policy_tokens: int = 0
    reward_tokens: int = 0
    policy_cache_bytes: int = 0
    reward_cache_bytes: int = 0
    cache_bytes_copied: int = 0
    phases: dict[str, float] = field(default_factory=dict)
