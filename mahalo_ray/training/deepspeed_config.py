"""TrainingConfig -> DeepSpeed's JSON, optimizer and schedule: nothing is left to DeepSpeed's own defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mahalo_ray.config import TrainingConfig
from mahalo_ray.models.heads import full_shape

# Elements, not bytes. DeepSpeed allocates buffers of this size; its default of 5e8 is 2 GB in fp32.
BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(training: TrainingConfig, dtype: torch.dtype, accumulation: int) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize`. fp32 or bf16 with fp32 master weights; no fp16."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"training in {dtype} is not supported: use float32 or bfloat16")
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size_per_device,
        "gradient_accumulation_steps": accumulation,
        # 0.0 = off; left out, DeepSpeed would clip at 1.0.
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Offloading works with torch's AdamW; DeepSpeed's own CPU Adam needs a compiler at run time.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def parameter_group(
    name: str, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups of one learning rate; weight decay is for matrices only, not for biases and norms."""
    if weight_decay == 0.0:
        return [{"name": name, "params": parameters, "lr": learning_rate, "weight_decay": 0.0}]
    matrices = [parameter for parameter in parameters if len(full_shape(parameter)) >= 2]
    vectors = [parameter for parameter in parameters if len(full_shape(parameter)) < 2]
    groups = ((matrices, weight_decay), (vectors, 0.0))
    return [
        {"name": name, "params": members, "lr": learning_rate, "weight_decay": decay}
        for members, decay in groups
        if members
    ]


def optimizer_and_schedule(
    groups: list[dict[str, Any]], training: TrainingConfig, steps: int
) -> tuple[AdamW, LambdaLR]:
    """AdamW over the groups and the schedule that multiplies every group's learning rate."""
    optimizer = AdamW(groups, betas=training.adam_betas)
    return optimizer, LambdaLR(optimizer, learning_rate_factor(training, steps))


def learning_rate_factor(training: TrainingConfig, steps: int) -> Callable[[int], float]:
    """Factor of step 0, 1, ...: linear warm-up over `warmup_steps`, or `warmup_fraction` of the steps, then
    constant, or linear or cosine down to 0 after the last step."""
    fraction, given = training.warmup_fraction, training.warmup_steps
    warmup = math.ceil(fraction * steps) if given is None else given

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        if training.schedule == "constant":
            return 1.0
        if training.schedule == "linear":
            return 1.0 - done
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
