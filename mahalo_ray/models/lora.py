"""LoRA adapters on a backbone, through peft."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mahalo_ray.config import LoraConfig
from mahalo_ray.models.folder import ADAPTER_FOLDER


def check_no_adapter(model: nn.Module) -> None:
    """ValueError if peft layers sit inside the model: their parameters would pass for the model's own."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model already carries a peft adapter: merge or unload it first")


def with_lora(backbone: nn.Module, settings: LoraConfig) -> PeftModel:
    """The backbone wrapped with a new, trainable adapter (LoRA, Hu et al. 2021, arXiv 2106.09685). It is
    changed in place and its own parameters are frozen. ValueError if it has an adapter already.
    """
    check_no_adapter(backbone)
    targets = settings.target_modules
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    return peft.get_peft_model(backbone, config)


def load_adapter(backbone: nn.Module, folder: Path) -> PeftModel:
    """The backbone with the adapter saved in `folder`, trainable."""
    return PeftModel.from_pretrained(backbone, str(folder), is_trainable=True)


def saved_lora(folder: Path) -> LoraConfig:
    """The shape of the adapter that was saved in a model's folder."""
    saved = peft.LoraConfig.from_pretrained(str(folder / ADAPTER_FOLDER))
    targets = saved.target_modules
    return LoraConfig(
        rank=saved.r,
        alpha=saved.lora_alpha,
        dropout=saved.lora_dropout,
        target_modules=sorted(targets) if isinstance(targets, set | list) else "all-linear",
    )


def fold_adapter(backbone: nn.Module, copied: bool) -> nn.Module:
    """The backbone without peft: the adapter, if any, folded into the weights.

    `copied` leaves the given backbone untouched; without it an adapter is folded in place and a plain
    backbone is returned as it is.
    """
    backbone = copy.deepcopy(backbone) if copied else backbone
    return backbone.merge_and_unload() if isinstance(backbone, PeftModel) else backbone


@contextmanager
def adapter_disabled(backbone: nn.Module) -> Iterator[None]:
    """Inside, the backbone computes what it computed before the adapter was added."""
    if not isinstance(backbone, PeftModel):
        raise ValueError("the backbone has no LoRA adapter to disable: call add_lora first")
    with backbone.disable_adapter():
        yield
