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

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mahalo_ray.models.backbone import SavedModel, save_backbone
from mahalo_ray.models.folder import HEADS_FILE, Figures, save_tensors, write_card, write_metadata
from mahalo_ray.models.heads import LogitTransform

if TYPE_CHECKING:
    from mahalo_ray.models.multi_head import MultiHeadCausalLM


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
    policy's names. `with_backbone`: see `save_backbone`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(policy.state_dict() if state_dict is None else state_dict)
    saved = save_backbone(
        policy.backbone, folder, state, with_backbone, policy.base_name, unchanged=policy.has_lora
    )
    heads = {name: state[name] for name in policy.own_parameters()}
    save_tensors(folder / HEADS_FILE, heads)
    write_metadata(
        folder,
        policy.kind,
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
            **saved,
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


def policy_of(cls: type[MultiHeadCausalLM], saved: SavedModel) -> MultiHeadCausalLM:
    """The policy that a folder describes, its heads not yet filled."""
    metadata, folder = saved.metadata, saved.folder
    generation = folder / "generation_config.json"
    return cls(
        saved.backbone,
        metadata["objectives"],
        metadata["head_kind"],
        LogitTransform(metadata["logit_scale"], metadata["logit_softcap"]),
        metadata["vocab_size"],
        metadata["hidden_size"],
        bias=metadata["head_bias"],
        dtype=next(saved.backbone.parameters()).dtype,
        rank=metadata["rank"],
        keep_base_head=metadata["keep_base_head"],
        generation_config=GenerationConfig.from_pretrained(str(folder)) if generation.is_file() else None,
        base_name=saved.base_name,
    )
