"""DeepSpeed around a recipe's model: start it, step it, ask it, and take the whole model out again."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from mahalo_ray.config import TrainingConfig
from mahalo_ray.models.lean_layers import keep_fewer_activations
from mahalo_ray.models.sharding import gathered, is_sharded
from mahalo_ray.training.deepspeed_config import deepspeed_config, optimizer_and_schedule
from mahalo_ray.training.recipe import LossModule, Recipe, Tensors

Loaded = TypeVar("Loaded", bound=nn.Module)

# DeepSpeed would compile this CPU extension at first use: about a minute, and it needs a compiler. gloo does
# without.
__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def build_engine(
    recipe: Recipe, training: TrainingConfig, dtype: torch.dtype, seed: int, accumulation: int
) -> Any:
    """The recipe's model under DeepSpeed, the same on every worker; random numbers (dropout) after this are
    each worker's own."""
    config = deepspeed_config(training, dtype, accumulation)
    torch.manual_seed(seed)
    with sharded_loading(config):
        if training.zero_stage < 3:
            model = loaded_in_turn(recipe.build_model, training_device())
        else:
            model = recipe.build_model()
    check_shards_finite(model)
    if training.gradient_checkpointing:
        recipe.enable_gradient_checkpointing(model)
    else:
        keep_fewer_activations(model)
    groups = recipe.parameter_groups(model)
    optimizer, schedule = optimizer_and_schedule(groups, training, len(recipe.batches))
    engine, *_ = deepspeed.initialize(
        model=LossModule(model, recipe.loss), optimizer=optimizer, lr_scheduler=schedule, config=config
    )
    engine.train()
    torch.manual_seed(seed + dist.get_rank())
    return engine


def check_shards_finite(model: nn.Module) -> None:
    """ValueError naming the parameters (of this worker's shard, under ZeRO-3) that hold a NaN or an
    infinity."""
    damaged = [
        name
        for name, parameter in model.named_parameters()
        if not torch.isfinite(cast(Any, parameter).ds_tensor if is_sharded(parameter) else parameter).all()
    ]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise ValueError(
            f"the model that training starts from has values that are not finite (NaN or infinity) in "
            f"{', '.join(damaged[:3])}{more}: its weights are damaged, take another copy or checkpoint"
        )


def loaded_in_turn(load: Callable[[], Loaded], device: torch.device) -> Loaded:
    """The model that `load` makes, on the device. Workers of a node that move it to a GPU do so one after the
    other, so that the node's memory holds one model at a time; on CPUs it stays in that memory anyway."""
    if device.type == "cpu":
        return load()
    local_rank, model = int(os.environ["LOCAL_RANK"]), None
    of_node = torch.tensor(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device=device)
    dist.all_reduce(of_node, op=dist.ReduceOp.MAX)
    for turn in range(int(of_node)):
        if turn == local_rank:
            model = load().to(device)
        dist.barrier()
    assert model is not None
    return model


@contextmanager
def sharded_loading(config: dict[str, Any]) -> Iterator[None]:
    """Inside, models are created sharded if the DeepSpeed config says ZeRO-3: no worker ever holds a full
    copy."""
    if config["zero_optimization"]["stage"] < 3:
        yield
        return
    alive = HfDeepSpeedConfig(config)  # transformers holds only a weak reference to it
    try:
        yield
    finally:
        del alive
        hf_deepspeed.unset_hf_deepspeed_config()


def optimizer_step(engine: Any) -> float | None:
    """Update the parameters; the norm of the gradient before clipping, or None if it was not finite on some
    worker: then nothing was updated."""
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
        # Without ZeRO DeepSpeed neither checks nor reports; the averaged gradients are whole on every worker.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            return None
        engine.step()
        return norm
    engine.step()
    norm = float(engine.get_global_grad_norm())
    return norm if engine.was_step_applied() and math.isfinite(norm) else None


def infer(engine: Any, function: Callable[..., Tensor], tensors: Tensors) -> Tensor:
    """function(model, **tensors) under the engine, in evaluation mode and without gradients."""
    engine.eval()
    with torch.no_grad():
        result: Tensor = engine(function, **to_device(tensors, engine.device))
    engine.train()
    return result


def training_device() -> torch.device:
    """This worker's device, the one DeepSpeed takes too."""
    kind = get_accelerator().device_name()
    return torch.device(kind) if kind == "cpu" else torch.device(kind, int(os.environ["LOCAL_RANK"]))


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """Every tensor on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def whole_state_dict(model: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """All parameters and saved buffers (or the parameters that are trained alone) on the CPU of rank 0 (empty
    elsewhere), gathered one at a time.

    Every worker must call it.
    """
    keep = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    saved = model.state_dict().keys()  # without buffers that are made anew at loading
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    tensors: Mapping[str, Tensor] = trained if trained_only else {**parameters, **buffers}
    for name, tensor in tensors.items():
        with gathered([tensor] if isinstance(tensor, nn.Parameter) and is_sharded(tensor) else []):
            if keep:
                state[name] = tensor.detach().cpu().clone()
    return state
