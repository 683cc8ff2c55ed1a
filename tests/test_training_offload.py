"""Offloading and recomputed activations, as the config asks for them: the same steps as plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_world as world
from test_training_distributed import COMMON, SEED, plain_losses

from mahalo_ray.config import PolicyConfig, TrainingConfig
from mahalo_ray.training.deepspeed_engine import build_engine, infer, optimizer_step, whole_state_dict
from mahalo_ray.training.policy_recipe import PolicyRecipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_alone")]

SETTINGS: dict[str, dict[str, Any]] = {
    "optimizer": {"zero_stage": 2, "offload_optimizer": True},
    "optimizer and parameters": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "recomputed activations": {"zero_stage": 3, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_steps_as_plain_torch(name: str, tmp_path: Path) -> None:
    base = world.make_base(tmp_path / "base")
    pairs = world.save_pairs(tmp_path / "pairs", world.make_pairs())
    training = TrainingConfig(
        **{**COMMON, "micro_batch_size_per_device": 7, **SETTINGS[name], "max_steps": 4}
    )
    policy = PolicyConfig(head_learning_rate=2e-2, training=training)

    def make() -> PolicyRecipe:
        return PolicyRecipe(world.policy_settings(pairs, base, policy, 0.2, world.MODEL))

    expected, state = plain_losses(make, training)
    recipe = make()
    engine = build_engine(recipe, training, torch.float32, SEED, accumulation=1)
    # Whether activations are recomputed shows in how often a layer begins in a step.
    runs, losses = [], list[float]()
    engine.module.model.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for batch in recipe.batches:
        loss, *_ = engine(**recipe.collate(batch, recipe.loss_denominators(batch), True))
        engine.backward(loss)
        assert optimizer_step(engine) is not None
        losses.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len(runs) == len(losses) * (2 if training.gradient_checkpointing else 1)
    for parameter, tensor in whole_state_dict(engine.module.model).items():
        torch.testing.assert_close(tensor, state[parameter], rtol=1e-4, atol=1e-5)
    assert {"held_out/pairs", "prompts_shared"} < set(recipe.finish(lambda f, t: infer(engine, f, t), 0, 1))
