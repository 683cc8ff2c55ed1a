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

from torch import Tensor
from transformers import PreTrainedModel

from mahalo_ray.models.backbone import SavedModel, load_backbone, load_tokenizer, prefixed, save_backbone
from mahalo_ray.models.folder import HEADS_FILE, Figures, save_tensors, write_card, write_metadata
from mahalo_ray.models.heads import FullHead, LogitTransform
from mahalo_ray.models.reference import FrozenReference
from mahalo_ray.models.sharding import full_shape, sharded_creation

if TYPE_CHECKING:
    from mahalo_ray.models.reward import ProcessRewardModel

REFERENCE_FOLDER = "reference"


def save_reward_model(
    reward: ProcessRewardModel,
    folder: Path,
    figures: Figures | None,
    state_dict: Mapping[str, Tensor] | None,
    with_backbone: bool | None,
) -> None:
    """Write the reward model's folder.

    `state_dict` replaces the model's own (whole) parameters, as for policies. `with_backbone`: see
    `save_backbone`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(reward.state_dict() if state_dict is None else state_dict)
    unchanged = reward.tuning != "full"
    saved = save_backbone(reward.backbone, folder, state, with_backbone, reward.base_name, unchanged)
    if reward.reference is not None and reward.reference.backbone is not None:
        reference_state = prefixed(state, "reference.backbone.")
        reward.reference.backbone.save_pretrained(str(folder / REFERENCE_FOLDER), state_dict=reference_state)
    save_tensors(folder / HEADS_FILE, {name: state[name] for name in reward.own_parameters()})
    write_metadata(
        folder,
        reward.kind,
        {
            "objectives": reward.output_kinds,
            "inputs": list(reward.inputs),
            "head_hidden_size": reward.head_hidden_size,
            "tuning": reward.tuning,
            "step_separator": reward.step_separator,
            "reference": describe_reference(reward),
            "calibration": reward.calibration,
            "tokenizer": reward.tokenizer is not None,
            **saved,
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


def load_reference(saved: SavedModel) -> FrozenReference | None:
    """The reference as described, if any; its own backbone is read here, its head is filled with the other
    heads."""
    described = saved.metadata["reference"]
    if described is None:
        return None
    own = None
    if described["own_backbone"]:
        own = load_backbone(saved.folder / REFERENCE_FOLDER, saved.dtype, saved.attn_implementation)
    reader = saved.backbone if own is None else own
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


def reward_model_of(cls: type[ProcessRewardModel], saved: SavedModel) -> ProcessRewardModel:
    """The reward model that a folder describes, its heads not yet filled."""
    metadata = saved.metadata
    reward = cls(
        saved.backbone,
        metadata["objectives"],
        metadata["inputs"],
        metadata["head_hidden_size"],
        metadata["tuning"],
        load_reference(saved),
        load_tokenizer(saved.folder) if metadata["tokenizer"] else None,
        metadata["step_separator"],
        base_name=saved.base_name,
    )
    reward.calibration = metadata["calibration"]
    return reward
