"""Folders of multi-head policies: backbone (or adapter) apart from the heads.

backbone/            a plain transformers folder (absent when only an adapter is saved)
adapter/             a plain peft folder (with LoRA)
heads.safetensors    one entry per head parameter; the base head once
mahalo.json          objectives, kind of head, what the backbone is
README.md            model card
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mahalo_ray.models.backbone import load_saved_backbone, prefixed, save_backbone
from mahalo_ray.models.folder import (
    HEADS_FILE,
    Figures,
    fill_parameters,
    local_folder,
    read_metadata,
    save_tensors,
    write_card,
    write_metadata,
)
from mahalo_ray.models.heads import LogitTransform

if TYPE_CHECKING:
    from mahalo_ray.models.multi_head import MultiHeadCausalLM

KIND = "multi_head_causal_lm"


def save_policy(
    policy: MultiHeadCausalLM,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    figures: Figures | None,
    state_dict: Mapping[str, Tensor] | None,
    with_backbone: bool | None,
) -> None:
    """Write the policy's folder.

    `state_dict` replaces the model's own (whole) parameters: what a ZeRO-3 engine gathered, under the
    policy's names. `with_backbone` None saves the backbone unless there is a LoRA adapter on a base that has
    a name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(policy.state_dict() if state_dict is None else state_dict)
    if with_backbone is None:
        with_backbone = not policy.has_lora or policy.base_name is None
    if not with_backbone and not policy.has_lora:
        raise ValueError("only a policy with a LoRA adapter can be saved without its backbone")
    if not with_backbone and policy.base_name is None:
        raise ValueError(
            "the backbone comes from a model in memory, without a name to load it from: save it too"
        )
    save_backbone(policy.backbone, folder, prefixed(state, "backbone."), with_backbone)
    heads = {name: state[name] for name in head_parameters(policy)}
    save_tensors(folder / HEADS_FILE, heads)
    write_metadata(
        folder,
        KIND,
        {
            "objectives": list(policy.objectives),
            "head_kind": policy.head_kind,
            "rank": policy.rank,
            "keep_base_head": policy.base_head is not None,
            "vocab_size": policy.vocab_size,
            "hidden_size": policy.hidden_size,
            "head_bias": any(name.endswith("bias") for name in heads),
            "logit_scale": policy.transform.scale,
            "logit_softcap": policy.transform.softcap,
            "base": None if with_backbone else policy.base_name,
            "saved_backbone": with_backbone,
            "adapter": policy.has_lora,
        },
    )
    if policy.generation_config is not None:
        policy.generation_config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    text = (
        "A multi-head policy: one backbone and one vocabulary head per objective. Load it with "
        "`mahalo_ray.models.MultiHeadCausalLM.from_pretrained`, and merge the heads at the weights you want "
        "with `.merge(Weights.parse(...))` into an ordinary transformers model."
    )
    notes = dict.fromkeys(policy.objectives, f"{policy.head_kind} head")
    write_card(folder, "Multi-head policy", text, policy.base_name, notes, figures)


def load_policy(
    cls: type[MultiHeadCausalLM],
    folder: str | Path,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    device: torch.device | str | None,
    backbone: str | Path | None,
) -> MultiHeadCausalLM:
    """Read a policy's folder (or hub repository). `backbone` overrides where an adapter's base model is
    found.

    An adapter is loaded trainable, so that training can go on.
    """
    path = local_folder(folder)
    metadata = read_metadata(path, KIND)
    model, base_name = load_saved_backbone(path, metadata, dtype, attn_implementation, backbone)
    generation = path / "generation_config.json"
    policy = cls(
        model,
        metadata["objectives"],
        metadata["head_kind"],
        LogitTransform(metadata["logit_scale"], metadata["logit_softcap"]),
        metadata["vocab_size"],
        metadata["hidden_size"],
        bias=metadata["head_bias"],
        dtype=next(model.parameters()).dtype,
        rank=metadata["rank"],
        keep_base_head=metadata["keep_base_head"],
        generation_config=GenerationConfig.from_pretrained(str(path)) if generation.is_file() else None,
        base_name=base_name,
    )
    fill_parameters(path / HEADS_FILE, head_parameters(policy))
    return policy.to(device) if device is not None else policy


def head_parameters(policy: MultiHeadCausalLM) -> dict[str, nn.Parameter]:
    """The parameters of `heads.safetensors` by name; what low-rank heads share appears once, as the base
    head's.
    """
    return {
        name: parameter for name, parameter in policy.named_parameters() if not name.startswith("backbone.")
    }
