"""What DeepSpeed, the optimizer and the schedule are told."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mahalo_ray.config import PolicyConfig, TrainingConfig
from mahalo_ray.training.deepspeed_config import (
    deepspeed_config,
    learning_rate_factor,
    optimizer_and_schedule,
    parameter_group,
)


def test_clipping_is_always_explicit() -> None:
    off = deepspeed_config(TrainingConfig(gradient_clipping=0.0), torch.float32, 2)
    assert off["gradient_clipping"] == 0.0
    assert off["gradient_accumulation_steps"] == 2
    assert "bf16" not in off and "fp16" not in off


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_and_offload_are_passed_on(stage: int) -> None:
    training = TrainingConfig(zero_stage=stage, offload_optimizer=stage > 0, offload_parameters=stage == 3)
    zero = deepspeed_config(training, torch.bfloat16, 1)["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero) == (stage > 0)
    assert ("offload_param" in zero) == (stage == 3)


def test_only_fp32_and_bf16() -> None:
    assert deepspeed_config(TrainingConfig(), torch.bfloat16, 1)["bf16"]["enabled"]
    with pytest.raises(ValueError, match="float16"):
        deepspeed_config(TrainingConfig(), torch.float16, 1)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)]
)
def test_schedules_warm_up_then_fall(schedule: str, middle: float, end: float) -> None:
    training = TrainingConfig(schedule=schedule, warmup_fraction=0.2)  # type: ignore[arg-type]
    factor = learning_rate_factor(training, steps=20)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(12) == pytest.approx(middle)
    assert factor(20) == pytest.approx(end)
    in_steps = learning_rate_factor(TrainingConfig(schedule=schedule, warmup_steps=4), 20)  # type: ignore[arg-type]
    assert [in_steps(step) for step in range(20)] == [factor(step) for step in range(20)]
    with pytest.raises(ValidationError, match="not both"):
        TrainingConfig(warmup_steps=4, warmup_fraction=0.2)


def test_groups_have_their_own_rates_and_vectors_do_not_decay() -> None:
    layer = nn.Linear(3, 4)
    groups = parameter_group("backbone", list(layer.parameters()), 0.1, weight_decay=0.01)
    groups += parameter_group("heads", [nn.Parameter(torch.zeros(2, 2))], 0.6, weight_decay=0.0)
    optimizer, schedule = optimizer_and_schedule(
        groups, TrainingConfig(warmup_fraction=0.0, schedule="linear"), 10
    )
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [("backbone", 0.1, 0.01), ("backbone", 0.1, 0.0), ("heads", 0.6, 0.0)]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.09, 0.09, 0.54])


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_named_with_its_extra() -> None:
    message = r"'wandb' needs the package wandb, .*: pip install 'mahalo_ray\[wandb\]'"
    with pytest.raises(ValueError, match=message):
        TrainingConfig(report_to=["tensorboard", "wandb"])
    with pytest.raises(ValueError, match="'tensorboard', 'mlflow', 'trackio' or 'wandb'"):
        TrainingConfig(report_to=["comet"])  # type: ignore[list-item]


def test_a_later_option_counts_where_it_is_set() -> None:
    """What was made before there was such an option stays valid."""
    plain, anchored = PolicyConfig().shaping(), PolicyConfig(chosen_anchor=0.5).shaping()
    assert "chosen_anchor" not in plain and "chosen_penalty" not in anchored
    assert anchored == plain | {"chosen_anchor": 0.5}
