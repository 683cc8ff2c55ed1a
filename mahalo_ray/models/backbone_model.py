"""What the policy and the reward model share: a module that owns a transformers backbone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mahalo_ray.models import lora
from mahalo_ray.models.backbone import run_backbone
from mahalo_ray.models.pair_attention import read_packed_pairs


class BackboneModel(nn.Module):
    """A module on a transformers base model (no head), perhaps with a LoRA adapter."""

    backbone: PreTrainedModel

    @property
    def config(self) -> PretrainedConfig:
        """The backbone's transformers config."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Where the first backbone parameter lies."""
        return next(self.backbone.parameters()).device

    @property
    def has_lora(self) -> bool:
        """Whether the backbone carries a LoRA adapter."""
        return isinstance(self.backbone, lora.PeftModel)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Final normalised states [B, T, D]; kwargs (position_ids, kv_cache...) reach the backbone."""
        return run_backbone(self.backbone, input_ids, attention_mask, kwargs)

    def read_packed_pairs(self) -> None:
        """Switch to the attention of packed pairs, once it has been seen to compute the same (with whole
        parameters); ValueError if it does not."""
        plain = self.backbone.get_base_model() if self.has_lora else self.backbone
        read_packed_pairs(plain)

    def set_attn_implementation(self, name: str) -> None:
        """Switch the attention function ("sdpa", "eager", or one registered with transformers)."""
        plain = self.backbone.get_base_model() if self.has_lora else self.backbone
        plain.set_attn_implementation(name)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the backbone's layers in backward instead of keeping their activations."""
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.backbone.gradient_checkpointing_disable()

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The backbone's trainable parameters: the adapter's with LoRA, none when it is frozen."""
        return (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)
