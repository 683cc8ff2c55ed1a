"""Model folders, wherever they lie, as policies ready to decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mahalo_ray.data import storage
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.policy import CausalPolicy, MultiHeadPolicy, Policy
from mahalo_ray.models.folder import METADATA_FILE
from mahalo_ray.models.foreign import load_scorer
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepScorer


@dataclass(frozen=True)
class Placement:
    """Where a model runs: torch device and dtype names."""

    device: str = "cpu"
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found


def load_policy(url: str, placement: Placement) -> tuple[Policy, ChatFormat]:
    """A multi-head policy (folder with mahalo.json) or an ordinary causal language model, and its chat
    format.

    `url` is a local path or an fsspec URL; raises FileNotFoundError if nothing is there.
    """
    folder = storage.local_copy(url)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy: Policy
    if Path(folder, METADATA_FILE).is_file():
        heads = MultiHeadCausalLM.from_pretrained(
            folder, dtype=placement.torch_dtype, device=placement.device
        )
        policy = MultiHeadPolicy(heads.eval())
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=placement.torch_dtype)
        policy = CausalPolicy(model.to(placement.device).eval())
    return policy, ChatFormat(tokenizer)


def load_reward_model(url: str, placement: Placement) -> ProcessRewardModel:
    """A process reward model saved by us; raises FileNotFoundError if nothing is there."""
    folder = storage.local_copy(url)
    model = ProcessRewardModel.from_pretrained(folder, dtype=placement.torch_dtype, device=placement.device)
    return model.eval()


def load_guide(url: str, placement: Placement, objective: str | None = None) -> StepScorer:
    """Any reward model that can guide decoding: ours, or a sequence or token classifier of another maker,
    for which `objective` names what it scores.
    """
    return load_scorer(storage.local_copy(url), objective, placement.torch_dtype, placement.device)
