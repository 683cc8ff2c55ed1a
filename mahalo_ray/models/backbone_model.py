"""What the policy and the reward model share: a module that owns a transformers backbone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mahalo_ray.models import lora
from mahalo_ray.models.backbone import SavedModel, load_saved_backbone, run_backbone
from mahalo_ray.models.folder import HEADS_FILE, fill_parameters, local_folder, read_metadata
from mahalo_ray.models.pair_attention import read_packed_pairs


class BackboneModel(nn.Module):
    """A module on a transformers base model (no head), perhaps with a LoRA adapter."""

    kind: ClassVar[str]  # of model, as its folder says
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

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of `heads.safetensors` by name: all but the backbones' (and what is tied to them).
        What heads share appears once."""
        backbones = ("backbone.", "reference.backbone.")
        return {name: own for name, own in self.named_parameters() if not name.startswith(backbones)}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        device: torch.device | str | None = None,
        backbone: str | Path | None = None,
    ) -> Self:
        """Read a folder (or hub repository) written by `save_pretrained`.

        `backbone` overrides where an adapter's base model is found. An adapter comes trainable, so that
        training can go on. ValueError for a folder of another kind or a newer format, and what is missing.
        """
        path = local_folder(folder)
        metadata = read_metadata(path, cls.kind)
        model = cls._of_saved(load_saved_backbone(path, metadata, dtype, attn_implementation, backbone))
        fill_parameters(path / HEADS_FILE, model.own_parameters())
        return model if device is None else model.to(device)

    @classmethod
    def _of_saved(cls, saved: SavedModel) -> Self:
        """The model as its folder describes it, its own parameters not yet filled."""
        raise NotImplementedError
