"""The part of a transformers causal LM below its head, and the way back to a whole causal LM."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mahalo_ray.models import lora
from mahalo_ray.models.folder import (
    ADAPTER_FOLDER,
    BACKBONE_FOLDER,
    HEADS_FILE,
    fill_parameters,
    local_folder,
    read_metadata,
)
from mahalo_ray.models.heads import LogitTransform
from mahalo_ray.models.lora import load_adapter
from mahalo_ray.models.pair_attention import read_packed_pairs
from mahalo_ray.models.sharding import is_sharded


def load_causal_lm(
    base: str | Path | PreTrainedModel,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal LM from a folder or hub id (dtype None: as stored); a model object is returned as it is."""
    if isinstance(base, PreTrainedModel):
        if dtype is not None:
            base = base.to(dtype)
        if attn_implementation is not None:
            base.set_attn_implementation(attn_implementation)
        return base
    return AutoModelForCausalLM.from_pretrained(
        str(base), dtype="auto" if dtype is None else dtype, attn_implementation=attn_implementation
    )


def load_backbone(
    source: str | Path, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The base model (no head) from a folder or hub id; dtype None keeps the stored one."""
    return AutoModel.from_pretrained(
        str(source), dtype="auto" if dtype is None else dtype, attn_implementation=attn_implementation
    )


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id."""
    return AutoTokenizer.from_pretrained(str(source))


def split_causal_lm(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module, LogitTransform]:
    """(backbone, output layer, what follows it). ValueError if the model is not built that way."""
    head = model.get_output_embeddings()
    backbone = model.base_model
    if model.config.is_encoder_decoder or head is None or backbone is model:
        raise ValueError(f"{type(model).__name__} is not a causal language model with a backbone and a head")
    transform = LogitTransform.of(model.config)
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        _check_split(model, backbone, head, transform)
    return backbone, head, transform


@torch.no_grad()
def _check_split(
    model: PreTrainedModel, backbone: PreTrainedModel, head: nn.Module, transform: LogitTransform
) -> None:
    """Two tokens through the whole model and through its parts: a family with other tricks must not pass
    silently.
    """
    training = model.training
    model.eval()
    ids = torch.tensor([[1, 2]], device=model.device) % model.config.get_text_config().vocab_size
    whole = model(input_ids=ids, use_cache=False).logits.float()
    parts = transform(head(backbone(input_ids=ids, use_cache=False).last_hidden_state)).float()
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if (whole - parts).abs().max() > tolerance * whole.abs().max():
        raise ValueError(
            f"{type(model).__name__}: head(backbone(x)) differs from the model's own logits by up to "
            f"{(whole - parts).abs().max():.3g}; what this family does between the two is not supported"
        )


def assemble_causal_lm(backbone: nn.Module, weight: Tensor, bias: Tensor | None) -> PreTrainedModel:
    """An ordinary untied causal LM from a plain backbone and a head weight [V, D] (bias [V])."""
    config: PretrainedConfig = backbone.config
    # Built without memory; its only real parts are put in below.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        head.bias = nn.Parameter(bias.detach().clone())
    setattr(model, model.base_model_prefix, backbone)
    model.set_output_embeddings(head)
    model.config = copy.deepcopy(config)
    model.config.tie_word_embeddings = False
    model.config.architectures = [type(model).__name__]
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ValueError(
            f"{type(model).__name__} has parameters besides its backbone and head: {', '.join(left)}"
        )
    return model.eval()


def run_backbone(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Final normalised hidden states [B, T, D]; kwargs reach the backbone and its attention function."""
    kwargs.setdefault("use_cache", False)
    return backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state


def save_backbone(
    backbone: PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor],
    with_backbone: bool | None,
    base_name: str | None,
    unchanged: bool,
) -> dict[str, Any]:
    """Write the backbone as a plain transformers folder and its LoRA adapter, if any, as a plain peft folder;
    returns what `load_saved_backbone` needs to know.

    `state` holds the whole model's parameters, the backbone's under `backbone.` (under ZeRO-3 the modules
    hold only shards). `with_backbone` None saves the backbone unless there is an adapter on a base that has a
    name. `unchanged`: below an adapter, the backbone is as it was loaded. ValueError for one that is to be
    left out although it is not, or has no name to load it from.
    """
    adapter = isinstance(backbone, PeftModel)
    if with_backbone is None:
        with_backbone = not adapter or base_name is None
    if not with_backbone and not unchanged:
        raise ValueError("a backbone that was trained itself cannot be left out: save it too")
    if not with_backbone and base_name is None:
        raise ValueError(
            "the backbone comes from a model in memory, without a name to load it from: save it too"
        )
    state = prefixed(state, "backbone.")
    plain, plain_state = backbone, dict(state)
    if isinstance(backbone, PeftModel):
        backbone.save_pretrained(
            str(folder / ADAPTER_FOLDER), state_dict=plain_state, save_embedding_layers=False
        )
        plain = backbone.get_base_model()
        plain_state = {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
            for name, tensor in state.items()
            if ".lora_" not in name
        }
    if with_backbone:
        plain.save_pretrained(str(folder / BACKBONE_FOLDER), state_dict=plain_state)
    return {
        "base": None if with_backbone else base_name,
        "saved_backbone": with_backbone,
        "adapter": adapter,
    }


class SavedModel(NamedTuple):
    """A model folder with its backbone read, and how; `base_name`: where the backbone was found."""

    folder: Path
    metadata: Mapping[str, Any]
    backbone: PreTrainedModel
    base_name: str
    dtype: torch.dtype | None
    attn_implementation: str | None


def load_saved_backbone(
    folder: Path,
    metadata: Mapping[str, Any],
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    source: str | Path | None,
) -> SavedModel:
    """The backbone of a folder written by `save_backbone`; `source` overrides where its base is found.

    An adapter comes trainable, so that training can go on.
    """
    if source is None:
        source = folder / BACKBONE_FOLDER if metadata["saved_backbone"] else metadata["base"]
    try:
        backbone = load_backbone(source, dtype, attn_implementation)
    except OSError as error:
        raise ValueError(
            f"{folder} was saved without its backbone, which cannot be loaded from '{source}': pass "
            f"backbone=, the folder or hub id of that model ({error})"
        ) from error
    if metadata["adapter"]:
        backbone = load_adapter(backbone, folder / ADAPTER_FOLDER)
    return SavedModel(folder, metadata, backbone, str(source), dtype, attn_implementation)


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


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
