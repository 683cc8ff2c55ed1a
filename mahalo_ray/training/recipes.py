"""Which recipe belongs to which settings. Only workers import this: the recipes need DeepSpeed."""

from __future__ import annotations

from mahalo_ray.training.policy_recipe import PolicyRecipe
from mahalo_ray.training.recipe import Recipe
from mahalo_ray.training.reward_recipe import RewardRecipe
from mahalo_ray.training.settings import PolicySettings, RewardSettings, SftSettings, StageSettings
from mahalo_ray.training.sft_recipe import SftRecipe


def build_recipe(settings: StageSettings) -> Recipe:
    """The recipe of these settings; reads the data."""
    if isinstance(settings, SftSettings):
        return SftRecipe(settings)
    if isinstance(settings, RewardSettings):
        return RewardRecipe(settings)
    if isinstance(settings, PolicySettings):
        return PolicyRecipe(settings)
    raise TypeError(f"no recipe for {type(settings).__name__}")
