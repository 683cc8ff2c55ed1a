"""Training stages' results, and the policy stage, whichever model it starts from."""

from __future__ import annotations

from mahalo_ray.config import PolicyConfig
from mahalo_ray.data import storage
from mahalo_ray.pipeline.stages import Context, StageResult
from mahalo_ray.training.launch import train_policy
from mahalo_ray.training.methods import METHOD_VERSIONS
from mahalo_ray.training.ray_train import TrainingResult


def train_heads(context: Context, base_url: str) -> StageResult:
    """MAH-DPO (or a baseline) on the pairs of stage `pairs`; the base is the reference too."""
    config = context.config
    result = train_policy(
        context.input("pairs", "pairs"),
        context.path("model"),
        base_url,
        config.objective_names,
        config.policy,
        config.model,
        config.cluster,
        config.pairs.held_out_fraction,
        config.seed,
        context.path("checkpoints"),
        context.progress.training,
    )
    return trained(context, result)


def method_version(policy: PolicyConfig, since: int = 1) -> dict[str, int]:
    """What a stage's fingerprint is made of besides `policy` where the method is no longer what it was in
    version `since`, with which the stage came to be."""
    version = METHOD_VERSIONS[policy.method]
    return {"method_version": version} if version > since else {}


def trained(context: Context, result: TrainingResult) -> StageResult:
    """What every training stage leaves: the model's folder, and its curves."""
    storage.write_json(context.path("history.json"), result.history)
    return StageResult(dict(result.metrics), {"model": "model", "history": "history.json"})
