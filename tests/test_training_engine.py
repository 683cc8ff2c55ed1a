"""DeepSpeed in one process: a gradient that is not finite reaches no parameter, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mahalo_ray.config import TrainingConfig
from mahalo_ray.training.batches import Indices, RowGroups
from mahalo_ray.training.deepspeed_config import parameter_group
from mahalo_ray.training.deepspeed_engine import build_engine, infer, optimizer_step, whole_state_dict
from mahalo_ray.training.recipe import LossOutput, Tensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_alone")]


class RootRecipe:
    """loss = sum of sqrt(w x): finite at x = 0, where its gradient is not."""

    row_groups = RowGroups(*(np.ones(2, dtype=np.int64),) * 3)
    batches = [np.arange(2)] * 4
    metric_names = ()

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1, bias=False)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        nn.init.constant_(next(model.parameters()), 1.0)
        return parameter_group("model", list(model.parameters()), 0.1, 0.0)

    def loss_denominators(self, batch: Indices) -> dict[str, float]:
        return {}

    def collate(self, units: Indices, loss_denominators: Mapping[str, float], counted: bool) -> Tensors:
        return {"x": torch.ones(len(units), 2)}

    def loss(self, model: nn.Module, **tensors: Tensor) -> LossOutput:
        losses = model(tensors["x"])[:, 0].clamp(min=0).sqrt().float()
        return losses.sum(), losses.detach(), losses.new_zeros(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_a_bad_gradient_is_seen_and_updates_nothing(stage: int, dtype: torch.dtype, clipping: float) -> None:
    training = TrainingConfig(zero_stage=stage, gradient_clipping=clipping, warmup_fraction=0.0)  # type: ignore[arg-type]
    engine = build_engine(RootRecipe(), training, dtype, seed=0, accumulation=1)  # type: ignore[arg-type]

    def step(x: Tensor) -> float | None:
        engine.backward(engine(x=x.to(dtype))[0])
        return optimizer_step(engine)

    norm = step(torch.tensor([[1.0, 1.0]]))
    assert norm == pytest.approx(0.5, rel=1e-2)  # d sqrt(w1 + w2) / dw = 1 / (2 sqrt 2), twice
    before = whole_state_dict(engine.module.model)["weight"].clone()
    assert not torch.equal(before, torch.ones(1, 2))
    assert torch.isfinite(engine(x=torch.zeros(1, 2, dtype=dtype))[0])
    assert step(torch.zeros(1, 2)) is None
    assert torch.equal(whole_state_dict(engine.module.model)["weight"], before)
    told = infer(engine, lambda model, x: model(x), {"x": torch.ones(1, 2, dtype=dtype)})
    assert not told.requires_grad and engine.module.training
