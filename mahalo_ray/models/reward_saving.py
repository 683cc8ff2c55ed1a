"""Folders of process reward models: like a policy's, with score heads, tokenizer, calibration and reference.

backbone/ or adapter/   as for policies
reference/              the reference's base model, unless it is the backbone itself
heads.safetensors       score heads, and the reference's vocabulary head unless it is the embedding
mahalo.json             objectives with their output kinds, head inputs, calibration
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mahalo_ray.models.backbone import (
    load_backbone,
    load_saved_backbone,
    load_tokenizer,
    prefixed,
    save_backbone,
)
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
from mahalo_ray.models.heads import FullHead, LogitTransform
from mahalo_ray.models.reference import FrozenReference
from mahalo_ray.models.sharding import full_shape, sharded_creation

if TYPE_CHECKING:
    from mahalo_ray.models.reward import ProcessRewardModel

KIND = "process_reward_model"
REFERENCE_FOLDER = "reference"


def save_reward_model(
    reward: ProcessRewardModel,
    folder: Path,
    figures: Figures | None,
    state_dict: Mapping[str, Tensor] | None,
    with_backbone: bool | None,
) -> None:
    """Write the reward model's folder.

    `state_dict` replaces the model's own (whole) parameters, as for policies. `with_backbone` None saves the
    backbone unless there is a LoRA adapter on a base that has a name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(reward.state_dict() if state_dict is None else state_dict)
    if with_backbone is None:
        with_backbone = reward.tuning != "lora" or reward.base_name is None
    if not with_backbone and (reward.base_name is None or reward.tuning == "full"):
        raise ValueError("the backbone cannot be loaded from anywhere else: save it too")
    save_backbone(reward.backbone, folder, prefixed(state, "backbone."), with_backbone)
    if reward.reference is not None and reward.reference.backbone is not None:
        reference_state = prefixed(state, "reference.backbone.")
        reward.reference.backbone.save_pretrained(str(folder / REFERENCE_FOLDER), state_dict=reference_state)
    save_tensors(folder / HEADS_FILE, {name: state[name] for name in own_parameters(reward)})
    write_metadata(
        folder,
        KIND,
        {
            "objectives": reward.output_kinds,
            "inputs": list(reward.inputs),
            "head_hidden_size": reward.head_hidden_size,
            "tuning": reward.tuning,
            "step_separator": reward.step_separator,
            "reference": describe_reference(reward),
            "calibration": reward.calibration,
            "tokenizer": reward.tokenizer is not None,
            "base": None if with_backbone else reward.base_name,
            "saved_backbone": with_backbone,
            "adapter": reward.tuning == "lora",
        },
    )
    if reward.tokenizer is not None:
        reward.tokenizer.save_pretrained(str(folder))
    text = (
        "A process reward model: one score per step and objective, in one forward pass. Load it with "
        "`mahalo_ray.models.ProcessRewardModel.from_pretrained` and call `.score(prompt, steps)`."
    )
    notes = {name: f"{kind}{_calibration_note(reward, name)}" for name, kind in reward.output_kinds.items()}
    write_card(folder, "Process reward model", text, reward.base_name, notes, figures)


def _calibration_note(reward: ProcessRewardModel, name: str) -> str:
    if name not in reward.calibration:
        return ", not calibrated"
    own = reward.calibration[name]
    return f", mean {own['mean']:.3g}, std {own['std']:.3g} on {own['count']} held-out steps"


def describe_reference(reward: ProcessRewardModel) -> dict[str, Any] | None:
    """What `load_reference` needs besides the weights."""
    reference = reward.reference
    if reference is None:
        return None
    vocab_size, hidden_size = full_shape(reference.head.weight)
    reader: PreTrainedModel = reward.backbone if reference.backbone is None else reference.backbone
    return {
        "own_backbone": reference.backbone is not None,
        "tied_head": reference.head.weight is reader.get_input_embeddings().weight,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "head_bias": reference.head.bias is not None,
        "logit_scale": reference.head.transform.scale,
        "logit_softcap": reference.head.transform.softcap,
    }


def load_reference(
    folder: Path,
    described: Mapping[str, Any],
    model: PreTrainedModel,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
) -> FrozenReference:
    """The reference as described; its own backbone is read here, its head is filled with the other heads."""
    own = (
        load_backbone(folder / REFERENCE_FOLDER, dtype, attn_implementation)
        if described["own_backbone"]
        else None
    )
    reader = model if own is None else own
    embedding = reader.get_input_embeddings().weight
    transform = LogitTransform(described["logit_scale"], described["logit_softcap"])
    with sharded_creation():
        head = FullHead.empty(
            described["vocab_size"],
            described["hidden_size"],
            described["head_bias"],
            transform,
            embedding.dtype,
        )
    if described["tied_head"]:
        head.weight = embedding
    return FrozenReference(own, head)


def own_parameters(reward: ProcessRewardModel) -> dict[str, nn.Parameter]:
    """The parameters of `heads.safetensors` by name: all but the backbones' (and what is tied to them)."""
    return {
        name: parameter
        for name, parameter in reward.named_parameters()
        if not name.startswith(("backbone.", "reference.backbone."))
    }


def load_reward_model(
    cls: type[ProcessRewardModel],
    folder: str | Path,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    device: torch.device | str | None,
    backbone: str | Path | None,
) -> ProcessRewardModel:
    """Read a reward model's folder (or hub repository); `backbone` overrides where its base is found."""
    path = local_folder(folder)
    metadata = read_metadata(path, KIND)
    model, base_name = load_saved_backbone(path, metadata, dtype, attn_implementation, backbone)
    reference = None
    if metadata["reference"] is not None:
        reference = load_reference(path, metadata["reference"], model, dtype, attn_implementation)
    reward = cls(
        model,
        metadata["objectives"],
        metadata["inputs"],
        metadata["head_hidden_size"],
        metadata["tuning"],
        reference,
        load_tokenizer(path) if metadata["tokenizer"] else None,
        metadata["step_separator"],
        base_name=base_name,
    )
    reward.calibration = metadata["calibration"]
    fill_parameters(path / HEADS_FILE, own_parameters(reward))
    return reward.to(device) if device is not None else reward
